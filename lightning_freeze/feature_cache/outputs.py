"""What a module returned for a batch, as one row of bytes a sample, and back: the same nest, bits and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_freeze.feature_cache.interceptor import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from lightning_freeze.feature_cache.keys import NotPerSample, is_plain, why_no_key


@dataclass(frozen=True)
class TensorForm:
    """One tensor of an output, as the module returns it for the whole batch."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype  # as it is kept
    device: torch.device

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape[1:]) * self.stored.itemsize

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the bytes of each sample."""
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(self.shape[0], math.prod(self.shape[1:]))
        return flat.to(self.stored).contiguous().view(torch.uint8)

    def tensor(self, rows: Tensor) -> Tensor:
        """Return the tensor whose samples' bytes are ``rows``, of which it may take the memory."""
        numbers = rows.contiguous().view(self.stored).to(device=self.device, dtype=self.dtype).view(self.shape)
        if numbers.stride() == self.strides:
            return numbers
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device).copy_(numbers)


@dataclass(frozen=True)
class _Again:
    """A tensor that is among what was given, or in the output before: at ``place`` among these and its leaves."""

    place: int


@dataclass(frozen=True)
class OutputForm:
    """All that the outputs of one context have in common: the nest, its plain values and the form of each tensor."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @property
    def tensors(self) -> list[TensorForm]:
        """The forms of the tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorForm)]

    def decode(self, rows: Tensor, given: Sequence[Tensor] = ()) -> Any:
        """Return the output whose samples' bytes are ``rows``, uint8 ``(samples, bytes)``, which it may take over."""
        widths = [form.row_bytes for form in self.tensors]
        columns = iter(torch.split_with_sizes(rows, widths, 1) if len(widths) > 1 else [rows])
        leaves: list[Any] = [*given]
        for leaf in self.leaves:
            if isinstance(leaf, TensorForm):
                leaf = leaf.tensor(next(columns))
            leaves.append(leaves[leaf.place] if isinstance(leaf, _Again) else leaf)
        return tree_unflatten(leaves[len(given) :], self.spec)


def encode(
    output: Any, size: int, dtype: torch.dtype | None = None, given: Sequence[Tensor] = ()
) -> tuple[OutputForm, Tensor]:
    """Return the form of an output and one row of bytes for each sample, on the device of its first tensor.

    What is itself among the tensors that were ``given`` takes no bytes.

    Raises:
        NotPerSample: If not every tensor in it has one entry for each sample, or one requires grad.
    """
    leaves, spec = tree_flatten(output)
    places = {id(leaf): place for place, leaf in reversed(list(enumerate([*given, *leaves])))}
    forms: list[Any] = []
    for place, leaf in enumerate(leaves, len(given)):
        if isinstance(leaf, Tensor):
            first = places[id(leaf)]
            forms.append(_Again(first) if first < place else _form(leaf, size, dtype))
        elif is_plain(leaf):
            forms.append(leaf)
        else:
            raise NotPerSample(f"it returns a {type(leaf).__name__}")
    own = [(form, leaf) for form, leaf in zip(forms, leaves, strict=True) if isinstance(form, TensorForm)]
    if _share_memory([leaf for _, leaf in own]):
        raise NotPerSample("it returns tensors of which one is a view into another, or into itself")
    if not any(form.row_bytes for form, _ in own):
        raise NotPerSample("it returns no numbers")
    columns = [form.rows(leaf) for form, leaf in own]
    rows = torch.cat([column.to(columns[0].device) for column in columns], 1) if len(columns) > 1 else columns[0]
    return OutputForm(spec, tuple(forms)), rows


def difference(a: Any, b: Any) -> float:
    """Return the largest difference of two outputs in parts of the largest number, infinite if they have no numbers."""
    worst = 0.0
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        if isinstance(x, Tensor) and not torch.equal(x, y):
            if not x.is_floating_point() or not (x.isfinite().all() and y.isfinite().all()):
                return math.inf
            apart, largest = (x.double() - y.double()).abs().max(), torch.maximum(x.abs().max(), y.abs().max())
            worst = max(worst, float(apart / largest))
    return worst


def _form(tensor: Tensor, size: int, dtype: torch.dtype | None) -> TensorForm:
    if reason := why_no_key(tensor):
        raise NotPerSample(f"it is returning {reason}")
    if tensor.requires_grad:
        raise NotPerSample("what it returns requires grad")
    if tensor.dim() == 0 or tensor.shape[0] != size:
        raise NotPerSample(f"it returns a tensor of shape {tuple(tensor.shape)} for a batch of {size}")
    narrows = dtype is not None and tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize
    stored: Any = dtype if narrows else tensor.dtype
    return TensorForm(tuple(tensor.shape), tensor.stride(), tensor.dtype, stored, tensor.device)


def _share_memory(tensors: list[Tensor]) -> bool:
    """Whether two numbers of tensors lie in the same place."""
    storages: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for views in storages.values():
        if len(views) == 1 and views[0].is_contiguous():
            continue
        taken = torch.zeros(views[0].untyped_storage().nbytes() // views[0].itemsize, dtype=torch.bool)
        for view in views:
            if view.dtype.itemsize != views[0].itemsize:
                return True
            taken.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        if int(taken.sum()) < sum(view.numel() for view in views):
            return True
    return False
