from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LambdaLR

from lightning_freeze import Ramp
from lightning_freeze.freezing.step_view import factor_at
from lightning_freeze.freezing.trial import state_bytes, try_adoption, try_frozen
from tests.nets import adamw, members, needs_muon, same, sgd
from tests.phased import Phased

MAKE: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1),
}
RATES: dict[str, Any] = {
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "chained": lambda o: ChainedScheduler([LambdaLR(o, lambda step: 0.95**step), ExponentialLR(o, 0.9)]),
}


class Reference:
    """One optimizer for each parameter, so that nothing but the phase decides what steps at which rate."""

    def __init__(self, make: Any, rate: Any, groups: list[list[int]], lrs: list[float], params: list[Any]) -> None:
        self.params = params
        self.optimizers, self.rates = {}, {}
        for number, group in enumerate(groups):
            for index in group:
                lr = lrs[number] if number < len(lrs) else lrs[0]  # what is adopted is in the first group
                self.optimizers[index] = make([{"params": [params[index]], "lr": lr}])
                self.rates[index] = lr
        # The scheduler drives an optimizer of its own for each rate.
        self.drivers = {lr: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr) for lr in self.rates.values()}
        self.schedulers = [rate(driver) for driver in self.drivers.values()]

    def step(self, trains: set[int], scales: dict[int, float]) -> None:
        for index in trains:
            optimizer = self.optimizers[index]
            lr = self.drivers[self.rates[index]].param_groups[0]["lr"]
            factor = scales.get(index, 1.0)
            optimizer.param_groups[0]["lr"] = lr if factor == 1.0 else lr * factor
            optimizer.step()
        for driver, scheduler in zip(self.drivers.values(), self.schedulers, strict=True):
            driver.step()
            scheduler.step()

    def freeze(self, frozen: set[int], policy: str) -> None:
        for index in frozen:
            if policy == "drop":
                self.optimizers[index].state.clear()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_weights_equal_those_of_one_optimizer_a_parameter_to_the_bit(data: st.DataObject) -> None:
    """Any groups, adopted ones too, any phases with any scales, saved and loaded anywhere: the weights, to the bit.

    At any time anybody can look, groups and checkpoint are those that the user made.
    """
    draw = data.draw
    count = draw(st.integers(2, 6))
    places = [0, *draw(st.lists(st.integers(0, 3), min_size=count - 1, max_size=count - 1))]
    used = sorted(set(places) - {3})
    groups = [[index for index, place in enumerate(places) if place == number] for number in used]
    adopted = [index for index, place in enumerate(places) if place == 3]
    lrs = [0.01 * 2**number for number in range(len(used))]
    phases = draw(
        st.lists(
            st.tuples(
                st.sets(st.integers(0, count - 1), min_size=1),
                st.dictionaries(st.integers(0, count - 1), st.sampled_from([0.1, 0.3, 2.0])),
            ),
            min_size=1,
            max_size=4,
        )
    )
    make, rate = MAKE[draw(st.sampled_from(sorted(MAKE)))], RATES[draw(st.sampled_from(sorted(RATES)))]
    policy, named = draw(st.sampled_from(["keep", "drop", "offload"])), draw(st.booleans())

    def build(weights: list[torch.Tensor]) -> tuple[list[Any], Any, Any, Phased]:
        params = [nn.Parameter(weight.clone()) for weight in weights]
        given = [
            {"params": [(str(i), params[i]) if named else params[i] for i in group], "lr": lr}
            for group, lr in zip(groups, lrs, strict=True)
        ]
        optimizer = make(given)
        scheduler = rate(optimizer)
        phased = Phased(
            optimizer,
            scales=[{id(params[i]): factor for i, factor in scales.items()} for _, scales in phases],
            adopt={str(i): params[i] for i in adopted},
            optimizer_state=policy,
        )
        stack.callback(phased.release)
        return params, optimizer, scheduler, phased

    def look(optimizer: Any, params: list[Any]) -> None:
        whole = [[*groups[0], *adopted], *groups[1:]]
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
            [id(params[i]) for i in group] for group in whole
        ]
        if named:
            assert [group["param_names"] for group in optimizer.param_groups] == [[str(i) for i in g] for g in whole]

    with ExitStack() as stack:  # an example may end early
        start = [torch.randn(2) for _ in range(count)]
        params, optimizer, scheduler, phased = build(start)
        reference = Reference(
            make, rate, [*groups, *([adopted] if adopted else [])], lrs, [nn.Parameter(w.clone()) for w in start]
        )
        for number in draw(st.permutations(range(len(phases)))):
            trains, scales = phases[number]
            phased.apply(number, {id(params[i]) for i in trains})
            reference.freeze(set(range(count)) - trains, policy)
            for _ in range(draw(st.integers(1, 3))):
                if draw(st.booleans()):  # stop here and go on in another process
                    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), phased.state()))
                    assert [len(group["params"]) for group in saved[0]["param_groups"]] == [len(g) for g in groups]
                    phased.release()
                    params, optimizer, scheduler, phased = build([p.detach() for p in params])
                    phased.apply(number, {id(params[i]) for i in trains})
                    optimizer.load_state_dict(saved[0])
                    scheduler.load_state_dict(saved[1])
                    phased.load_state(saved[2])
                    phased.apply(number, {id(params[i]) for i in trains})
                look(optimizer, params)
                for index in range(count):
                    gradient = torch.randn(2) if index in trains else None
                    params[index].grad = None if gradient is None else gradient.clone()
                    reference.params[index].grad = gradient
                optimizer.step()
                look(optimizer, params)
                scheduler.step()
                reference.step(trains, scales)
                assert same(list(params), list(reference.params))
        phased.release()
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(group) for group in groups]
        optimizer.step()
        scheduler.step()
        assert not any(vars(optimizer)[name] for name in vars(optimizer) if name.endswith("_hooks"))


