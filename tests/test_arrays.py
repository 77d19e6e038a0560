from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lightning_freeze import to_numpy
from lightning_freeze.arrays import shared_bytes

Pair = namedtuple("Pair", "left right")


@dataclass
class Outputs:
    logits: Any
    label: str


DTYPES = [
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not any(word in str(dtype) for word in (".q", "bits", "complex32"))
]


def castable(dtype: torch.dtype) -> bool:
    try:
        torch.ones(2).to(dtype)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("dtype", sorted({d for d in DTYPES if castable(d)}, key=str), ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    array = to_numpy(torch.ones(2).to(dtype))
    assert isinstance(array, np.ndarray)
    assert array.shape == (2,)
    assert (array == 1).all()
    if dtype.is_floating_point:
        known = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
        assert array.dtype == known.get(dtype, np.float32)


def test_any_nest() -> None:
    leaf = torch.tensor([1.5], requires_grad=True)
    nest = {
        "list": [leaf, (leaf, 3)],
        "pair": Pair(leaf, "text"),
        "ordered": OrderedDict(a=leaf),
        "data": Outputs(leaf * 2, "x"),
        "none": None,
    }
    found = to_numpy(nest)
    assert type(found["list"][1]) is tuple
    assert found["list"][1][1] == 3
    assert type(found["pair"]) is Pair
    assert type(found["ordered"]) is OrderedDict
    assert found["pair"].right == "text"
    assert found["data"].label == "x"
    assert found["data"].logits == np.array([3.0], np.float32)
    assert found["none"] is None
    assert isinstance(nest["data"].logits, torch.Tensor)  # what was given is not changed
    assert leaf.requires_grad


def test_views_of_other_kinds() -> None:
    value = torch.tensor([1 + 2j])
    assert to_numpy(value.conj())[0] == 1 - 2j
    assert to_numpy(value.conj().imag)[0] == -2
    assert (to_numpy(torch.eye(2).to_sparse()) == np.eye(2)).all()
    assert to_numpy(torch.tensor(3)).shape == ()
    assert to_numpy(torch.nn.Parameter(torch.ones(1)))[0] == 1


@pytest.mark.parametrize("dtype", sorted({d for d in DTYPES if castable(d)}, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_shared_bytes_are_those_of_numpy_and_leave_no_trace(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).mul(9).to(dtype)
    expected = tensor.clone().reshape(-1).view(torch.uint8).numpy()
    assert np.array_equal(shared_bytes(tensor), expected)
    assert tensor.untyped_storage().resizable()
