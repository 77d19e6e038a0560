"""What is measured, and that measuring changes, keeps and waits for nothing."""

from __future__ import annotations

import gc
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

from lightning_freeze.norms.core import (
    Norms,
    ParameterNames,
    StepNorms,
    changed,
    combined,
    gradient_norms,
    gradients,
    measure,
    module_of,
    named_metrics,
    nonfinite,
    read,
    read_steps,
    spread,
    when_gradients_are_ready,
)
from tests.nets import Net, data, moved, same
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
    def test_gives_the_norm_of_each_tensor_whatever_its_shape_and_dtype(self, kinds: list[Any]) -> None:
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
    def test_compressed_sparse_tensors_too(self) -> None:
        assert only({"a": torch.tensor([[0.0, 3.0], [4.0, 0.0]]).to_sparse_csr()}) == {"a": 5.0}

    def test_divides_by_the_scale(self) -> None:
        assert only({"a": torch.tensor([3.0, 4.0])}, scale=torch.tensor(8.0)) == {"a": 0.625}

    def test_of_nothing_is_nothing(self) -> None:
        assert only({}) == {}
        assert read([]) == []

    def test_keeps_no_graph(self) -> None:
        weight = nn.Parameter(torch.ones(3))
        loss = (weight * 2).exp()
        (values,) = measure({"a": weight, "b": loss}).values
        assert not values.requires_grad
        alive = weakref.ref(loss)
        del loss
        gc.collect()
        assert alive() is None

    def test_reads_several_in_order(self) -> None:
        one, two = {"a": torch.ones(1), "b": torch.ones(4).double()}, {"c": torch.ones(9)}
        assert read([measure(one), Norms((), ()), measure(two)]) == [{"a": 1.0, "b": 2.0}, {}, {"c": 3.0}]

    def test_what_has_changed_is_told_for_each_kind_of_tensor(self) -> None:
        tensors = {
            name: torch.ones(4, dtype=dtype)
            for name, dtype in zip("abcdef", [torch.float32, torch.float64, torch.bfloat16] * 2, strict=True)
        }
        tensors["b"][0] = math.inf
        before = measure(tensors)
        for name in "def":
            tensors[name][0] = {"d": math.nan, "e": 0.0, "f": -1.0}[name]
        again = measure(tensors)
        (norms,) = read([changed(before, again)])
        assert list(norms) == ["d", "e"]
        assert math.isnan(norms["d"])
        assert norms["e"] == math.sqrt(3)
        assert read([combined(before, changed(before, measure(tensors)))])[0]["b"] == math.inf
        # Where one has gone, it cannot be told.
        assert read([changed(before, measure({"a": tensors["a"]}))]) == [{"a": 2.0}]


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


class TestGradientNorms:
    def test_agree_with_lightning(self) -> None:
        net = with_gradients()
        ours, theirs = gradient_norms(net, per="parameter"), grad_norm(net, 2)
        assert ours.pop("") == pytest.approx(float(theirs.pop("grad_2.0_norm_total")), rel=1e-6)
        assert {f"grad_2.0_norm/{name}": norm for name, norm in ours.items()} == pytest.approx(
            {name: float(norm) for name, norm in theirs.items()}, rel=1e-6
        )

    def test_agree_with_clipping(self) -> None:
        net = with_gradients()
        ours = gradient_norms(net)
        assert ours == {"": pytest.approx(float(nn.utils.clip_grad_norm_(net.parameters(), 1e9)), rel=1e-6)}

    def test_leave_out_the_frozen_and_the_missing(self) -> None:
        net = with_gradients()
        net.neck.requires_grad_(False)
        net.head.bias.grad = None
        assert gradient_norms(net, per="module").keys() == {"", "backbone", "head"}
        assert not {"neck.weight", "head.bias"} & gradient_norms(net, per="parameter").keys()

    def test_count_a_tied_parameter_once(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        net[1].weight = net[0].weight
        net[0].weight.grad = torch.full((2, 2), 2.0)
        assert gradient_norms(net, per="parameter") == {"": 4.0, "0.weight": 4.0}

    def test_change_nothing(self) -> None:
        net = with_gradients()
        held = {name: p.grad for name, p in net.named_parameters()}
        before = {name: grad.clone() for name, grad in held.items()}
        state = torch.get_rng_state()
        gradient_norms(net, per="module")
        assert all(p.grad is held[name] for name, p in net.named_parameters())
        assert not moved(before, held)
        assert torch.equal(state, torch.get_rng_state())

    def test_without_any_gradient_the_norm_is_zero(self) -> None:
        assert gradient_norms(Net()) == {"": 0.0}


class TestModuleOf:
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
    def test_names_what_tells_parameters_apart(self, names: list[str], modules: list[str]) -> None:
        assert list(module_of(names).values()) == modules

    names = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), unique=True)

    @given(names)
    def test_every_parameter_is_in_one_module_above_it(self, names: list[str]) -> None:
        modules = module_of(names)
        assert list(modules) == names
        assert all(name == module or name.startswith(f"{module}.") for name, module in modules.items())

    @given(names, st.randoms())
    def test_modules_make_up_the_total(self, names: list[str], random: Any) -> None:
        norms = {name: random.expovariate(1.0) for name in names}
        joined = spread(norms, "module", module_of(names))
        assert math.hypot(*norms.values()) == pytest.approx(joined.pop(""))
        assert math.hypot(*norms.values()) == pytest.approx(math.hypot(*joined.values()))