@pytest.fixture
def two() -> Iterator[tuple[nn.Sequential, Any]]:
    """Two layers, and what makes an optimizer of both follow phases until the test ends."""
    made: list[Phased] = []

    def phased(optimizer: torch.optim.Optimizer, **options: Any) -> Phased:
        made.append(Phased(optimizer, **options))
        return made[-1]

    yield nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)), phased
    for one in made:
        one.release()


def test_option_that_the_user_changes_reaches_scaled_parameters(two: Any) -> None:
    """What is written into the user's group reaches the scaled ones at the next step."""
    net, phased = two
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    phased(optimizer, scales=[{id(net[1].weight): 0.1}])
    optimizer.param_groups[0].update(lr=0.5, momentum=0.0)
    net(torch.ones(1, 1)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    grads = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    for p, old, grad, lr in zip(net.parameters(), before, grads, (0.5, 0.05), strict=True):
        assert torch.equal(p, old - lr * grad)


def test_rate_that_is_a_tensor_stays_the_same_tensor(two: Any) -> None:
    """Captured graphs hold on to the tensor; a scaled part's is one of its own, written in place."""
    net, phased = two
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    shown = []
    optimizer.register_step_post_hook(lambda *_: shown.append([group["lr"] for group in optimizer.param_groups]))
    view = phased(optimizer, scales=[{id(net[1].weight): 0.5}, {id(net[1].weight): 2.0}])
    optimizer.register_step_pre_hook(lambda *_: shown.append([group["lr"] for group in optimizer.param_groups]))
    optimizer.step()
    view.apply(1, {id(p) for p in net.parameters()})
    rate.fill_(0.3)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    parts = [rates for rates in shown if len(rates) == 2]
    assert len({id(rates[1]) for rates in parts}) == 1
    assert float(parts[-1][1]) == pytest.approx(0.6)


def test_closure_sees_the_groups_of_the_user(two: Any) -> None:
    """It may clip, log rates, save a checkpoint, or raise."""
    net, phased = two
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    phased(optimizer, scales=[{id(net[1].weight): 0.1}])
    seen = []

    def closure() -> Any:
        seen.append((len(optimizer.param_groups), len(optimizer.state_dict()["param_groups"])))
        loss = net(torch.ones(1, 1)).sum()
        loss.backward()
        return loss

    def raises() -> Any:
        raise RuntimeError("in the closure")

    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(closure)
    optimizer.step(closure=closure)
    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(raises)
    assert seen == [(1, 1), (1, 1)]
    assert len(optimizer.param_groups) == 1
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize(("options", "said"), [({"lr": None}, "None"), ({"rate": 0.1}, "not there")])
def test_scale_without_a_rate_is_refused(options: dict[str, Any], said: str, two: Any) -> None:
    """Adoption alone takes such options over as they are."""
    net, phased = two
    optimizer = torch.optim.Optimizer(net[0].parameters(), options)
    with pytest.raises(ValueError, match=f"scales lr, which is {said} in group 0 of Optimizer. Give"):
        phased(optimizer, scales=[{id(net[0].weight): 0.5}])
    assert members(optimizer) == [id(net[0].weight)]
    phased(optimizer, scales=[{id(net[0].weight): 1.0}], adopt={"1.weight": net[1].weight})
    assert members(optimizer) == [id(p) for p in net.parameters()]


def test_group_that_the_user_adds_in_mid_fit_is_stepped_and_kept(two: Any) -> None:
    net, phased = two
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    homes = phased(optimizer, scales=[{id(net[0].weight): 0.5}])
    optimizer.add_param_group({"params": list(net[1].parameters())})
    net(torch.ones(1, 1)).sum().backward()
    before, grads = [p.detach().clone() for p in net.parameters()], [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    for p, old, grad, rate in zip(net.parameters(), before, grads, (0.05, 0.1), strict=True):
        assert torch.equal(p, old - rate * grad)
    homes.release()
    assert members(optimizer) == [id(p) for p in net.parameters()]


class Halves(torch.optim.SGD):
    """Sets its rates itself, and notes one as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["scheduled_lr"] = group["lr"]
            group["lr"] = group["lr"] / 2
        return super().step(closure)


def test_a_rate_of_zero_leaves_the_users_rate_alone(two: Any) -> None:
    """A step's own change of a rate goes back divided by the scale, which may be 0 where a ramp begins."""
    net, phased = two
    optimizer = Halves(net.parameters(), lr=0.1)
    homes = phased(optimizer, scales=[{id(net[0].weight): Ramp(0.0), id(net[1].weight): 0.5}])
    for moves, rate in ((0.0, 0.1), (0.5, 0.05)):
        homes.view.begin(0, lambda scale, moves=moves: factor_at(scale, moves))
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate


class OneRate(torch.optim.SGD):
    """Refuses two learning rates, as Prodigy and D-Adaptation do, in its step."""

    def step(self, closure: Any = None) -> Any:
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("one rate only")
        return super().step(closure)


@needs_muon
def test_what_the_constructor_would_refuse_is_found_before(two: Any) -> None:
    net, phased = two
    muon = torch.optim.Muon([net[0].weight])
    bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"does not take: 1\.bias\. It says: Muon only supports"):
        phased(muon, adopt={"1.bias": bias})
    assert members(muon) == [id(net[0].weight)]


def test_what_the_first_step_would_refuse_is_found_before(two: Any) -> None:
    net, phased = two
    with pytest.raises(ValueError, match="which OneRate refuses: one rate only Leave lr_scale out"):
        phased(OneRate(net.parameters(), lr=0.1), scales=[{}, {id(net[0].weight): 0.1}])
    phased(OneRate(net.parameters(), lr=0.1))
    table, other, dense = nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2)
    adam = torch.optim.SparseAdam(table.parameters())
    sparse = [id(table.weight), id(other.weight)]
    with pytest.raises(ValueError, match=r"does not take: w\. It says: SparseAdam does not"):
        try_adoption(adam, {"w": dense.weight}, sparse)
    assert try_adoption(adam, {"w": other.weight}, sparse) == {}


