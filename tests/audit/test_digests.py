from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_freeze.audit.digests import Witness, differing
from lightning_freeze.tensors import digest, has_values

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4, 5)], ids=str)
def test_every_single_bit_counts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
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
def test_it_is_the_values_that_count_and_not_how_they_lie(values: list[float], columns: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).repeat(columns, 1)
    assert digest(tensor) == digest(tensor.T.contiguous().T) == digest(nn.Parameter(tensor.clone()))
    assert digest(tensor[:, :1]) == digest(tensor[:, :1].contiguous())


def test_shape_dtype_sign_and_conjugation_count() -> None:
    zeros = torch.zeros(4)
    different = [zeros, zeros.view(2, 2), zeros.view(torch.int32), -zeros, torch.zeros(2, dtype=torch.float64)]
    assert len(set(map(digest, different))) == len(different)
    z = torch.tensor([1 + 2j])
    assert digest(z.conj()) == digest(torch.tensor([1 - 2j])) != digest(z)
    assert digest(z.conj().imag) == digest(torch.tensor([-2.0]))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_images_in_channels_last_and_sparse_tensors() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert digest(images.to(memory_format=torch.channels_last)) == digest(images)
    sparse = torch.eye(3).to_sparse()
    assert digest(sparse) == digest(torch.eye(3).to_sparse()) != digest((2 * torch.eye(3)).to_sparse())
    assert digest(torch.eye(3).to_sparse_csr()) == digest(torch.eye(3).to_sparse_csr())


def test_it_sees_a_write_to_data_which_raises_no_version() -> None:
    net, witness = nn.Linear(3, 3), Witness()
    witness.look(dict(net.named_parameters()))
    version = net.weight._version
    net.weight.data[0, 0] += 1
    assert net.weight._version == version
    assert witness.look(dict(net.named_parameters())) == ["weight"]
    assert witness.look(dict(net.named_parameters())) == []


def test_what_the_last_look_left_out_is_new() -> None:
    net, witness = nn.Linear(3, 3), Witness()
    witness.look(dict(net.named_parameters()))
    witness.look({"bias": net.bias})
    net.weight.data.zero_()
    assert witness.look(dict(net.named_parameters())) == []


def test_another_parameter_is_new_and_another_buffer_has_moved() -> None:
    net, witness = nn.BatchNorm1d(2), Witness()
    witness.look({"weight": net.weight, "running_mean": net.running_mean})
    net.weight = nn.Parameter(torch.zeros(2))
    net.running_mean = torch.full((2,), 7.0)
    assert witness.look({"weight": net.weight, "running_mean": net.running_mean}) == ["running_mean"]


def test_forgetting() -> None:
    net, witness = nn.Linear(3, 3), Witness()
    for forget, expected in ((lambda: witness.keep({"bias"}), ["bias"]), (witness.forget, [])):
        witness.look(dict(net.named_parameters()))
        forget()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1)
        assert witness.look(dict(net.named_parameters())) == expected


def test_what_has_no_values() -> None:
    assert not has_values(torch.empty(2, device="meta"))
    assert not has_values(torch.empty(0))
    assert not has_values(nn.parameter.UninitializedParameter())
    assert has_values(torch.ones(()))


def test_differing() -> None:
    same = {"a": b"1", "b": b"2"}
    assert differing([same, dict(same), dict(same)]) == []
    assert differing([same, dict(same), {"a": b"1", "b": b"3"}]) == ["b"]
    assert differing([same, {"a": b"1"}]) == ["b"]
