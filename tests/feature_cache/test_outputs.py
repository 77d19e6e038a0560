from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_freeze.feature_cache.interceptor import tree_flatten
from lightning_freeze.feature_cache.keys import NotPerSample
from lightning_freeze.feature_cache.outputs import encode
from tests.feature_cache.test_keys import DTYPES, random_like


class Pair(NamedTuple):
    first: Tensor
    second: Any


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, 0], lambda x: x.flatten(1), lambda x: x.expand(2, 5, 4, 6)[1], lambda x: x.view(torch.int32)],
)
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
    "views": lambda x: (x.transpose(1, 2), (x + 1)[:, ::2], (x + 1)[:, 1:, 2]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_come_back_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    x = random_like(dtype, 5, 4, 6)
    output = OUTPUTS[kind](x if dtype.is_floating_point or kind != "dict" else x.float())
    form, rows = encode(output, 5)
    order = [3, 1, 1, 0, 4]
    back = form.decode(rows[order])
    leaves, others = (tree_flatten(nest) for nest in (output, back))
    assert leaves[1] == others[1]
    for leaf, other in zip(leaves[0], others[0], strict=True):
        if isinstance(leaf, Tensor):
            assert same_bits(leaf[order], other)
            assert leaf.stride() == other.stride()
        else:
            assert leaf is other or leaf == other


def test_memory_format_of_outputs_comes_back() -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    form, rows = encode(x, 4)
    back = form.decode(rows)
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
    sequence_first = torch.randn(7, 4, 2).transpose(0, 1)  # the batch is the second dimension in memory
    form, rows = encode(sequence_first, 4)
    back = form.decode(rows)
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
        (torch.zeros(4, 1).expand(4, 3), "into itself"),
        (torch.zeros(1, 3).expand(4, 3), "into itself"),
    ],
)
def test_outputs_that_are_not_per_sample_say_why(output: Any, says: str) -> None:
    with pytest.raises(NotPerSample, match=says):
        encode(output, 4)
