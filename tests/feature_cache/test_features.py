from __future__ import annotations

from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_freeze.feature_cache.features import NotPerSample, encode, read_call

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


class Pair(NamedTuple):
    first: Tensor
    second: Any


def random_like(dtype: torch.dtype, *shape: int) -> Tensor:
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def keys(*args: Any, **kwargs: Any) -> list[bytes]:
    return read_call(args, kwargs).keys()


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), where=st.data())
def test_one_bit_makes_another_sample(dtype: torch.dtype, shape: list[int], where: st.DataObject) -> None:
    one = random_like(dtype, 3, *shape)
    other = one.clone()
    row = other[1].reshape(-1).view(torch.uint8)
    byte = where.draw(st.integers(0, row.numel() - 1))
    row[byte] ^= 1 << (0 if dtype is torch.bool else where.draw(st.integers(0, 7)))
    before, after = keys(one), keys(other)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def nan(payload: int) -> Tensor:
    return torch.tensor([0x7FC00000 + payload], dtype=torch.int32).view(torch.float32)


IMAGE = torch.randn(1, 3, 4, 4)
TWINS = {
    "zeros of both signs": (torch.zeros(1, 4), -torch.zeros(1, 4)),
    "two sign flips": (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-1.0, -2.0, 3.0]])),
    "all signs flipped": (IMAGE, -IMAGE),
    "permuted pixels": (IMAGE, IMAGE.flatten(2)[..., torch.arange(15, -1, -1)].reshape(1, 3, 4, 4)),
    "two pixels swapped": (torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])),
    "mirrored": (IMAGE, IMAGE.flip(3)),
    "channels swapped": (IMAGE, IMAGE[:, [1, 0, 2]]),
    "NaN payloads": (nan(1), nan(2)),
    "neighbours": (torch.ones(1, 2), torch.nextafter(torch.ones(1, 2), torch.tensor(2.0))),
    "denormals": (torch.zeros(1, 2), torch.full((1, 2), 1e-45)),
}


@pytest.mark.parametrize("twins", TWINS)
def test_each_of_two_similar_inputs_has_its_own_key(twins: str) -> None:
    one, other = TWINS[twins]
    assert keys(one) != keys(other)
    assert keys(one) == keys(one.clone())


def test_key_of_a_sample_does_not_depend_on_the_batch() -> None:
    x, mask = torch.randn(8, 3, 4, 4), torch.rand(8, 5) > 0.5
    order = torch.randperm(8)
    before, after = keys(x, mask=mask), keys(x[order], mask=mask[order])
    assert [before[i] for i in order] == after
    assert keys(x[2:5], mask=mask[2:5]) == before[2:5]


def test_what_is_not_a_sample_is_part_of_the_key() -> None:
    x = torch.randn(4, 3)
    form = read_call((x,), {"scale": 2}).form
    others = [((x,), {"scale": 3}), ((x,), {"scale": 2.0}), ((x,), {"scale": None}), ((x, 2), {}), ((x,), {})]
    others += [((x,), {"scale": "2"}), ((x.double(),), {"scale": 2}), ((x,), {"scale": True}), (([x],), {"scale": 2})]
    assert all(read_call(args, kwargs).form != form for args, kwargs in others)
    shared = torch.tensor([1.0, 2.0])
    assert keys(x, shared) != keys(x, shared + 1)
    assert keys(x, torch.tensor(1)) != keys(x, torch.tensor(2))
    assert read_call((x, torch.zeros(7)), {}).form != read_call((x, torch.zeros(8)), {}).form


def test_memory_format_is_part_of_the_form() -> None:
    x = torch.randn(4, 3, 5, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert read_call((x,), {}).form != read_call((last,), {}).form
    args, _ = read_call((last,), {}).pick([2, 0])
    assert torch.equal(args[0], x[[2, 0]])
    assert args[0].stride() == last[[2, 0]].stride()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "without a tensor"),
        ((torch.tensor(1.0),), "without a tensor"),
        ((torch.zeros(0, 3),), "without a tensor"),
        ((torch.zeros(2, 3), object()), "a object"),
        ((torch.zeros(2, 3, device="meta"),), "without data"),
        ((torch.eye(3).to_sparse(),), "sparse"),
        ((np.zeros(3),), "ndarray"),
        ((torch.zeros(2, 3), ["a", "b"]), "may be theirs"),
        ((torch.zeros(2, 3), {"more": [None, (1, 2)]}), "may be theirs"),
    ],
)
def test_calls_without_samples_say_why(args: Any, says: str) -> None:
    with pytest.raises(NotPerSample, match=says):
        read_call(args, {})


@pytest.mark.parametrize("other", [["a"], [torch.zeros(2), "a"], (1, 2, 3), {"a": 1, "b": 2}, "ab"])
def test_what_cannot_belong_to_one_sample_each_is_no_obstacle(other: Any) -> None:
    assert read_call((torch.zeros(2, 3), other), {}).size == 2


@pytest.mark.parametrize("view", [lambda x: x[:, 0], lambda x: x.flatten(1), lambda x: x.expand(2, 5, 4, 6)[1]])
def test_a_view_into_another_output_is_none_that_can_come_back(view: Any) -> None:
    x = torch.randn(5, 4, 6)
    with pytest.raises(NotPerSample, match="a view into another"):
        encode((x, view(x)), 5)


OUTPUTS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x[:, 1:], x[:, 0]),
    "the same twice": lambda x: (x, [x, x + 1]),
    "dict": lambda x: {"last_hidden_state": x, "pooler": x.mean(1), "none": None, "n": 3},
    "named tuple": lambda x: Pair(x, [x + 1]),
    "views": lambda x: (x.transpose(1, 2), (x + 1)[:, ::2], (x + 1).unsqueeze(1).expand(-1, 3, -1, -1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_come_back_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    x = random_like(dtype, 5, 4, 6)
    output = OUTPUTS[kind](x if dtype.is_floating_point or kind != "dict" else x.float())
    form, rows = encode(output, 5)
    order = [3, 1, 1]
    back = form.decode(torch.from_numpy(rows[order].copy()))
    leaves, others = (torch.utils._pytree.tree_flatten(nest) for nest in (output, back))
    assert leaves[1] == others[1]
    for leaf, other in zip(leaves[0], others[0], strict=True):
        if isinstance(leaf, Tensor):
            assert same_bits(leaf[order], other)
        else:
            assert leaf is other or leaf == other


def test_memory_format_of_outputs_comes_back() -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    form, rows = encode(x, 4)
    back = form.decode(torch.from_numpy(rows))
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
    sequence_first = torch.randn(7, 4, 2).transpose(0, 1)  # the batch is the second dimension in memory
    form, rows = encode(sequence_first, 4)
    back = form.decode(torch.from_numpy(rows))
    assert torch.equal(back, sequence_first)
    assert back.stride() == sequence_first.stride()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (torch.zeros(()), "shape"),
        (torch.zeros(3, 2), "batch of 4"),
        ((torch.zeros(4, 2), torch.zeros(1)), "batch of 4"),
        (object(), "object"),
        (None, "no numbers"),
        (torch.zeros(4, 2, requires_grad=True), "requires grad"),
    ],
)
def test_outputs_that_are_not_per_sample_say_why(output: Any, says: str) -> None:
    with pytest.raises(NotPerSample, match=says):
        encode(output, 4)
