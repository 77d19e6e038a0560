"""A call and its samples: a key for every sample that goes in, a row of bytes for what comes out of it.

Arguments and outputs are any nest of tensors. The first dimension of the first tensor is the batch; a tensor with
another first dimension is shared by all samples. Nothing here knows modules, stores or Lightning.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_freeze.tensors import shared_bytes

Bytes: TypeAlias = NDArray[np.uint8]

#: What may stand in arguments and outputs beside tensors: equal values have equal text, in every run.
_PLAIN = (bool, int, float, complex, str, bytes, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)


class NotPerSample(ValueError):  # noqa: N818 - a finding about a call, not a fault
    """Says why samples of a call cannot be told apart."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call, seen as a batch of samples.

    Args:
        leaves: Tensors and plain values, in the order of ``spec``.
        spec: How the leaves stand in ``(args, kwargs)``.
        size: The number of samples.
        samples: Which leaves have one entry for each sample.
    """

    leaves: list[Any]
    spec: TreeSpec
    size: int
    samples: tuple[int, ...]

    @cached_property
    def form(self) -> str:
        """All that the samples have in common but the content of shared tensors, as text that is the same in each run.

        Shapes without the batch dimension, strides, dtypes, devices, plain values and the nest itself.
        """
        parts = [_leaf_text(leaf, first=int(i in self.samples)) for i, leaf in enumerate(self.leaves)]
        return f"{self.spec!r}|{'|'.join(parts)}"

    def keys(self) -> list[bytes]:
        """Give 16 bytes for each sample: the xxh3 hash of all that it holds, bit by bit.

        Example:
            >>> first, second, third = read_call((torch.tensor([0.0, -0.0, 0.0]),), {}).keys()
            >>> first == second, first == third
            (False, True)
        """
        columns = [byte_rows(self.leaves[i]) for i in self.samples]
        shared = b"".join(
            tensor_digest(leaf)
            for i, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and i not in self.samples
        )
        if len(columns) == 1 and not shared:
            return [byte_digest(row) for row in columns[0]]
        keys = []
        for rows in zip(*columns, strict=True):
            state = xxhash.xxh3_128(shared)
            for row in rows:
                state.update(row)
            keys.append(state.digest())
        return keys

    def pick(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give arguments that hold the samples at ``indices``, in that order, memory format kept."""
        leaves = list(self.leaves)
        for i in self.samples:
            order = _batch_first(_memory_order(leaves[i]))
            rows = leaves[i].permute(order)[torch.as_tensor(indices, device=leaves[i].device)]
            leaves[i] = rows.permute(_inverse(order))
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Find the samples in the arguments of a call.

    Raises:
        NotPerSample: If there is no batch, or an argument is of a kind that cannot be compared.

    Example:
        >>> call = read_call((torch.zeros(4, 7),), {"mask": torch.ones(4, 1), "scale": 2})
        >>> call.size, call.samples
        (4, (0, 1))
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    for i, leaf in enumerate(leaves):
        if i not in tensors and not is_plain(leaf):
            raise NotPerSample(f"it is called with a {type(leaf).__name__}, of which no key can be made")
    for tensor in tensors.values():
        if reason := why_no_key(tensor):
            raise NotPerSample(f"it is called with {reason}")
    size = next((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), 0)
    if size == 0:
        raise NotPerSample("it is called without a tensor that has a batch dimension")
    if len(tensors) < len(leaves) and _has_plain_list(size, args, kwargs):
        raise NotPerSample(f"it is called with {size} samples and a list of {size} plain values, which may be theirs")
    samples = tuple(i for i, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == size)
    return Call(leaves, spec, size, samples)


def why_no_key(tensor: Tensor) -> str | None:
    """Name what a tensor is if its bytes are not all that it is, else None.

    Example:
        >>> why_no_key(torch.eye(2)), why_no_key(torch.eye(2).to_sparse())
        (None, 'a tensor that is sparse, quantized or without data')
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}, which is more than its bytes"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return "a tensor that is sparse, quantized or without data"
    return None


@dataclass(frozen=True)
class TensorForm:
    """One tensor of an output, without its batch dimension.

    Args:
        shape: Of one sample.
        order: The dimensions of the whole tensor as they lie in memory: later kernels shall see the memory format they
            would have seen.
        strides: Of the whole tensor; None if they depend on the batch size or overlap.
        dtype: As the module gives it.
        stored: As it is kept.
        device: Where the module gives it.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: torch.dtype
    stored: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes that one sample takes."""
        return self.numel * self.stored.itemsize


@dataclass(frozen=True)
class _Again:
    """A tensor that stands in an output before, at ``place`` among its leaves."""

    place: int


@dataclass(frozen=True)
class OutputForm:
    """All that the outputs of a batch have in common: the nest, its plain values and the form of each tensor."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that one sample takes."""
        return sum(leaf.row_bytes for leaf in self.leaves if isinstance(leaf, TensorForm))

    def decode(self, rows: Tensor) -> Any:
        """Give the output whose samples are ``rows``.

        Args:
            rows: uint8, ``(samples, row_bytes)``, contiguous; it may become the output's own memory.
        """
        start = 0
        leaves: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorForm):
                leaves.append(_tensor(rows[:, start : start + leaf.row_bytes], leaf))
                start += leaf.row_bytes
            elif isinstance(leaf, _Again):
                leaves.append(leaves[leaf.place])
            else:
                leaves.append(leaf)
        return tree_unflatten(leaves, self.spec)


