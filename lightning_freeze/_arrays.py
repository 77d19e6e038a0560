"""Tensors as NumPy arrays."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserList, deque
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_numpy(outputs: Any) -> Any:
    """Give the same nest of dicts, lists and tuples with every tensor as a NumPy array: copies, not views.

    Args:
        outputs: A tensor, or any nest of mappings, lists, tuples (also named ones) and dataclasses that holds tensors.
            Anything else in it is passed on as it is.

    Returns:
        The nest, each tensor detached, moved to the CPU and made an array of the same shape and dtype. No array shares
        memory with its tensor, so what trains on does not move it. Floating dtypes that NumPy does not know (bfloat16,
        float8) and quantized ones become float32, complex32 becomes complex64; sparse tensors become dense.

    Example:
        >>> to_numpy({"loss": torch.tensor(0.5, requires_grad=True), "preds": [torch.ones(2, dtype=torch.bfloat16)]})
        {'loss': array(0.5, dtype=float32), 'preds': [array([1., 1.], dtype=float32)]}
    """
    if isinstance(outputs, torch.Tensor):
        return _array(outputs)
    if isinstance(outputs, tuple):
        return _tuple(type(outputs), [to_numpy(one) for one in outputs])
    if isinstance(outputs, Mapping) and not isinstance(outputs, MutableMapping):
        return type(outputs)({key: to_numpy(value) for key, value in outputs.items()})  # type: ignore[call-arg]
    is_record = dataclasses.is_dataclass(outputs) and not isinstance(outputs, type)
    if not is_record and not isinstance(outputs, MutableMapping | list | deque | UserList):
        return outputs
    twin = copy.copy(outputs)
    if isinstance(twin, MutableMapping):
        for key in list(twin):
            twin[key] = to_numpy(twin[key])
    elif not is_record:
        for index, one in enumerate(twin):
            twin[index] = to_numpy(one)
    for field in dataclasses.fields(twin) if is_record else ():
        if hasattr(twin, field.name):
            object.__setattr__(twin, field.name, to_numpy(getattr(twin, field.name)))  # it may be frozen
    return twin


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


def _tuple(kind: type, items: list[Any]) -> Any:
    try:
        return tuple.__new__(kind, items)  # whatever arguments its own __new__ takes
    except TypeError:
        return kind(items)  # one that is written in C, such as torch.return_types.max


def _array(tensor: torch.Tensor) -> NDArray[Any]:
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
