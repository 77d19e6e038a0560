from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze.audit.membership import held_twice, moved_by, state_marks
from tests.nets import Net, adamw, sgd, snapshot


def names(net: nn.Module, identities: set[int]) -> set[str]:
    return {name for name, parameter in net.named_parameters() if id(parameter) in identities}


def test_held_twice_in_one_and_in_two_optimizers() -> None:
    net = Net()
    optimizer, other = sgd(net.parameters()), adamw(net.head.parameters())
    parameters = dict(net.named_parameters())
    assert held_twice([optimizer], parameters) == {}
    assert set(held_twice([optimizer, other], parameters)) == {"head.weight", "head.bias"}
    assert held_twice([optimizer, optimizer], parameters) == {}
    optimizer.param_groups[0]["params"].append(net.neck.bias)
    assert held_twice([optimizer], parameters) == {"neck.bias": ["SGD 0, group 0", "SGD 0, group 0"]}


def test_equal_values_are_not_one_parameter() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert held_twice([sgd([a]), adamw([b])], {"a": a, "b": b}) == {}


@pytest.mark.parametrize("make", [sgd, adamw, lambda ps: torch.optim.Adam(ps, lr=1e-2)])
@pytest.mark.parametrize("gradient", ["none", "zero", "left over"])
def test_moved_by_says_what_a_step_moves(make: Any, gradient: str) -> None:
    net = Net()
    optimizer = make(net.parameters())
    for _ in range(2):  # so that there is momentum
        net(torch.randn(4, 2, 5, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=gradient == "none")
    net.neck.requires_grad_(False)
    if gradient == "left over":
        net(torch.randn(4, 2, 5, 5)).sum().backward()
        net.neck.weight.grad.fill_(1)
    told = names(net, moved_by(optimizer))
    before = snapshot(net)
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(before[name], p)}
    assert told == {name for name in moved if name.startswith("neck")}
    assert bool(told) == (gradient != "none")


@pytest.mark.parametrize("make", [adamw, sgd])
def test_state_marks_change_with_a_step_and_with_nothing_else(make: Any) -> None:
    net = Net()
    optimizer = make(net.parameters())
    parameters = dict(net.named_parameters())
    for _ in range(2):
        net(torch.randn(4, 2, 5, 5)).sum().backward()
        optimizer.step()
    marks = state_marks([optimizer], parameters)
    net(torch.randn(4, 2, 5, 5)).sum().backward()
    assert state_marks([optimizer], parameters) == marks
    optimizer.step()
    assert all(mark != marks[name] for name, mark in state_marks([optimizer], parameters).items())
