"""What is measured, and that measuring changes, keeps and waits for nothing."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_freeze.norms.core import gradients, measure, metric_places, nonfinite, read, spread
from lightning_freeze.norms.step import BackwardNorms, StepNorms, named_metrics
from lightning_freeze.selectors import named_unique_parameters
from tests.nets import Net, data, moved
from tests.replicas import on_two_processes

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def with_gradients(net: Net | None = None) -> Net:
    net = net or Net()
    images, targets = data(8).tensors
    nn.functional.cross_entropy(net(images), targets).backward()
    return net


def exact(tensor: Tensor) -> float:
    return math.sqrt(math.fsum(abs(x) ** 2 for x in tensor.detach().to(torch.complex128).flatten().tolist()))


def only(tensors: dict[str, Tensor], **options: Any) -> dict[str, float]:
    return read([measure(tensors, **options)])[0]


class TestMeasure:
    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.tuples(SHAPES, st.sampled_from(FLOATING), st.integers(0, 2**30)), max_size=6))
    def test_norm_is_right_for_every_shape_and_dtype(self, kinds: list[Any]) -> None:
        tensors = {}
        for index, (shape, dtype, seed) in enumerate(kinds):
            generator = torch.Generator().manual_seed(seed)
            tensors[str(index)] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        norms = only(tensors)
        assert norms.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert norms[name] == pytest.approx(exact(tensor), rel=1e-6)

    def test_half_precision_is_not_rounded_to_half_precision(self) -> None:
        tensor = torch.full((1001,), 1.0, dtype=torch.bfloat16)
        assert only({"a": tensor})["a"] == pytest.approx(math.sqrt(1001), rel=1e-6)

    def test_half_precision_does_not_overflow(self) -> None:
        assert only({"a": torch.full((4,), 60_000.0, dtype=torch.float16)}) == {"a": 120_000.0}

    def test_entries_of_a_sparse_tensor_add_up_and_it_stays_as_it_is(self) -> None:
        sparse = torch.sparse_coo_tensor(
            torch.tensor([[0, 2, 0]]), torch.tensor([[1.0], [4.0], [2.0]]), (5, 1), check_invariants=True
        )
        assert only({"a": sparse}) == {"a": 5.0}
        assert not sparse.is_coalesced()
        assert sparse._nnz() == 3

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
    def test_norm_of_compressed_sparse_tensors_is_right(self) -> None:
        assert only({"a": torch.tensor([[0.0, 3.0], [4.0, 0.0]]).to_sparse_csr()}) == {"a": 5.0}

    def test_norm_is_divided_by_the_scale(self) -> None:
        assert only({"a": torch.tensor([3.0, 4.0])}, scale=torch.tensor(8.0)) == {"a": 0.625}

    def test_no_tensors_have_no_norms(self) -> None:
        assert only({}) == {}
        assert read([]) == []

    def test_norm_keeps_no_graph(self) -> None:
        weight = nn.Parameter(torch.ones(3))
        norms = measure({"a": weight, "b": (weight * 2).exp()})
        assert not any(norm.requires_grad for norm in norms.values())

    def test_read_keeps_the_order_of_several(self) -> None:
        one, two = {"a": torch.ones(1), "b": torch.ones(4).double()}, {"c": torch.ones(9)}
        assert read([measure(one), {}, measure(two)]) == [{"a": 1.0, "b": 2.0}, {}, {"c": 3.0}]


def partial_total() -> dict[str, float]:
    """Norms of DTensors on two processes, and of the same tensors whole."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = {str(rows): torch.randn(rows, 3) for rows in (1, 2, 5)}  # 1: an empty shard, 5: uneven ones
    sharded = {f"shard {name}": distribute_tensor(t, mesh, [Shard(0)]) for name, t in whole.items()}
    copied = {f"copy {name}": distribute_tensor(t, mesh, [Replicate()]) for name, t in whole.items()}
    summands = {f"sum {name}": DTensor.from_local(t / 2, mesh, [Partial()]) for name, t in whole.items()}
    plain = {f"plain {name}": t for name, t in whole.items()}
    before = {name: t.to_local().clone() for name, t in sharded.items()}
    norms = only({**sharded, **plain, **copied, **summands, "bf16": sharded["shard 5"].bfloat16()})
    assert all(torch.equal(before[name], sharded[name].to_local()) for name in before)
    return norms


def test_a_dtensor_counts_whole_on_every_process(tmp_path: Path) -> None:
    first, second = on_two_processes(partial_total, tmp_path)
    assert first == second
    for name, norm in first.items():
        if name != "bf16":
            assert norm == pytest.approx(first[f"plain {name.split()[1]}"], rel=1e-6)
    assert first["bf16"] == pytest.approx(first["plain 5"], rel=1e-2)


