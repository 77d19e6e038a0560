"""Witness: remembers what values were, by digest, and says which have changed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze._arrays import shared_bytes


def digest(tensor: Tensor) -> bytes:
    """Give the 128-bit xxh3 hash of a tensor's values, shape and dtype.

    Two tensors with the same digest are bit-identical, but for a chance of 2⁻¹²⁸; minus zero differs from zero, and one
    NaN from another. On a GPU the values are copied to the host, one tensor at a time. Of a distributed tensor, the
    part that this process holds counts.

    Args:
        tensor: Any tensor that has values.

    Example:
        >>> a = torch.ones(2, 3)
        >>> digest(a) == digest(a.clone()), digest(a) == digest(-a), digest(a) == digest(a.T)
        (True, False, False)
    """
    hasher = xxhash.xxh3_128(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    for plain in _plain(tensor.detach()):
        hasher.update(shared_bytes(plain.cpu().contiguous()).data)
    return hasher.digest()


def has_values(tensor: Tensor) -> bool:
    """Whether there is something to hash: not empty, not on the meta device, not yet to be made by a lazy module."""
    return not is_lazy(tensor) and not tensor.is_meta and tensor.numel() > 0


def _plain(tensor: Tensor) -> list[Tensor]:
    """Give the dense tensors that a tensor is made of: a subclass and a sparse one have several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in _plain(getattr(tensor, name))]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout is not torch.strided:
        return [tensor.to_dense()]
    return [tensor.as_subclass(Tensor).resolve_conj().resolve_neg()]


class Witness:
    """Remembers the digests of named tensors.

    Version counters would be cheaper, but a write to ``.data`` does not raise them. Sixteen bytes a tensor are kept.

    Example:
        >>> net, witness = nn.Linear(2, 1), Witness()
        >>> witness.look(dict(net.named_parameters()))
        []
        >>> net.bias.data.fill_(7).item()
        7.0
        >>> witness.look(dict(net.named_parameters()))
        ['bias']
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[nn.Parameter | None, bytes]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._seen

    def look(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Give the names of tensors that have changed since the last look; remember these, and forget all others.

        What the last look did not see is new: it cannot have changed. Nor has a parameter of which another object has
        taken the place; a buffer is what the module has under its name.
        """
        before, self._seen = self._seen, {}
        moved = []
        for name, tensor in tensors.items():
            parameter = tensor if isinstance(tensor, nn.Parameter) else None
            self._seen[name] = (parameter, digest(tensor))
            known = before.get(name)
            if known is not None and known[0] is parameter and known[1] != self._seen[name][1]:
                moved.append(name)
        return moved

    def keep(self, names: Container[str]) -> None:
        """Forget all but these."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}

    def forget(self) -> None:
        """Know nothing any longer."""
        self._seen = {}


def differing(digests: Sequence[Mapping[str, bytes]]) -> list[str]:
    """Give the names under which not all have the same digest.

    Args:
        digests: One mapping from name to digest for each process.

    Example:
        >>> differing([{"weight": b"1", "bias": b"2"}, {"weight": b"1", "bias": b"3"}])
        ['bias']
    """
    names = dict.fromkeys(name for one in digests for name in one)
    return [name for name in names if len({one.get(name) for one in digests}) > 1]
