from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LambdaLR

from lightning_freeze import parameter_groups, select_parameters
from lightning_freeze.freezing.optimizers import HomeGroups, homeless, overlay, strangers
from tests.nets import Net, adamw, loader, members, same, sgd, trainer
from tests.trees import trees

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
                lr = lrs[number] if number < len(lrs) else lrs[0]  # what is adopted is like the first group
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


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_like_an_optimizer_for_each_parameter(data: st.DataObject) -> None:
    """Any groups, adopted ones too, any phases with any scales, saved and loaded anywhere: the weights, to the bit."""
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

    def build(weights: list[torch.Tensor]) -> tuple[list[Any], Any, Any, HomeGroups]:
        params = [nn.Parameter(weight.clone()) for weight in weights]
        given = [
            {"params": [(str(i), params[i]) if named else params[i] for i in group], "lr": lr}
            for group, lr in zip(groups, lrs, strict=True)
        ]
        optimizer = make(given)
        scheduler = rate(optimizer)
        homes = HomeGroups(
            optimizer,
            [scheduler],
            scales=[{id(params[i]): factor for i, factor in scales.items()} for _, scales in phases],
            adopt={str(i): params[i] for i in adopted},
            optimizer_state=policy,
        )
        return params, optimizer, scheduler, homes

    start = [torch.randn(2) for _ in range(count)]
    params, optimizer, scheduler, homes = build(start)
    reference = Reference(
        make, rate, [*groups, *([adopted] if adopted else [])], lrs, [nn.Parameter(w.clone()) for w in start]
    )
    shape = None
    for number in draw(st.permutations(range(len(phases)))):
        trains, scales = phases[number]
        homes.apply(number, {id(params[i]) for i in trains})
        reference.freeze(set(range(count)) - trains, policy)
        for _ in range(draw(st.integers(1, 3))):
            if draw(st.booleans()):  # stop here and go on in another process
                saved = copy.deepcopy(optimizer.state_dict())
                rates = copy.deepcopy(homes.scheduler_state(scheduler))
                params, optimizer, scheduler, homes = build([p.detach() for p in params])
                homes.apply(number, {id(params[i]) for i in trains})
                optimizer.load_state_dict(saved)
                scheduler.load_state_dict(rates)
                homes.apply(number, {id(params[i]) for i in trains})
            assert sorted(members(optimizer)) == sorted(id(params[i]) for i in trains)
            for group in optimizer.param_groups:
                if named:
                    assert group["param_names"] == [
                        next(str(i) for i, p in enumerate(params) if p is q) for q in group["params"]
                    ]
            shape = shape or len(optimizer.param_groups)
            assert len(optimizer.param_groups) == shape
            gradients = [torch.randn(2) for _ in range(count)]
            for index, gradient in enumerate(gradients):
                # A frozen parameter may even have a gradient: it is not in the optimizer.
                params[index].grad, reference.params[index].grad = gradient.clone(), gradient.clone()
            optimizer.step()
            scheduler.step()
            reference.step(trains, scales)
            assert same(list(params), list(reference.params))
    homes.release()
    whole = [*groups, *([adopted] if adopted else [])]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(params[i]) for i in group] for group in whole
    ]
    optimizer.step()
    scheduler.step()  # lists and groups still fit each other
    assert not any(vars(optimizer)[name] for name in vars(optimizer) if name.endswith("_hooks"))


def test_the_user_changes_a_rate_or_an_option() -> None:
    """What is written into the user's group reaches the scaled ones at the next step."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    homes = HomeGroups(optimizer, scales=[{id(net[1].weight): 0.1}])
    homes.apply(0, {id(p) for p in net.parameters()})
    optimizer.param_groups[0].update(lr=0.5, momentum=0.0)
    net(torch.ones(1, 1)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    for p, old, grad, lr in zip(net.parameters(), before, grads, (0.5, 0.05), strict=True):
        assert torch.equal(p, old - lr * grad)


def test_a_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    """Captured graphs hold on to the tensor; a follower's is one of its own, written in place."""
    net = nn.Linear(1, 1)
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    homes = HomeGroups(optimizer, scales=[{id(net.bias): 0.5}, {id(net.bias): 2.0}])
    user, follower = (group["lr"] for group in optimizer.param_groups)
    homes.apply(1, {id(p) for p in net.parameters()})
    rate.fill_(0.3)
    homes.follow()
    assert optimizer.param_groups[0]["lr"] is user is rate
    assert optimizer.param_groups[1]["lr"] is follower
    assert float(follower) == pytest.approx(0.6)