@pytest.mark.parametrize("make", [adamw, sgd])
def test_copy_of_an_optimizer_in_a_fit_saves_and_steps_alone(make: Any, two: Any) -> None:
    net, phased = two
    optimizer = make(net[0].parameters())
    phased(optimizer, adopt={"1.weight": net[1].weight}, scales=[{id(net[0].weight): 0.1}])
    twin = copy.deepcopy(optimizer)
    twin.state_dict()
    twin.step()
    assert len(optimizer.param_groups[0]["params"]) == 2


class Converting(torch.optim.AdamW):
    """Loads through torch, and then looks at what was loaded, as timm's Adafactor does."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for p, number in zip(group["params"], saved["params"], strict=False):
                if number in state_dict["state"]:
                    self.state[p]["exp_avg"] = state_dict["state"][number]["exp_avg"].clone()


class Apart(torch.optim.AdamW):
    """Saves in a way of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"state": dict(self.state), "param_groups": self.param_groups}


def test_an_optimizer_that_loads_through_torch_takes_parameters_in() -> None:
    """Its state is the user's alone, and what it took in goes on to the bit."""
    found = []
    for stop in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
        optimizer = Converting(net[2].parameters())
        phased = Phased(optimizer, adopt={"0.weight": net[0].weight})
        for step in range(4):
            if stop and step == 2:
                saved, own = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(phased.state())
                assert [len(group["params"]) for group in saved["param_groups"]] == [1]
                optimizer = Converting(net[2].parameters())
                phased.release()
                phased = Phased(optimizer, adopt={"0.weight": net[0].weight})
                optimizer.load_state_dict(saved)
                phased.load_state(own)
            optimizer.zero_grad()
            net(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        phased.release()
        found.append([p.detach() for p in net.parameters()])
    assert same(*found)


def test_an_optimizer_that_saves_past_torch_takes_nothing_in() -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"Apart was not given: bias\. It saves in a way of its own"):
        Phased(Apart([net.weight]), adopt={"bias": net.bias})