def encode(output: Any, size: int, dtype: torch.dtype | None = None) -> tuple[OutputForm, Bytes]:
    """Give the form of an output and one row of bytes for each sample.

    Args:
        output: What a module returned for a batch.
        size: The number of samples.
        dtype: Keep wider floating numbers in this dtype.

    Raises:
        NotPerSample: If not every tensor in it has one entry for each sample, or one requires grad.

    Example:
        >>> form, rows = encode({"a": torch.ones(2, 3), "b": None}, 2, torch.float16)
        >>> rows.shape, form.decode(torch.from_numpy(rows))
        ((2, 6), {'a': tensor([[1., 1., 1.],
                [1., 1., 1.]]), 'b': None})
    """
    leaves, spec = tree_flatten(output)
    forms: list[Any] = []
    columns: list[Bytes] = []
    places = {id(leaf): place for place, leaf in reversed(list(enumerate(leaves)))}
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            if not is_plain(leaf):
                raise NotPerSample(f"it returns a {type(leaf).__name__}")
            forms.append(leaf)
            continue
        if places[id(leaf)] < place:
            forms.append(_Again(places[id(leaf)]))
            continue
        if reason := why_no_key(leaf):
            raise NotPerSample(f"it is returning {reason}")
        if leaf.requires_grad:
            raise NotPerSample("what it returns requires grad")
        if leaf.dim() == 0 or leaf.shape[0] != size:
            raise NotPerSample(f"it returns a tensor of shape {tuple(leaf.shape)} for a batch of {size}")
        stored = _stored_dtype(leaf.dtype, dtype)
        order = _memory_order(leaf)
        forms.append(TensorForm(tuple(leaf.shape[1:]), order, _strides(leaf), leaf.dtype, stored, leaf.device))
        columns.append(_bytes(leaf.permute(_batch_first(order)).to(stored)))
    if _overlap([leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and places[id(leaf)] == place]):
        raise NotPerSample("it returns tensors of which one is a view into another")
    if not any(column.size for column in columns):
        raise NotPerSample("it returns no numbers")
    return OutputForm(spec, tuple(forms)), columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def byte_rows(tensor: Tensor) -> Bytes:
    """Give the bytes of each entry along the first dimension, in memory order: uint8 of shape ``(entries, bytes)``."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(_batch_first(_memory_order(tensor)))
    return _bytes(tensor)


def byte_digest(row: Bytes) -> bytes:
    """Give the 128-bit xxh3 hash of bytes."""
    return xxhash.xxh3_128_digest(row)  # type: ignore[arg-type]  # any buffer will do


def tensor_digest(tensor: Tensor) -> bytes:
    """Give the 128-bit xxh3 hash of all numbers of a tensor, in the order of its dimensions."""
    return byte_digest(byte_rows(tensor.reshape(1, -1)))


def _bytes(tensor: Tensor) -> Bytes:
    row_bytes = math.prod(tensor.shape[1:]) * tensor.itemsize
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    return shared_bytes(plain).reshape(tensor.shape[0], row_bytes)


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is no tensor, and equal ones have equal text."""
    return leaf is None or isinstance(leaf, enum.Enum) or type(leaf) in _PLAIN


def _overlap(tensors: list[Tensor]) -> bool:
    """Whether two tensors have an element in common."""
    owners: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        owners.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for views in owners.values():
        if len(views) == 1:
            continue
        taken = torch.zeros(views[0].untyped_storage().nbytes(), dtype=torch.bool)
        for view in views:
            dims = [(n, stride * view.itemsize) for n, stride in zip(view.shape, view.stride(), strict=True) if stride]
            sizes, strides = zip(*dims, (view.itemsize, 1), strict=True)
            mine = taken.as_strided(sizes, strides, view.storage_offset() * view.itemsize)
            if mine.any():
                return True
            mine.fill_(True)
    return False


def _has_plain_list(size: int, *nests: Any) -> bool:
    """Whether there is a list or tuple of so many plain values somewhere."""
    for nest in nests:
        if isinstance(nest, dict):
            nest = list(nest.values())  # never plain itself: its keys tell values apart
        elif isinstance(nest, list | tuple) and len(nest) == size and all(map(is_plain, nest)):
            return True
        if isinstance(nest, list | tuple) and _has_plain_list(size, *nest):
            return True
    return False


def _leaf_text(leaf: Any, first: int) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape[first:])}{leaf.stride()[first:]}{leaf.dtype}{leaf.device}"
    return f"{type(leaf).__name__} {leaf!r}"


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))


def _batch_first(order: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *(d for d in order if d != 0))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _stored_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is None or not dtype.is_floating_point or dtype.itemsize <= wanted.itemsize:
        return dtype
    return wanted


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Give the strides if no two entries share memory and the batch lies outermost, else None."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return None
            reach += stride * (size - 1)
    return tensor.stride() if tensor.stride(0) == max(tensor.stride()) else None


def _tensor(rows: Tensor, form: TensorForm) -> Tensor:
    size = (rows.shape[0], *form.shape)
    order = _batch_first(form.order)
    numbers = rows.contiguous().view(form.stored).view([size[d] for d in order])
    tensor = numbers.permute(_inverse(order)).to(device=form.device, dtype=form.dtype)
    if form.strides is None:
        blank = torch.empty([size[d] for d in form.order], dtype=form.dtype, device=form.device)
        return blank.permute(_inverse(form.order)).copy_(tensor)
    if tensor.stride() == form.strides:
        return tensor
    return torch.empty_strided(size, form.strides, dtype=form.dtype, device=form.device).copy_(tensor)
