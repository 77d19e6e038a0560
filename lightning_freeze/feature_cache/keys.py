"""Keys of a call: what all its samples have in common, and 128 bits for all that each sample holds."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from lightning_freeze.feature_cache.hashing import Hash, joined
from lightning_freeze.feature_cache.interceptor import TreeSpec, tree_leaves

#: What may stand in arguments and outputs beside tensors: equal values have equal text, in every run.
_PLAIN = (bool, int, float, complex, str, bytes, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)


class NotPerSample(ValueError):  # noqa: N818 - a finding about a call, not a fault
    """Says why samples of a call cannot be told apart."""


@dataclass
class Keys:
    """What the samples of a call are known by, 16 bytes each."""

    family: bytes  # for all that they have in common, but for the size of the batch
    samples: list[bytes]  # for all that each sample holds
    is_rounded: bool  # to less than 32 bits a number, before or while the module runs
    places: frozenset[int]  # of leaves of the arguments that have an entry for each sample


def read_keys(
    leaves: Sequence[Any],
    spec: TreeSpec,
    *,
    hashing: Hash,
    state: bytes = b"",
    known: Mapping[int, Keys] = {},
) -> Keys:
    """Return the keys of a call's samples; the first dimension of the first tensor is the batch.

    A tensor of another length is shared by all samples. ``state`` says what is called; some leaves are ``known`` by
    keys already.

    Raises:
        NotPerSample: If there is no batch, or no key can be made of an argument, or it requires grad.
    """
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i not in known}
    sizes = {i: leaf.shape[0] for i, leaf in tensors.items() if leaf.dim()}
    sizes |= {i: len(keys.samples) for i, keys in known.items()}
    size = sizes[min(sizes)] if sizes else 0
    places = [i for i in tensors if sizes.get(i) == size]
    shared = [leaf for i, leaf in tensors.items() if i not in places]
    texts = [known[i].family.hex() if i in known else _text(leaf, int(i in places)) for i, leaf in enumerate(leaves)]
    if size == 0:
        raise NotPerSample("it is called without a tensor that has a batch dimension")
    casts = autocast_states()
    family = xxhash.xxh3_128_digest(state + f"{spec!r}{texts}{casts}{_settings()}".encode())
    columns = [keys.samples for keys in known.values()]
    if places:
        columns.append(hashing.samples([tensors[i] for i in places], shared))
    elif shared:
        columns.append([b"".join(hashing.tensors(shared))] * size)
    args, kwargs = spec.unflatten(leaves) if len(tensors) + len(known) < len(leaves) else ((), {})
    if any(sum(map(is_plain, tree_leaves(arg))) >= size > 1 for arg in (*args, *kwargs.values())):
        columns.append([place.to_bytes(4, "big") for place in range(size)])  # plain values may be one for each sample
    is_rounded = any(on for _, on, _ in casts) or any(map(is_half, tensors.values()))
    is_rounded = is_rounded or any(keys.is_rounded for keys in known.values())
    return Keys(family, joined(columns), is_rounded, frozenset([*places, *known]))


def autocast_states() -> list[tuple[str, bool, torch.dtype]]:
    """Return each kind of device there is, with whether autocast is on there and its dtype."""
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds()]


@lru_cache
def _kinds() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def why_no_key(tensor: Tensor) -> str | None:
    """Return what a tensor is if its bytes are not all that it is, else None."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}, which is more than its bytes"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return "a tensor that is sparse, quantized or without data"
    return None


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is no tensor, and equal ones have equal text."""
    return leaf is None or isinstance(leaf, enum.Enum) or type(leaf) in _PLAIN


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are rounded to less than 32 bits."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize


def _text(leaf: Any, first: int) -> str:
    """Return what samples have in common in a leaf, in a tensor from dimension ``first`` on; raise if it has no key."""
    if isinstance(leaf, Tensor):
        if reason := why_no_key(leaf):
            raise NotPerSample(f"it is called with {reason}")
        if leaf.requires_grad and torch.is_grad_enabled():
            raise NotPerSample("its input requires grad")
        return f"{tuple(leaf.shape[first:])}{leaf.stride()}{leaf.dtype}{leaf.device}"
    if not is_plain(leaf):
        raise NotPerSample(f"it is called with a {type(leaf).__name__}, of which no key can be made")
    return f"{type(leaf).__name__} {leaf!r}"


def _settings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