def gradient_norms(net: nn.Module) -> dict[str, float]:
    return only(gradients(named_unique_parameters(net)))


class TestGradients:
    def test_gradient_norm_agrees_with_lightning_and_clipping(self) -> None:
        net = with_gradients()
        net.neck.weight.grad = None
        ours, theirs = gradient_norms(net), grad_norm(net, 2)
        assert math.hypot(*ours.values()) == pytest.approx(float(theirs.pop("grad_2.0_norm_total")), rel=1e-6)
        assert {f"grad_2.0_norm/{name}": norm for name, norm in ours.items()} == pytest.approx(
            {name: float(norm) for name, norm in theirs.items()}, rel=1e-6
        )
        clipped = nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        assert math.hypot(*ours.values()) == pytest.approx(float(clipped), rel=1e-6)

    def test_gradient_of_a_tied_parameter_counts_once(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        net[1].weight = net[0].weight
        net[0].weight.grad = torch.full((2, 2), 2.0)
        assert gradient_norms(net) == {"0.weight": 4.0}

    def test_measuring_changes_no_gradient_and_draws_no_random_number(self) -> None:
        net = with_gradients()
        held = {name: p.grad for name, p in net.named_parameters()}
        before = {name: grad.clone() for name, grad in held.items()}
        state = torch.get_rng_state()
        gradient_norms(net)
        assert all(p.grad is held[name] for name, p in net.named_parameters())
        assert not moved(before, held)
        assert torch.equal(state, torch.get_rng_state())


class TestMetricPlaces:
    @pytest.mark.parametrize(
        ("names", "modules"),
        [
            (["backbone.0.weight", "head.weight", "scale"], ["backbone", "head", "scale"]),
            (["model.body.0.weight", "model.body.0.bias", "model.head.weight"], ["model.body"] * 2 + ["model.head"]),
            (["net.model.a.weight", "net.model.b.weight"], ["net.model.a", "net.model.b"]),
            (["model.a.weight", "model.scale"], ["model.a", "model.scale"]),
            (["head.weight", "head.bias"], ["head", "head"]),
            (["model.head.weight", "model.head.bias"], ["model.head", "model.head"]),
            (["weight", "bias"], ["weight", "bias"]),
            ([], []),
        ],
    )
    def test_places_are_the_first_modules_that_differ(self, names: list[str], modules: list[str]) -> None:
        assert list(metric_places(names, "module").values()) == modules

    names = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), unique=True)

    @settings(max_examples=50, deadline=None)
    @given(names, st.randoms(use_true_random=False))
    def test_places_partition_parameters_and_add_up_to_the_total(self, names: list[str], random: Any) -> None:
        modules = metric_places(names, "module")
        assert list(modules) == names
        assert all(name == module or name.startswith(f"{module}.") for name, module in modules.items())
        norms = {name: random.expovariate(1.0) for name in names}
        joined = spread(norms, modules)
        assert math.hypot(*norms.values()) == pytest.approx(joined.pop(""))
        assert math.hypot(*norms.values()) == pytest.approx(math.hypot(*joined.values()))


