from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import freeze_batchnorm
from lightning_freeze.audit.frozen_values import frozen_tensors, has_moved, look, moved_by
from tests.nets import Net, adamw, sgd, snapshot


def test_a_write_to_data_which_raises_no_version_is_seen() -> None:
    net = nn.Linear(3, 3)
    before, version = look(net.weight), net.weight._version
    net.weight.data[0, 0] += 1
    assert net.weight._version == version
    assert has_moved(before, look(net.weight))
    assert not has_moved(look(net.weight), look(net.weight))


def test_another_parameter_has_not_moved_and_another_buffer_has() -> None:
    net = nn.BatchNorm1d(2)
    weight, mean = look(net.weight), look(net.running_mean)
    net.weight = nn.Parameter(torch.zeros(2))
    net.running_mean = torch.full((2,), 7.0)
    assert not has_moved(weight, look(net.weight))
    assert has_moved(mean, look(net.running_mean))


def names(net: nn.Module, identities: set[int]) -> set[str]:
    return {name for name, parameter in net.named_parameters() if id(parameter) in identities}


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
    said = names(net, moved_by(optimizer))
    before = snapshot(net)
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(before[name], p)}
    assert said == {name for name in moved if name.startswith("neck")}
    assert bool(said) == (gradient != "none")


@pytest.mark.parametrize("make", [adamw, sgd])
def test_what_an_optimizer_has_stepped_between_two_looks_has_not_moved_while_frozen(make: Any) -> None:
    net = Net()
    optimizer = make(net.parameters())
    for _ in range(2):
        net(torch.randn(4, 2, 5, 5)).sum().backward()
        optimizer.step()
    before = look(net.neck.bias, [optimizer])
    optimizer.step()
    after = look(net.neck.bias, [optimizer])
    assert before[1] != after[1]
    assert not has_moved(before, after)
    assert has_moved(before, after, stepped=True)
    net.neck.bias.data.add_(1)
    assert has_moved(after, look(net.neck.bias, [optimizer]))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.inner = nn.BatchNorm1d(2, affine=False)
        self.register_buffer("calls", torch.zeros(()))


def test_all_buffers_of_frozen_modules_must_not_move() -> None:
    net = nn.ModuleDict({"a": Counts(), "b": Counts()})
    net["b"].scale = net["a"].scale
    inner = [f"inner.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    a, b = [f"a.{name}" for name in ("calls", *inner)], [f"b.{name}" for name in ("calls", *inner)]
    assert list(frozen_tensors(net, trains=set())) == ["a.scale", *a, *b]  # a tied one is found once
    trains = {id(net["a"].scale)}
    assert list(frozen_tensors(net, trains)) == []
    freeze_batchnorm(net["b"])
    assert list(frozen_tensors(net, trains)) == b[1:]
    assert list(frozen_tensors(net, set(), held_only=True)) == ["a.scale", *b[1:]]
