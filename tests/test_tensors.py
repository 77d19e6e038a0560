from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_freeze import to_numpy
from lightning_freeze.tensors import digest, has_values, shared_bytes

Pair = namedtuple("Pair", "left right")


@dataclass
class Outputs:
    logits: Any
    label: str


@dataclass(frozen=True)
class Frozen:
    logits: Any


@dataclass
class Late:
    label: str
    logits: Any = field(init=False)


@dataclass
class Record(OrderedDict):
    """Both a dict and a dataclass, as the outputs of Hugging Face's models are."""

    logits: Any

    def __post_init__(self) -> None:
        self["logits"] = self.logits

    def __reduce__(self) -> Any:
        return Record, (self.logits,)


class Two(tuple):
    def __new__(cls, left: Any, right: Any) -> Two:
        return super().__new__(cls, (left, right))


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
def test_to_numpy_converts_every_dtype(dtype: torch.dtype) -> None:
    array = to_numpy(torch.ones(2).to(dtype))
    assert isinstance(array, np.ndarray)
    assert array.shape == (2,)
    assert (array == 1).all()
    if dtype.is_floating_point:
        known = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
        assert array.dtype == known.get(dtype, np.float32)


@pytest.mark.parametrize("dtype", sorted({d for d in DTYPES if castable(d)}, key=str), ids=str)
def test_to_numpy_shares_no_memory(dtype: torch.dtype) -> None:
    """A snapshot does not move with training, nor does what is done to it reach the tensor."""
    tensor = torch.ones(2).to(dtype)
    array = to_numpy(nn.Parameter(tensor, requires_grad=False))
    assert tensor.untyped_storage().resizable()
    tensor.copy_(torch.tensor(0 if dtype == torch.bool else 2))
    assert (array == 1).all()
    expected = to_numpy(tensor)
    array[:] = 0
    assert np.array_equal(to_numpy(tensor), expected)


@pytest.mark.parametrize(
    ("nest", "inner"),
    [
        (Frozen(torch.ones(2)), lambda found: found.logits),
        (Record(torch.ones(2)), lambda found: found.logits),
        (Record(torch.ones(2)), lambda found: found["logits"]),
        (Two(1, torch.ones(2)), lambda found: found[1]),
        (deque([torch.ones(2)], maxlen=3), lambda found: found[0]),
        (UserDict(a=torch.ones(2)), lambda found: found["a"]),
        (defaultdict(list, a=[torch.ones(2)]), lambda found: found["a"][0]),
        (MappingProxyType({"a": torch.ones(2)}), lambda found: found["a"]),
        (torch.ones(2, 2).max(0), lambda found: found.values),
        (nn.utils.rnn.pack_sequence([torch.ones(2)]), lambda found: found.data),
    ],
    ids=lambda case: type(case).__name__,
)
def test_to_numpy_keeps_the_class_of_containers(nest: Any, inner: Any) -> None:
    found = to_numpy(nest)
    assert type(found) is type(nest)
    assert isinstance(inner(found), np.ndarray)
    assert (inner(found) == 1).all()
    assert isinstance(inner(nest), torch.Tensor)


def test_to_numpy_passes_on_unset_fields_and_other_objects() -> None:
    late = Late("x")
    assert vars(to_numpy(late)) == {"label": "x"}
    late.logits = torch.ones(1)
    assert isinstance(to_numpy(late).logits, np.ndarray)
    for other in (range(3), memoryview(b"ab"), bytearray(b"ab"), "ab", {1}, nn.Linear(1, 1), Frozen):
        assert to_numpy([other])[0] is other


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of what is experimental or deprecated
def test_to_numpy_converts_complex32_and_quantized_tensors() -> None:
    assert to_numpy(torch.ones(2, dtype=torch.complex32)).dtype == np.complex64
    assert (to_numpy(torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8)) == 1).all()


def test_to_numpy_resolves_conjugates_and_layouts() -> None:
    value = torch.tensor([1 + 2j])
    assert to_numpy(value.conj())[0] == 1 - 2j
    assert to_numpy(value.conj().imag)[0] == -2
    for other in (torch.eye(2).to_sparse(), torch.eye(2).to_mkldnn()):
        assert (to_numpy(other) == np.eye(2)).all()
    assert to_numpy(torch.tensor(3)).shape == ()
    assert to_numpy(torch.nn.Parameter(torch.ones(1)))[0] == 1


@pytest.mark.parametrize("dtype", sorted({d for d in DTYPES if castable(d)}, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_shared_bytes_equal_those_of_numpy_and_leave_storage_resizable(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape).mul(9).to(dtype)
    expected = tensor.clone().reshape(-1).view(torch.uint8).numpy()
    assert np.array_equal(shared_bytes(tensor), expected)
    assert tensor.untyped_storage().resizable()


BITS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8]
BITS += [torch.bool, torch.float8_e4m3fn]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4, 5)], ids=str)
def test_digest_changes_with_every_single_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(dtype, *shape)
    flat = tensor.reshape(-1).view(torch.uint8)
    seen = {digest(tensor)}
    for index in range(flat.numel()):
        for bit in range(8):
            flat[index] ^= 1 << bit
            seen.add(digest(tensor))
            flat[index] ^= 1 << bit
    assert len(seen) == 1 + 8 * flat.numel()
    assert digest(tensor) in seen


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(1, 3))
def test_digest_depends_on_values_not_on_strides(values: list[float], columns: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).repeat(columns, 1)
    assert digest(tensor) == digest(tensor.T.contiguous().T) == digest(nn.Parameter(tensor.clone()))
    assert digest(tensor[:, :1]) == digest(tensor[:, :1].contiguous())


def test_digest_changes_with_shape_dtype_sign_and_conjugation() -> None:
    zeros = torch.zeros(4)
    different = [zeros, zeros.view(2, 2), zeros.view(torch.int32), -zeros, torch.zeros(2, dtype=torch.float64)]
    assert len(set(map(digest, different))) == len(different)
    z = torch.tensor([1 + 2j])
    assert digest(z.conj()) == digest(torch.tensor([1 - 2j])) != digest(z)
    assert digest(z.conj().imag) == digest(torch.tensor([-2.0]))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_digest_is_the_same_in_every_memory_format_and_layout() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert digest(images.to(memory_format=torch.channels_last)) == digest(images)
    sparse = torch.eye(3).to_sparse()
    assert digest(sparse) == digest(torch.eye(3).to_sparse()) != digest((2 * torch.eye(3)).to_sparse())
    assert digest(torch.eye(3).to_sparse_csr()) == digest(torch.eye(3).to_sparse_csr())


def test_tensors_without_values_are_told_apart() -> None:
    assert not has_values(torch.empty(2, device="meta"))
    assert not has_values(torch.empty(0))
    assert not has_values(nn.parameter.UninitializedParameter())
    assert has_values(torch.ones(()))
