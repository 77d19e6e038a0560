"""The bytes of tensors, and a hash of them."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy


def shared_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Give a flat array of the bytes of a tensor, which shares its memory.

    Unlike ``Tensor.numpy``, this leaves no trace: that makes the tensor's storage impossible to resize for good.

    Args:
        tensor: Strided and contiguous, on the CPU, nothing in it conjugated or negated only when it is read.

    Example:
        >>> shared_bytes(torch.tensor([[1.0], [-1.0]]))
        array([  0,   0, 128,  63,   0,   0, 128, 191], dtype=uint8)
    """
    # Not view or reshape: what has one element counts as contiguous with any stride.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return np.from_dlpack(flat).view(np.uint8)


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
