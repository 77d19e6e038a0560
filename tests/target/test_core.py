from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze.target.core import hard_copy, pair_up, polyak_average, shared_parameters
from tests.followers import network
from tests.nets import same, snapshot

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64]


def filled(module: nn.Module, seed: int) -> nn.Module:
    """Set every tensor to other values, counters too."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randint(-999, 999, tensor.shape, generator=generator) / 64)
    return module


def test_pair_up_pairs_every_tensor_of_the_state_dict_in_order() -> None:
    source, target = network(), network()
    names = [pair.name for pair in pair_up(source, target)]
    assert sorted(names) == sorted(source.state_dict())
    assert [pair.name for pair in pair_up(source, target, buffers=False)] == [n for n, _ in source.named_parameters()]
    for pair in pair_up(source, target):
        theirs, mine = pair.tensors
        assert theirs.data_ptr() == source.state_dict()[pair.name].data_ptr()
        assert mine.data_ptr() == target.state_dict()[pair.name].data_ptr()


def test_hard_copy_copies_what_load_state_dict_does() -> None:
    source, target = filled(network(), 1), filled(network(), 2)
    tensors = dict(target.named_parameters())
    hard_copy(pair_up(source, target))
    assert same(dict(source.state_dict()), dict(target.state_dict()))
    assert all(p is tensors[name] for name, p in target.named_parameters())  # in place


def test_buffers_stay_if_only_parameters_follow() -> None:
    source, target = filled(network(), 1), filled(network(), 2)
    before = snapshot(target)
    pairs = pair_up(source, target, buffers=False)
    hard_copy(pairs)
    polyak_average(pairs, 0.5)
    parameters = {name for name, _ in target.named_parameters()}
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, (source.state_dict() if name in parameters else before)[name])


@settings(max_examples=40, deadline=None)
@given(tau=st.floats(1e-6, 1.0), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_polyak_average_is_a_lerp_of_each_tensor(tau: float, seed: int, dtype: torch.dtype) -> None:
    source, target = (filled(network().to(torch.float64), seed + other) for other in (0, 1000))
    if dtype.is_complex:
        source, target = (nn.ParameterList([p.detach().to(dtype) for p in m.parameters()]) for m in (source, target))
    else:
        source, target = source.to(dtype), target.to(dtype)
    before, towards = snapshot(target), snapshot(source)
    polyak_average(pair_up(source, target), tau)
    assert same(snapshot(source), towards)
    for name, tensor in target.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, towards[name])
        else:
            assert torch.equal(tensor, torch.lerp(before[name], towards[name], tau))
            assert torch.allclose(tensor, before[name] + tau * (towards[name] - before[name]), rtol=0.02, atol=0.1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), tau=st.floats(1e-6, 1.0))
def test_polyak_average_copies_with_tau_one_and_keeps_equal_tensors(seed: int, tau: float) -> None:
    source, target = filled(network(), seed), filled(network(), seed + 1000)
    pairs = pair_up(source, target)
    polyak_average(pairs, 1)
    assert same(snapshot(source), snapshot(target))
    polyak_average(pairs, tau)
    assert same(snapshot(source), snapshot(target))


def test_averages_of_trainable_tensors_leave_no_graph() -> None:
    source, target = nn.Linear(3, 1), nn.Linear(3, 1)
    hard_copy(pair_up(source, target))
    polyak_average(pair_up(source, target), 0.5)
    assert target.weight.requires_grad
    assert target.weight.is_leaf
    assert source.weight.grad_fn is None


def test_buffer_that_user_code_assigns_anew_is_followed() -> None:
    source, target = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    pairs = pair_up(source, target)
    source.running_mean = torch.full((2,), 7.0)
    target.running_mean = torch.zeros(2)
    hard_copy(pairs)
    assert target.running_mean.tolist() == [7.0, 7.0]


class WithConstant(nn.Linear):
    def __init__(self, value: float) -> None:
        super().__init__(2, 2)
        self.register_buffer("constant", torch.tensor(value), persistent=False)
        self.register_buffer("missing", None)


def test_buffers_outside_the_state_dict_stay() -> None:
    source, target = WithConstant(1.0), WithConstant(2.0)
    pairs = pair_up(source, target)
    hard_copy(pairs)
    assert [pair.name for pair in pairs] == ["weight", "bias"]
    assert target.constant.item() == 2.0


def test_tied_parameters_are_averaged_once() -> None:
    source = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    source[1].weight = source[0].weight
    target = copy.deepcopy(source)
    nn.init.zeros_(target[0].weight)
    nn.init.ones_(source[0].weight)
    pairs = pair_up(source, target)
    assert [pair.name for pair in pairs] == ["0.weight", "0.bias", "1.bias"]
    polyak_average(pairs, 0.25)
    assert target[1].weight.unique().tolist() == [0.25]


def test_compiled_source_pairs_with_a_plain_target() -> None:
    source = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(source, backend="eager")
    target = nn.Sequential(nn.Linear(2, 2))
    hard_copy(pair_up(compiled, target))
    assert torch.equal(source[0].weight, target[0].weight)


def test_error_names_what_differs_between_architectures() -> None:
    source = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.float64))
    target = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="does not have the architecture") as caught:
        pair_up(source, target, names=("source 'a'", "target 'b'"))
    assert str(caught.value).splitlines() == [
        "The target 'b' does not have the architecture of the source 'a'.",
        "Only in source 'a': 1.running_mean, 1.running_var, 1.num_batches_tracked.",
        "Different: 0.weight is (3, 4) float32 in source 'a', (3, 5) float32 in target 'b'; "
        "1.weight is (3,) float32 in source 'a', (3, 3) float32 in target 'b'; "
        "2.weight is (2, 3) float64 in source 'a', (2, 3) float32 in target 'b'; "
        "2.bias is (2,) float64 in source 'a', (2,) float32 in target 'b'.",
    ]
    with pytest.raises(
        ValueError, match=r"Only in target: 5\.weight, 5\.bias, 6\.weight, 6\.bias, 7\.weight and 5 more"
    ):
        pair_up(
            nn.Sequential(*[nn.Linear(1, 1) for _ in range(5)]), nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)])
        )


def test_different_buffers_are_refused_only_if_they_follow() -> None:
    source, target = nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)
    with pytest.raises(ValueError, match="Only in source: running_mean"):
        pair_up(source, target)
    assert len(pair_up(source, target, buffers=False)) == 2


def test_modules_without_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        pair_up(nn.ReLU(), nn.ReLU())


@pytest.mark.parametrize("which", [0, 1])
def test_lazy_tensors_are_refused(which: int) -> None:
    nets = [nn.Linear(2, 3), nn.Linear(2, 3)]
    nets[which] = nn.LazyLinear(3)
    lazy = ("source", "target")[which]
    message = rf"The {lazy} has lazy tensors.* first forward: weight, bias\. Run a batch through it in __init__"
    with pytest.raises(ValueError, match=message):
        pair_up(*nets)


def test_target_that_shares_memory_with_the_source_is_refused() -> None:
    source, target = network(), network()
    target[5] = source[5]
    with pytest.raises(ValueError, match=r"shares parameters with the source: 5\.weight, 5\.bias.*deepcopy"):
        pair_up(source, target)
    target = network()
    target.load_state_dict(source.state_dict(), assign=True)  # other parameters, the same memory
    assert len(shared_parameters(target, source.parameters())) == 6
    with pytest.raises(ValueError, match="and 1 more"):
        pair_up(source, target)


def test_parameters_on_the_meta_device_count_as_shared_by_identity() -> None:
    with torch.device("meta"):
        source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    assert shared_parameters(target, source.parameters()) == []
    assert shared_parameters(source, source.parameters()) == ["weight", "bias"]


@pytest.mark.parametrize("tau", [-1, -0.1, 1.1, float("nan"), float("inf")])
def test_tau_out_of_range_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=r"polyak_average\(tau=.*\[0, 1\]"):
        polyak_average(pair_up(nn.Linear(1, 1), nn.Linear(1, 1)), tau)


@pytest.mark.parametrize("tau", ["0.1", None, True, [0.1]])
def test_tau_that_is_no_number_is_refused(tau: object) -> None:
    with pytest.raises(TypeError, match=r"polyak_average\(tau="):
        polyak_average(pair_up(nn.Linear(1, 1), nn.Linear(1, 1)), tau)  # type: ignore[arg-type]
