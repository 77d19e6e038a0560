"""Outputs of a network as NumPy arrays."""

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


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    return np.asarray(tensor.resolve_conj().resolve_neg().numpy())