class TestBackwardNorms:
    def test_backward_norm_stays_until_a_backward_changes_the_gradient(self) -> None:
        kinds = dict(zip("abcdef", [torch.float32, torch.float64, torch.bfloat16] * 2, strict=True))
        parameters = {name: nn.Parameter(torch.ones(4, dtype=dtype)) for name, dtype in kinds.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.ones_like(parameter) if name != "c" else None
        parameters["b"].grad[0] = math.inf
        backwards = BackwardNorms()
        backwards.before(parameters)
        backwards.after(parameters)
        for name in "abde":
            parameters[name].grad.mul_(0.5)  # clipped
        backwards.before(parameters)
        parameters["c"].grad = torch.ones_like(parameters["c"])
        parameters["d"].grad[0] = math.nan
        parameters["e"].grad[0] = 0.0
        backwards.after(parameters)
        (norms,) = read([backwards.norms])
        assert math.isnan(norms.pop("d"))
        assert norms == {"a": 2.0, "b": math.inf, "c": 2.0, "e": math.sqrt(0.75), "f": 2.0}


class TestStepNorms:
    @pytest.mark.parametrize(
        ("what", "quantities"),
        [
            (("grad",), {"grad", "grad_clipped"}),
            (("weight",), {"weight"}),
            (("update",), {"weight", "update"}),
        ],
    )
    def test_step_measures_only_the_quantities_in_what(self, what: Any, quantities: set[str]) -> None:
        net = with_gradients()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        step = StepNorms(optimizer, what)
        step.begins(dict(net.named_parameters()))
        optimizer.step()
        step.close()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert step.norms.keys() == quantities

    def test_step_frees_its_copies_of_the_weights(self) -> None:
        net = with_gradients()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        step = StepNorms(optimizer)
        step.begins(dict(net.named_parameters()))
        copy = weakref.ref(next(iter(step._copies.values())))
        optimizer.step()
        assert copy() is None

    def test_changes_after_the_step_are_no_update(self) -> None:
        net = with_gradients()
        step = StepNorms(torch.optim.SGD(net.parameters(), lr=0.5))
        step.begins(dict(net.named_parameters()))
        step.end()
        measured = dict(step.norms)
        net.head.weight.data += 1
        step.end()
        assert step.norms == measured
        assert {float(norm) for norm in measured["update"].values()} == {0.0}
        assert not any(norm.requires_grad for norms in measured.values() for norm in norms.values())

    @pytest.mark.parametrize("named", [True, False])
    def test_gradients_are_measured_after_the_first_closure(self, named: bool) -> None:
        net, losses = Net(), []
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
        step, first = StepNorms(optimizer, ("grad",)), {}

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses.append(net(torch.ones(2, 2, 4, 4)).square().sum())
            losses[-1].backward()
            if not first:
                step.begins(dict(net.named_parameters()))
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                first.update(gradient_norms(net))
            return losses[-1]

        assert (optimizer.step(closure=closure) if named else optimizer.step(closure)) == losses[0]
        assert len(losses) > 1
        assert read([step.norms["grad_clipped"]]) == [first]

    def test_backward_norms_of_other_parameters_are_ignored(self) -> None:
        net = with_gradients()
        backwards = BackwardNorms()
        backwards.after({"head.bias": net.head.bias, "elsewhere": net.neck.bias})
        net.head.bias.grad.mul_(0.5)
        step = StepNorms(torch.optim.SGD(net.head.parameters(), lr=0.1))
        step.begins(dict(net.named_parameters()), None, backwards)
        step.end()
        grad, clipped = read([step.norms["grad"], step.norms["grad_clipped"]])
        assert grad == {**clipped, "head.bias": 2 * clipped["head.bias"]}
        assert grad.keys() == {"head.weight", "head.bias"}


def test_only_reading_waits_for_the_device() -> None:
    """A fake device has no numbers: whatever asks for one fails."""
    with FakeTensorMode():
        parameters = {str(i): nn.Parameter(torch.empty(3, 3, device="cuda")) for i in range(3)}
        for name, parameter in parameters.items():
            parameter.grad = torch.empty_like(parameter) if name != "1" else None
        scale, backwards = torch.empty((), device="cuda"), BackwardNorms()
        for _ in range(2):
            backwards.before(parameters, scale)
            backwards.after(parameters, scale)
        step = StepNorms(torch.optim.SGD(parameters.values(), lr=0.1))
        step.begins(parameters, scale, backwards)
        step.end()
        norms = [norm for measured in step.norms.values() for norm in measured.values()]
        assert {norm.device.type for norm in norms} == {"cuda"}
        assert len(norms) == 2 + 2 + 3 + 3
        with pytest.raises(Exception, match="_local_scalar_dense"):
            read([step.norms["grad"]])


class TestNamedMetrics:
    norms = {  # noqa: RUF012
        "grad": {"a.weight": 3.0, "b.weight": math.inf},
        "grad_clipped": {"a.weight": 0.3, "b.weight": math.nan},
        "weight": {"a.weight": 2.0, "b.weight": 0.0},
        "update": {"a.weight": 0.5, "b.weight": 0.0},
    }

    def test_metrics_per_parameter_have_their_names(self) -> None:
        metrics = named_metrics(self.norms, ("grad", "update"), {name: name for name in self.norms["grad"]})
        assert metrics["grad/a.weight"] == 3.0
        assert metrics["grad"] == math.inf
        assert math.isnan(metrics["grad_clipped"])
        assert metrics["nonfinite_grads"] == 1.0
        assert metrics["update_ratio"] == 0.25
        assert metrics["update_ratio/b.weight"] == 0.0
        assert not any(name.startswith("weight") for name in metrics)

    def test_update_ratio_of_a_zero_weight_is_infinite(self) -> None:
        norms = {"weight": {"bias": 0.0}, "update": {"bias": 1.0}}
        assert named_metrics(norms, ("update",), {}) == {"update": 1.0, "update_ratio": math.inf}

    def test_nonfinite_names_infinite_and_nan_norms(self) -> None:
        assert nonfinite({"a": 1.0, "b": math.inf, "c": math.nan}) == ["b", "c"]

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_one_bad_value_makes_a_norm_nonfinite(self, bad: float, dtype: torch.dtype) -> None:
        tensor = torch.ones(100, dtype=dtype)
        tensor[57] = bad
        assert nonfinite(only({"good": torch.ones(3), "bad": tensor})) == ["bad"]
