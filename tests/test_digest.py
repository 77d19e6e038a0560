"""The hash of a tensor's values, by which frozen is compared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_freeze.tensors import digest, has_values

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.float8_e4m3fn], ids=str)
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