class LooksLate(torch.optim.SGD):
    """Has nothing to say before it is given a gradient that is not zero, as D-Adaptation's SGD."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        moving = any(p.grad.any() for group in self.param_groups for p in group["params"] if p.grad is not None)
        if moving and len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("one rate for all")
        return super().step(closure)


def test_rates_that_are_refused_only_with_a_gradient_are_refused_at_the_start() -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="LooksLate refuses: one rate for all"):
        Phased(LooksLate(net.parameters()), scales=[{id(net.bias): 0.1}])


class PerGroup(torch.optim.SGD):
    """Steps the groups that it was built with, as AdaBound, which has a list of its own beside them."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, rate in zip(self.param_groups, self.base_lrs, strict=False):
            for p in group["params"]:
                p.sub_(p.grad, alpha=rate)


def test_scales_are_refused_by_an_optimizer_that_would_leave_a_part_out() -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="PerGroup refuses: it steps only as many groups as it was built with"):
        Phased(PerGroup(net.parameters()), scales=[{id(net.bias): 0.1}])


class CountsInState(torch.optim.SGD):
    """Keeps what is no parameter's in its state, as SPAM."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        self.state["total_step"] = 0  # type: ignore[index]


def test_an_optimizer_whose_state_has_more_than_parameters_is_followed() -> None:
    net = nn.Linear(2, 1)
    phased = Phased(CountsInState(net.parameters()), optimizer_state="drop")
    phased.train(net, [net.bias])
    phased.release()


class Marks(torch.optim.SGD):
    """Notes for each parameter how to step it when it is built, as Moonlight's Muon; how to build it, nobody knows."""

    def __init__(self, lr: float, matrices: Any, others: Any) -> None:
        super().__init__([*matrices, *others], lr=lr)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["use_muon"] = parameter.ndim == 2

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert {self.state[p]["use_muon"] for p in self.param_groups[0]["params"]} <= {True, False}
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter]["moment"] = torch.zeros(1)


def test_what_the_constructor_has_noted_is_not_dropped() -> None:
    net = nn.Linear(2, 1)
    phased = Phased(Marks(0.1, [net.weight], [net.bias]), optimizer_state="drop")
    for trains in ([net.bias, net.weight], [net.bias], [net.weight]):
        phased.train(net, trains)
        net(torch.ones(1, 2)).sum().backward()
        phased.optimizer.step()
        has = {name: sorted(phased.optimizer.state[p]) for name, p in net.named_parameters()}
        both, mark = ["moment", "use_muon"], ["use_muon"]
        assert has == {name: both if any(p is q for q in trains) else mark for name, p in net.named_parameters()}


def test_nothing_is_added_to_an_optimizer_that_notes_something_when_it_is_built(two: Any) -> None:
    net, phased = two
    with pytest.raises(ValueError, match=r"not given: 1\.weight\. It makes state for its parameters when it is built"):
        phased(Marks(0.1, [net[0].weight], []), adopt={"1.weight": net[1].weight})


def _reversed(groups: list[Any]) -> None:
    groups.reverse()


def _first_taken_out(groups: list[Any]) -> None:
    del groups[0]


def _member_moved(groups: list[Any]) -> None:
    groups[2]["params"].append(groups[0]["params"].pop())


def _groups_joined(groups: list[Any]) -> None:
    groups[2]["params"].extend(groups.pop(0)["params"])


@pytest.mark.parametrize("edit", [_reversed, _first_taken_out, _member_moved, _groups_joined])
def test_scales_hold_in_groups_that_the_user_edits_in_mid_fit(edit: Any) -> None:
    """By position, a scale would go to other parameters, and some would not step at all."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    sgd = torch.optim.SGD([{"params": list(layer.parameters())} for layer in net], lr=1.0)
    phased = Phased(sgd, scales=[{id(p): 0.1 for p in net[0].parameters()}])
    phased.apply(0, set(map(id, net.parameters())))
    edited = False
    for _ in range(3):
        before = {p: p.detach().clone() for p in net.parameters()}
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        sgd.step()
        for p in net.parameters():
            rate = 0.0 if id(p) not in members(sgd) else 0.1 if any(p is one for one in net[0].parameters()) else 1.0
            torch.testing.assert_close(before[p] - p, torch.full_like(p, rate))
        if not edited:
            edit(sgd.param_groups)
            edited = True
    phased.release()


class Noisy(torch.optim.SGD):
    """Adds noise, as Langevin dynamics and private training do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.norm() >= 0:  # which cannot be asked without a value
                    p.data.add_(torch.randn_like(p), alpha=0.01)


def test_what_is_asked_at_fit_start_leaves_random_numbers_alone(two: Any) -> None:
    net, phased = two
    before = torch.get_rng_state()
    optimizer = Noisy(net[0].parameters(), lr=0.1)
    phased(optimizer, adopt={"1.weight": net[1].weight}, scales=[{id(net[0].weight): 0.1}])
    try_frozen(optimizer)
    assert state_bytes(optimizer, optimizer.param_groups[0], net[0].weight) is not None
    assert torch.equal(before, torch.get_rng_state())
