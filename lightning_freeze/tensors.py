"""Tensors: as arrays, as bytes, hashed, and operations on many at once, which torch has under private names only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return a NumPy array with a copy of the values, in the closest dtype that NumPy has."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    # A copy also because Tensor.numpy makes a storage impossible to resize for good.
    tensor = tensor.to("cpu", copy=True)
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    if tensor.is_complex() and tensor.dtype not in (torch.complex64, torch.complex128):
        tensor = tensor.to(torch.complex64)
    return np.asarray(tensor.resolve_conj().resolve_neg().numpy())


def shared_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a contiguous tensor on the CPU as a flat array that shares its memory.

    ``Tensor.numpy`` is no choice: it makes the tensor's storage impossible to resize for good.
    """
    # Not view or reshape: what has one element counts as contiguous with any stride.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return np.from_dlpack(flat).view(np.uint8)


def digest(tensor: Tensor) -> bytes:
    """Return the 128-bit xxh3 hash of a tensor's values, shape and dtype.

    Two tensors with the same digest are bit-identical, but for a chance of 2⁻¹²⁸; minus zero differs from zero, and one
    NaN from another. On a GPU the values are copied to the host. Of a distributed tensor, this process's part counts.
    """
    hasher = xxhash.xxh3_128(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    for plain in _plain(tensor.detach()):
        hasher.update(shared_bytes(plain.cpu().contiguous()).data)
    return hasher.digest()


def has_values(tensor: Tensor) -> bool:
    """Return whether there is anything to hash: not in an empty tensor, a lazy one, or one on the meta device."""
    return not is_lazy(tensor) and not tensor.is_meta and tensor.numel() > 0


def stored_values(tensor: Tensor) -> Tensor:
    """Return the entries of a sparse tensor as a strided one, duplicates added up; a strided tensor as it is."""
    if tensor.layout is torch.strided:
        return tensor
    return (tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor).values()


def base_of(tensor: Tensor) -> Tensor | None:
    """Return what a tensor is a view of: one made under ``no_grad`` keeps its graph, and nothing public leads there."""
    return tensor._base


# One kernel for a list of tensors, many times faster than one for each. torch has these under private names; its public
# functions take one tensor, or return one norm of all (`torch.nn.utils.get_total_norm`).


def norms_of_all(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Return the Euclidean norm of each tensor, summed up in ``dtype``."""
    return torch._foreach_norm(list(tensors), 2, dtype=dtype)


def divide_all(tensors: Sequence[Tensor], divisor: Tensor) -> tuple[Tensor, ...]:
    """Return each tensor divided by a scalar."""
    return torch._foreach_div(list(tensors), divisor)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target."""
    if targets:  # the kernel refuses none
        torch._foreach_copy_(list(targets), list(sources))


def lerp_all(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each target towards its source, by ``weight`` times the difference."""
    if targets:
        torch._foreach_lerp_(list(targets), list(sources), weight)


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a tensor is made of: a subclass and a sparse one have several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in _plain(getattr(tensor, name))]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout is not torch.strided:
        return [tensor.to_dense()]
    return [tensor.as_subclass(Tensor).resolve_conj().resolve_neg()]
