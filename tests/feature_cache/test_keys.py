"""Keys of samples, by both ways of hashing: xxh3 on the host, and what runs on an accelerator, here on the CPU."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_freeze.feature_cache.hashing import DeviceHash, Hash
from lightning_freeze.feature_cache.interceptor import tree_flatten
from lightning_freeze.feature_cache.keys import Keys, NotPerSample, read_keys

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
HASHES = [Hash(), DeviceHash()]
hashed = pytest.mark.parametrize("hashing", HASHES, ids=lambda one: type(one).__name__)


def read(*args: Any, hashing: Hash = HASHES[0], **kwargs: Any) -> Keys:
    return read_keys(*tree_flatten((args, kwargs)), hashing=hashing)


def keys(*args: Any, hashing: Hash = HASHES[0], **kwargs: Any) -> list[bytes]:
    return read(*args, hashing=hashing, **kwargs).samples


def random_like(dtype: torch.dtype, *shape: int) -> Tensor:
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1)


@hashed
@settings(max_examples=30, deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), where=st.data())
def test_one_bit_makes_another_sample(
    hashing: Hash, dtype: torch.dtype, shape: list[int], where: st.DataObject
) -> None:
    one = random_like(dtype, 3, *shape)
    other = one.clone()
    row = other[1].reshape(-1).view(torch.uint8)
    byte = where.draw(st.integers(0, row.numel() - 1))
    row[byte] ^= 1 << (0 if dtype is torch.bool else where.draw(st.integers(0, 7)))
    before, after = keys(one, hashing=hashing), keys(other, hashing=hashing)
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


@hashed
@pytest.mark.parametrize("twins", TWINS)
def test_each_of_two_similar_inputs_has_its_own_key(twins: str, hashing: Hash) -> None:
    one, other = TWINS[twins]
    assert keys(one, hashing=hashing) != keys(other, hashing=hashing)
    assert keys(one, hashing=hashing) == keys(one.clone(), hashing=hashing)


@hashed
def test_key_of_a_sample_does_not_depend_on_the_batch(hashing: Hash) -> None:
    x, mask = torch.randn(8, 3, 4, 4), torch.rand(8, 5) > 0.5
    order = torch.randperm(8)
    before = keys(x, mask=mask, hashing=hashing)
    assert [before[i] for i in order] == keys(x[order], mask=mask[order], hashing=hashing)
    assert keys(x[2:5], mask=mask[2:5], hashing=hashing) == before[2:5]
    assert read(x, mask=mask).family == read(x[2:5], mask=mask[2:5]).family


@hashed
def test_what_is_not_a_sample_is_part_of_the_key(hashing: Hash) -> None:
    x = torch.randn(4, 3)
    family = read(x, scale=2).family
    others = [((x,), {"scale": 3}), ((x,), {"scale": 2.0}), ((x,), {"scale": None}), ((x, 2), {}), ((x,), {})]
    others += [((x,), {"scale": "2"}), ((x.double(),), {"scale": 2}), ((x,), {"scale": True}), (([x],), {"scale": 2})]
    assert all(read(*args, **kwargs).family != family for args, kwargs in others)
    shared = torch.tensor([1.0, 2.0])
    assert keys(x, shared, hashing=hashing) != keys(x, shared + 1, hashing=hashing)
    assert keys(x, torch.tensor(1), hashing=hashing) != keys(x, torch.tensor(2), hashing=hashing)
    assert read(x, torch.zeros(7)).family != read(x, torch.zeros(8)).family


@hashed
def test_memory_format_is_part_of_the_family(hashing: Hash) -> None:
    x = torch.randn(4, 3, 5, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert read(x).family != read(last).family
    assert keys(last[[2, 0]], hashing=hashing) == [keys(last, hashing=hashing)[i] for i in (2, 0)]


SETTINGS = {
    "gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another autocast": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_part_of_the_family(setting: str) -> None:
    x = torch.randn(4, 3)
    before = read(x).family
    with SETTINGS[setting]():
        assert read(x).family != before
    assert read(x).family == before


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
    ],
)
def test_calls_without_samples_say_why(args: Any, says: str) -> None:
    with pytest.raises(NotPerSample, match=says):
        read(*args)


@pytest.mark.parametrize(
    ("other", "may_be_theirs"),
    [(["a", "b"], True), ({"more": [None, (1, 2)]}, True), ({"a": 1, "b": 2}, True), (["a"], False), ("ab", False)],
)
def test_a_sample_is_known_by_its_place_only_where_plain_values_may_belong_to_one_each(
    other: Any, may_be_theirs: bool
) -> None:
    x = torch.randn(2, 3)
    assert (keys(x, other) == keys(x.flip(0), other)[::-1]) != may_be_theirs
    assert keys(x, other) == keys(x.clone(), other)
    assert keys(x, True, None, scale=2) == keys(x.flip(0), True, None, scale=2)[::-1]


# Hashing on an accelerator


@pytest.mark.parametrize("length", [1, 3, 4095, 4096, 4097, 3 * 4096 + 1, 20_000])
def test_multilinear_hashing_is_what_it_says(length: int) -> None:
    """Against a plain computation with integers of any size, over blocks and levels."""
    hashing = DeviceHash()
    words = torch.randint(0, 2**32, (2, length)).to(torch.uint32)
    found = hashing.samples([words.view(torch.int32)], [])
    for row, key in zip(words.tolist(), found, strict=True):
        level = 0
        while True:
            coefficients = hashing._coefficients[torch.device("cpu"), level].tolist()
            blocks = [row[start : start + 4096] for start in range(0, len(row), 4096)]
            row = [
                (c[0] + sum(a * b for a, b in zip(c[1:], block, strict=False))) % 2**64 >> 32
                for block in blocks
                for c in coefficients
            ]
            level += 1
            if len(blocks) == 1:
                break
        assert key == np.array(row, np.uint32).tobytes()


def test_secrets_are_drawn_anew_and_leave_the_random_numbers_of_torch_alone() -> None:
    x = torch.randn(3, 5)
    before = torch.get_rng_state()
    assert keys(x, hashing=DeviceHash()) != keys(x, hashing=DeviceHash())
    assert torch.equal(before, torch.get_rng_state())


def test_tensors_of_a_module_are_told_apart_by_shape_and_dtype() -> None:
    hashing = DeviceHash()
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6, dtype=torch.int32), torch.zeros(())]
    assert len(set(hashing.tensors([*zeros, nn.Parameter(torch.zeros(6))]))) == len(zeros)
    assert hashing.tensors([]) == []