@pytest.mark.parametrize(("options", "said"), [({"lr": None}, "None"), ({"rate": 0.1}, "not there")])
def test_a_scale_without_a_rate_is_refused(options: dict[str, Any], said: str) -> None:
    """Adoption alone takes such options over as they are."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = torch.optim.Optimizer(net[0].parameters(), options)
    with pytest.raises(ValueError, match=f"scales lr, which is {said} in group 0 of Optimizer. Give"):
        HomeGroups(optimizer, scales=[{id(net[0].bias): 0.5}])
    assert members(optimizer) == [id(p) for p in net[0].parameters()]
    assert len(optimizer.param_groups) == 1
    HomeGroups(optimizer, scales=[{id(net[0].bias): 1.0}], adopt=dict(net[1].named_parameters()))
    assert [{key: group[key] for key in options} for group in optimizer.param_groups] == [options, options]


def test_a_group_that_somebody_adds_is_refused_and_not_lost() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    homes = HomeGroups(optimizer, scales=[{id(net[0].bias): 0.5}])
    homes.apply(0, {id(net[0].weight)})
    optimizer.add_param_group({"params": list(net[1].parameters())})
    for act in (lambda: homes.apply(0, set()), optimizer.state_dict):
        with pytest.raises(ValueError, match="A group was added to the optimizer during the fit"):
            act()
    homes.release()
    assert members(optimizer) == [id(p) for p in net.parameters()]


def test_homeless_and_strangers_go_by_identity() -> None:
    one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([one], lr=0.1)
    assert homeless([optimizer], {"one": one, "other": other}) == {"other": other}
    assert strangers([optimizer], [one]) == []
    assert strangers([optimizer], [other])[0] is one


# parameter_groups


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_groups_are_disjoint_and_cover(data: st.DataObject) -> None:
    module = data.draw(trees())
    names = [name for name, _ in module.named_parameters()]
    tops = sorted({name.rpartition(".")[0] for name in names} - {""})
    selects = data.draw(st.lists(st.sampled_from([*tops, *names]), unique=True, max_size=3)) if tops else []
    options = {select: {"lr": 0.5**number, "weight_decay": 0.3} for number, select in enumerate(selects, 1)}
    chosen = {select: select_parameters(module, select) for select in selects}
    owner = {name: next((s for s in reversed(selects) if name in chosen[s]), None) for name in names}
    if set(selects) - set(owner.values()):
        with pytest.raises(ValueError, match=r"is left with no parameter|names the same parameters"):
            parameter_groups(module, options)
        return
    groups = parameter_groups(module, options)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in module.parameters()}
    assert all(group["params"] for group in groups)
    norms = {id(p) for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.LayerNorm) for p in m.parameters()}
    for name, parameter in module.named_parameters():
        (group,) = [group for group in groups if any(p is parameter for p in group["params"])]
        select = owner[name]
        assert group.get("lr") == (options[select]["lr"] if select else None)
        bias = name.endswith("bias") or id(parameter) in norms
        assert group.get("weight_decay") == (0.0 if bias else 0.3 if select else None)
    assert len({group["name"] for group in groups}) == len(groups)
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.7)
    assert len(optimizer.param_groups) == len(groups)


def test_overlay_and_tuples_as_keys() -> None:
    net = Net()
    assert set(overlay(net, ["*", "head"]).values()) == {"*", "head"}
    groups = parameter_groups(net, {("head", "neck"): {"lr": 0.1}, "backbone": {"lr": 0.2}}, no_decay=())
    assert [(group["name"], len(group["params"])) for group in groups] == [("head, neck", 4), ("backbone", 8)]
    with pytest.raises(ValueError, match=r'parameter_groups\(\{"hed": …\}\) matches .* Did you mean "head"'):
        parameter_groups(net, {"hed": {}})


@pytest.mark.parametrize(
    ("no_decay", "expected"),
    [
        ("*.bias", {"neck.bias", "head.bias"}),
        (["*.bias"], {"neck.bias", "head.bias"}),
        (["*.bias", "!head"], {"neck.bias"}),
        (["type:LayerNorm", "!head", "neck.bias"], {"neck.bias"}),
        (["!head.bias", "*"][::-1], {"neck.weight", "neck.bias", "head.weight"}),
        (lambda name, parameter: parameter.ndim < 2, {"neck.bias", "head.bias"}),
        (["*.biass", "!hed"], set()),
        ((), set()),
    ],
)
def test_what_does_not_decay(no_decay: Any, expected: set[str]) -> None:
    net = nn.ModuleDict({"neck": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    groups = parameter_groups(net, {}, no_decay=no_decay)
    still = {id(p) for group in groups for p in group["params"] if group.get("weight_decay") == 0.0}
    assert {name for name, p in net.named_parameters() if id(p) in still} == expected


def test_names_are_told_apart_and_tensors_are_not_shared(tmp_path: Path) -> None:
    net = nn.ModuleDict({"rest": nn.Linear(2, 2), "head": nn.Linear(2, 1), "tail": nn.Linear(1, 1)})
    options = {
        "rest": {"lr": torch.tensor(0.1)},
        "head.weight": {"name": "H"},
        "head.bias": {"name": "H", "lr": 1.0},
    }
    groups = parameter_groups(net, options)
    assert [group["name"] for group in groups] == [
        "rest",
        "rest/no_decay",
        "H",
        "H/no_decay",
        "rest-2",
        "rest/no_decay-2",
    ]
    groups[0]["lr"].mul_(0.5)
    assert groups[1]["lr"] == torch.tensor(0.1) == options["rest"]["lr"]
    assert all(group["params"] for group in groups)
    optimizer = torch.optim.AdamW(parameter_groups(net, {**options, "rest": {"lr": 0.1}}))

    class Fits(Net):
        def configure_optimizers(self) -> Any:
            return [optimizer], [ExponentialLR(optimizer, 0.9)]

    fits = Fits()
    fits.mine = net
    logger = CSVLogger(tmp_path)
    trainer(callbacks=[LearningRateMonitor()], logger=logger, max_epochs=1, log_every_n_steps=1).fit(fits, loader())


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        (
            {"wte": {"lr": 1.0}, "lm_head": {}},
            {},
            ValueError,
            "'wte': …}) names the same parameters as 'lm_head': wte.",
        ),
        ({"h": {}, "*": {}}, {}, ValueError, "'h': …}) is left with no parameter: later selectors"),
        ({"h": {"params": []}}, {}, ValueError, "what a group holds follows from its selector. Leave params out."),
        ({"h": 0.1}, {}, TypeError, "parameter_groups({'h': 0.1}): the options of a group are a dict"),
        ([{"h": {}}], {}, TypeError, "options are a dict of selectors"),
        ({}, {"no_decay": "re:("}, ValueError, 'parameter_groups(no_decay="re:(") is no regular expression'),
        ({}, {"no_decay": ["!h"]}, ValueError, "takes away from nothing: it comes first"),
        ({}, {"no_decay": None}, TypeError, "A selector is a string"),
    ],
)
def test_groups_that_are_refused(options: Any, settings: Any, error: type[Exception], message: str) -> None:
    net = nn.ModuleDict({"wte": nn.Embedding(3, 2), "h": nn.Linear(2, 2), "lm_head": nn.Linear(2, 3, bias=False)})
    net["lm_head"].weight = net["wte"].weight
    with pytest.raises(error, match=re.escape(message)):
        parameter_groups(net, options, **settings)


@pytest.mark.parametrize("make", [adamw, sgd])
def test_nothing_of_a_fit_stays_in_a_copy(make: Any) -> None:
    net = nn.Linear(2, 1)
    optimizer = make(net.parameters())
    homes = HomeGroups(optimizer)
    homes.apply(0, {id(net.bias)})
    twin = copy.deepcopy(optimizer)
    assert len(twin.param_groups[0]["params"]) == 1
    twin.state_dict()
    assert len(optimizer.param_groups[0]["params"]) == 1