class TestStepNorms:
    def measured(self, *, clip: float = 1e9, what: Any = ("grad", "weight", "update")) -> dict[str, dict[str, float]]:
        net = with_gradients()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        step = StepNorms(dict(net.named_parameters()), what)
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        step.after()
        return step.read()

    def test_measures_weights_before_and_gradients_before_and_after(self) -> None:
        torch.manual_seed(3)
        net = Net()
        weights = {name: exact(p) for name, p in net.named_parameters()}
        torch.manual_seed(3)
        norms = self.measured(clip=1e-3)
        assert norms["weight"] == pytest.approx(weights, rel=1e-6)
        assert spread(norms["grad_clipped"], "total", {})[""] == pytest.approx(1e-3, rel=1e-2)
        assert spread(norms["grad"], "total", {})[""] > 0.1
        halved = {name: 0.5 * norm for name, norm in norms["grad_clipped"].items()}
        assert norms["update"] == pytest.approx(halved, rel=1e-2, abs=1e-7)

    @pytest.mark.parametrize(
        ("what", "quantities"),
        [
            (("grad",), {"grad", "grad_clipped"}),
            (("weight",), {"weight"}),
            (("update",), {"weight", "update"}),
        ],
    )
    def test_measures_no_more_than_asked_for(self, what: Any, quantities: set[str]) -> None:
        assert self.measured(what=what).keys() == quantities

    def test_holds_copies_only_until_the_step_is_over(self) -> None:
        net = with_gradients()
        step = StepNorms(dict(net.named_parameters()))
        (copy, *_), alive = step._before.values(), []
        alive.append(weakref.ref(copy))
        del copy, _
        step.after()
        gc.collect()
        assert alive[0]() is None

    def test_looks_only_once_after_the_step(self) -> None:
        net = with_gradients()
        step = StepNorms(dict(net.named_parameters()))
        step.after()
        measured = dict(step.measured)
        net.head.weight.data += 1
        step.after()
        assert step.measured == measured
        assert set(step.read()["update"].values()) == {0.0}

    def test_nothing_has_a_graph(self) -> None:
        net = with_gradients()
        step = StepNorms(dict(net.named_parameters()))
        with torch.enable_grad():
            step.after()
        assert not any(vector.requires_grad for norms in step.measured.values() for vector in norms.values)

    def test_leaves_the_step_as_it_is(self) -> None:
        torch.manual_seed(3)
        plain = with_gradients()
        torch.optim.SGD(plain.parameters(), lr=0.5).step()
        torch.manual_seed(3)
        observed = with_gradients()
        step = StepNorms(dict(observed.named_parameters()))
        torch.optim.SGD(observed.parameters(), lr=0.5).step()
        step.after()
        assert same(plain.state_dict(), observed.state_dict())

    def test_several_are_read_with_one_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net = with_gradients()
        steps = [StepNorms(dict(net.named_parameters())), StepNorms(dict(net.head.named_parameters()))]
        for step in steps:
            step.after()
        waits = []
        original = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda t: waits.append(t.shape) or original(t))
        monkeypatch.setattr(Tensor, "item", lambda t: pytest.fail("waited for one number"))
        first, second = read_steps(steps)
        assert len(waits) == 1
        assert first["grad"]["head.weight"] == second["grad"]["weight"]

    def test_what_the_optimizer_does_to_gradients_does_not_count(self) -> None:
        net = with_gradients()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
        step = StepNorms(dict(net.named_parameters()))
        hook = when_gradients_are_ready(optimizer, step.ready)
        optimizer.step()
        step.after()
        norms = step.read()
        assert norms["grad_clipped"] == norms["grad"]
        assert norms["grad"] != pytest.approx({name: exact(p.grad) for name, p in net.named_parameters()})
        hook.remove()
        assert not optimizer._optimizer_step_pre_hooks

    @pytest.mark.parametrize("named", [True, False])
    def test_gradients_are_ready_each_time_that_the_closure_is_done(self, named: bool) -> None:
        net, told = Net(), []
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
        when_gradients_are_ready(optimizer, lambda: told.append("ready"))

        def closure() -> Tensor:
            told.append("closure")
            optimizer.zero_grad()
            loss = net(torch.ones(2, 2, 4, 4)).square().sum()
            loss.backward()
            return loss

        assert (optimizer.step(closure=closure) if named else optimizer.step(closure)) > 0
        assert told == ["closure", "ready"] * (len(told) // 2)
        assert len(told) > 2

    def test_unclipped_norms_may_be_of_fewer_parameters(self) -> None:
        net = with_gradients()
        parameters = dict(net.named_parameters())
        unclipped = measure({"head.bias": 2 * net.head.bias.grad})
        expected = {name: exact(p.grad) for name, p in parameters.items()}
        step = StepNorms(parameters, unclipped=unclipped)
        step.after()
        assert step.read()["grad"] == pytest.approx({**expected, "head.bias": 2 * expected["head.bias"]})

    def test_unclipped_norms_may_be_of_more_parameters(self) -> None:
        net = with_gradients()
        unclipped = measure(gradients(dict(net.named_parameters())))
        step = StepNorms({"head.bias": net.head.bias}, unclipped=unclipped)
        step.after()
        assert step.read()["grad"].keys() == {"head.bias"}


def test_only_reading_waits_for_the_device() -> None:
    """A fake device has no numbers: whatever asks for one fails."""
    with FakeTensorMode():
        parameters = {str(i): nn.Parameter(torch.empty(3, 3, device="cuda")) for i in range(3)}
        for name, parameter in parameters.items():
            parameter.grad = torch.empty_like(parameter) if name != "1" else None
        step = StepNorms(parameters, scale=torch.empty((), device="cuda"))
        step.after()
        again = changed(step.measured["grad"], measure(gradients(parameters)))
        measured = [*step.measured.values(), again]
        assert [vector.device.type for norms in measured for vector in norms.values] == ["cuda"] * 5
        with pytest.raises(Exception, match="_local_scalar_dense"):
            step.read()


def test_the_fake_device_notices_who_waits() -> None:
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.empty(3, device="cuda").norm().item()


def test_trained_parameters_are_those_that_train_and_that_the_optimizer_holds() -> None:
    net = Net()
    net.neck.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([*net.neck.parameters(), net.head.bias, nn.Parameter(torch.ones(1))], lr=0.1)
    names = ParameterNames(net)
    assert list(names.trained(optimizer)) == ["neck.weight", "head.bias"]
    net.neck.bias.requires_grad_(True)
    assert list(names.trained(optimizer)) == ["neck.weight", "neck.bias", "head.bias"]


def test_what_joins_module_and_optimizer_later_gets_its_name() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    names = ParameterNames(net)
    net.head = nn.Sequential(net.head, nn.Linear(3, 3))
    assert "head.1.weight" not in names.trained(optimizer)
    optimizer.add_param_group({"params": list(net.head[1].parameters())})
    assert list(names.trained(optimizer)) == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
    assert names.modules["head.1.bias"] == "head"


class TestNamedMetrics:
    norms = {  # noqa: RUF012
        "grad": {"a.weight": 3.0, "b.weight": math.inf},
        "grad_clipped": {"a.weight": 0.3, "b.weight": math.nan},
        "weight": {"a.weight": 2.0, "b.weight": 0.0},
        "update": {"a.weight": 0.5, "b.weight": 0.0},
    }

    def test_per_parameter(self) -> None:
        metrics = named_metrics(self.norms, per="parameter")
        assert metrics["grad/a.weight"] == 3.0
        assert metrics["grad"] == math.inf
        assert math.isnan(metrics["grad_clipped"])
        assert metrics["nonfinite_grads"] == 1.0
        assert metrics["update_ratio"] == 0.25
        assert metrics["update_ratio/b.weight"] == 0.0

    def test_an_update_of_a_weight_that_is_zero_is_infinite(self) -> None:
        norms = {"weight": {"bias": 0.0}, "update": {"bias": 1.0}}
        assert named_metrics(norms, what=("update",)) == {"update": 1.0, "update_ratio": math.inf}

    def test_names_what_is_not_finite(self) -> None:
        assert nonfinite({"a": 1.0, "b": math.inf, "c": math.nan}) == ["b", "c"]

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_one_bad_value_is_enough(self, bad: float, dtype: torch.dtype) -> None:
        tensor = torch.ones(100, dtype=dtype)
        tensor[57] = bad
        assert nonfinite(only({"good": torch.ones(3), "bad": tensor})) == ["bad"]
