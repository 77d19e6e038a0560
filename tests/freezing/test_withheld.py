from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from lightning_freeze.freezing.withheld import Withheld
from tests.nets import members, same


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]  # equal values: membership goes by identity


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for number, parameter in enumerate(params):
        parameter.grad = torch.full((2,), 1.0 + number)
    optimizer.step()
    for parameter in params:
        parameter.grad = None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_any_members_of_any_groups(out: list[list[bool]], named: bool) -> None:
    groups = [parameters(len(flags)) for flags in out]
    unwanted = [
        p for group, flags in zip(groups, out, strict=True) for p, flag in zip(group, flags, strict=True) if flag
    ]
    kept = [[p for p in group if all(p is not q for q in unwanted)] for group in groups]

    def build() -> torch.optim.Optimizer:
        if not named:
            return torch.optim.AdamW([{"params": list(group)} for group in groups])
        return torch.optim.AdamW(
            [{"params": [(f"{i}.{j}", p) for j, p in enumerate(group)]} for i, group in enumerate(groups)]
        )

    def check(optimizer: torch.optim.Optimizer, expected: list[list[nn.Parameter]]) -> None:
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
            [id(p) for p in group] for group in expected
        ]
        if named:
            names = {id(p): f"{i}.{j}" for i, group in enumerate(groups) for j, p in enumerate(group)}
            for group in optimizer.param_groups:
                assert group["param_names"] == [names[id(p)] for p in group["params"]]

    plain, optimizer = build(), build()
    lists = [group["params"] for group in optimizer.param_groups]
    withheld = Withheld(optimizer, unwanted)
    check(optimizer, kept)
    step(plain, [p for group in kept for p in group])
    step(optimizer, [p for group in kept for p in group])
    saved = optimizer.state_dict()
    assert same(saved, plain.state_dict())
    check(optimizer, kept)
    kept_copy = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    check(optimizer, kept)
    assert same(saved, kept_copy)
    assert same(optimizer.state_dict(), kept_copy)
    withheld.release()
    check(optimizer, groups)
    assert all(mine is group["params"] for mine, group in zip(lists, optimizer.param_groups, strict=True))
    assert not any(vars(optimizer)[name] for name in vars(optimizer) if name.endswith("_hooks"))


def test_nothing_to_withhold_leaves_no_hook() -> None:
    mine, others = parameters(2), parameters(1)
    sgd = torch.optim.SGD(mine)
    Withheld(sgd, others)
    assert not any(vars(sgd)[name] for name in vars(sgd) if name.endswith("_hooks"))


def test_groups_that_come_later() -> None:
    """Others may add groups while the fit is on; what must not be in them leaves when the state is saved."""
    mine, target, later = parameters(2), parameters(1), parameters(1)
    sgd = torch.optim.SGD(mine + target)
    withheld = Withheld(sgd, target)
    sgd.add_param_group({"params": later})
    assert [len(group["params"]) for group in sgd.state_dict()["param_groups"]] == [3, 1]
    assert members(sgd) == [*map(id, mine), *map(id, later)]
    withheld.release()
    assert members(sgd) == [*map(id, mine), *map(id, target), *map(id, later)]


def test_an_empty_group_steps_and_is_scheduled() -> None:
    mine, target = parameters(2), parameters(2)
    optimizer = torch.optim.Adam([{"params": mine}, {"params": target, "lr": 0.5}], lr=0.1)
    scheduler = ExponentialLR(optimizer, 0.5)
    Withheld(optimizer, target)
    step(optimizer, mine)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]


def test_a_state_that_does_not_fit_leaves_an_optimizer_that_can_be_released() -> None:
    mine, target = parameters(2), parameters(1)
    sgd = torch.optim.SGD(mine + target)
    withheld = Withheld(sgd, target)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        sgd.load_state_dict({"state": {}, "param_groups": []})
    withheld.release()
    assert members(sgd) == [*map(id, mine), *map(id, target)]


def test_lbfgs_is_refused_where_it_would_change() -> None:
    mine, target = parameters(2), parameters(1)
    lbfgs: Any = torch.optim.LBFGS(mine + target)
    with pytest.raises(ValueError, match="LBFGS makes one vector"):
        Withheld(lbfgs, target)
    assert members(lbfgs) == [*map(id, mine), *map(id, target)]
    Withheld(torch.optim.LBFGS(mine), target)
