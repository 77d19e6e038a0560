from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim import swa_utils

from lightning_freeze.freezing.schedulers import _is_per_group, first_groups, follow_groups, lists_apart, scaled_rates
from tests.laws.test_law3_schedulers import SCHEDULERS
from tests.nets import same

GROUPS = 5  # a length that no list has by chance


@dataclass
class Follows:
    source: int
    scale: float


def build(name: str, groups: int = GROUPS) -> tuple[Any, torch.optim.Optimizer]:
    params = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1 * (index + 1)} for index in range(groups)]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return SCHEDULERS[name](optimizer), optimizer


def step(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))


def nodes(scheduler: Any) -> list[Any]:
    inner = getattr(scheduler, "_schedulers", [])
    return [scheduler, *(node for one in inner for node in nodes(one))]


def test_every_class_of_torch_is_tried() -> None:
    classes = {
        cls
        for module in (lrs, swa_utils)
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, lrs.LRScheduler) and cls.__name__.strip("_") != "LRScheduler"
    }
    assert classes <= {type(node) for name in SCHEDULERS for node in nodes(build(name)[0])}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_list_with_an_entry_a_group_is_known(name: str) -> None:
    scheduler, optimizer = build(name)
    for _ in range(3):
        step(scheduler, optimizer)
    for node in nodes(scheduler):
        for attribute, value in vars(node).items():
            if isinstance(value, list | tuple) and len(value) == GROUPS:
                assert _is_per_group(attribute), (type(node).__name__, attribute)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lists_follow(name: str) -> None:
    """Each list grows by an entry for each follower, to the same however often; the user's own entries stay."""
    scheduler, optimizer = build(name, 2)
    step(scheduler, optimizer)
    before = copy.deepcopy(scheduler.state_dict())
    followers = [Follows(0, 0.5), Follows(1, 1.0), Follows(1, 3.0)]
    for given in (followers, followers, followers[:1], [], followers):
        for follower, group in zip(given, [*optimizer.param_groups[2:], *[None] * 3], strict=False):
            if group is None:
                rates = scaled_rates(optimizer.param_groups[follower.source], follower.scale)
                optimizer.param_groups.append({**rates, "params": []})
        del optimizer.param_groups[2 + len(given) :]
        follow_groups(scheduler, 2, given)
        for node in nodes(scheduler):
            for attribute, value in vars(node).items():
                if _is_per_group(attribute):
                    assert len(value) == 2 + len(given)
                    rate = attribute.endswith(("_lrs", "_last_lr"))
                    tail = [value[f.source] * f.scale if rate else value[f.source] for f in given]
                    assert value[2:] == tail
        with first_groups(scheduler, 2):
            state = scheduler.state_dict()
        assert {key: value for key, value in state.items() if key != "_schedulers"} == {
            key: value for key, value in before.items() if key != "_schedulers"
        }
        step(copied := copy.deepcopy(scheduler), copied.optimizer)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_own_state_is_the_state_without_followers(name: str) -> None:
    plain, optimizer = build(name, 2)
    ours, extended = build(name, 2)
    extended.param_groups.append({**scaled_rates(extended.param_groups[1], 0.5), "params": []})
    follow_groups(ours, 2, [Follows(1, 0.5)])
    for _ in range(6):
        step(plain, optimizer)
        step(ours, extended)
        kept = copy.deepcopy(ours.state_dict())
        with first_groups(ours, 2):
            state = ours.state_dict()
        assert same(state, plain.state_dict())
        assert same(ours.state_dict(), kept)


def test_a_list_of_another_length_is_not_per_group() -> None:
    """A list of stages stays as it is, whatever its name; what a scheduler makes later is known by its name again."""
    scheduler, optimizer = build("StepLR", 2)
    scheduler.stage_lrs = stages = [0.3, 0.2, 0.1]
    del scheduler._last_lr
    apart = lists_apart([scheduler], 2, [])
    optimizer.param_groups.append({**scaled_rates(optimizer.param_groups[1], 0.5), "params": []})
    follow_groups(scheduler, 2, [Follows(1, 0.5)], apart)
    step(scheduler, optimizer)
    assert [len(lists) for lists in (scheduler.base_lrs, scheduler._last_lr)] == [3, 3]
    with first_groups(scheduler, 2, apart):
        state = scheduler.state_dict()
    assert [len(state[name]) for name in ("base_lrs", "_last_lr", "stage_lrs")] == [2, 2, 3]
    assert scheduler.stage_lrs is state["stage_lrs"] is stages


def test_rates_are_scaled_and_belongings_left_behind() -> None:
    group = {
        "params": [1],
        "param_names": ["a"],
        "name": "x",
        "lr": 0.1,
        "initial_lr": 0.2,
        "momentum": 0.9,
        "betas": (1, 2),
    }
    assert scaled_rates(group, 0.5) == {"lr": 0.05, "initial_lr": 0.1, "momentum": 0.9, "betas": (1, 2)}
    rate = torch.tensor(0.5)
    scaled = scaled_rates({"lr": rate}, 1.0)["lr"]
    assert scaled == rate
    assert scaled is not rate  # else the follower's rate would be the user's own tensor
