"""Tensors as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from numpy.typing import NDArray


def to_numpy(outputs: Any) -> Any:
    """Give the same nest of dicts, lists and tuples with every tensor as a NumPy array.

    Args:
        outputs: A tensor, or any nest of mappings, sequences, named tuples and dataclasses that holds tensors.
            Anything else in it is passed on as it is.

    Returns:
        The nest, each tensor detached, moved to the CPU and made an array of the same shape and dtype.
        Floating dtypes that NumPy does not know (bfloat16, float8) become float32; sparse tensors become dense.

    Example:
        >>> to_numpy({"loss": torch.tensor(0.5, requires_grad=True), "preds": [torch.ones(2, dtype=torch.bfloat16)]})
        {'loss': array(0.5, dtype=float32), 'preds': [array([1., 1.], dtype=float32)]}
    """
    return apply_to_collection(outputs, torch.Tensor, _array)


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


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    return np.asarray(tensor.resolve_conj().resolve_neg().numpy())
