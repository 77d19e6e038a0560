from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import freeze_batchnorm
from lightning_freeze.audit.frozen_values import Values, frozen_tensors, moved_by
from tests.nets import Net, adamw, sgd, snapshot


def named(net: nn.Module) -> dict[str, Any]:
    return dict(net.named_parameters())


def test_a_write_to_data_which_raises_no_version_is_seen() -> None:
    net, values = nn.Linear(3, 3), Values()
    values.look(named(net))
    version = net.weight._version
    net.weight.data[0, 0] += 1
    assert net.weight._version == version
    assert values.look(named(net)) == ["weight"]
    assert values.look(named(net)) == []


def test_what_the_last_look_left_out_has_not_moved() -> None:
    net, values = nn.Linear(3, 3), Values()
    values.look(named(net))
    values.look({"bias": net.bias})
    net.weight.data.zero_()
    assert values.look(named(net)) == []


def test_another_parameter_has_not_moved_and_another_buffer_has() -> None:
    net, values = nn.BatchNorm1d(2), Values()
    values.look({"weight": net.weight, "running_mean": net.running_mean})
    net.weight = nn.Parameter(torch.zeros(2))
    net.running_mean = torch.full((2,), 7.0)
    assert values.look({"weight": net.weight, "running_mean": net.running_mean}) == ["running_mean"]


def test_what_is_not_kept_is_forgotten() -> None:
    net, values = nn.Linear(3, 3), Values()
    values.look(named(net))
    values.keep({"bias"})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert values.look(named(net)) == ["bias"]


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
    net, values = Net(), Values()
    optimizer = make(net.parameters())
    for _ in range(2):
        net(torch.randn(4, 2, 5, 5)).sum().backward()
        optimizer.step()
    values.look(named(net), [optimizer])
    net(torch.randn(4, 2, 5, 5)).sum().backward()
    assert values.look(named(net), [optimizer]) == []
    optimizer.step()
    assert values.look(named(net), [optimizer]) == []
    optimizer.step()
    assert values.look(named(net), [optimizer], stepped={"neck.bias"}) == ["neck.bias"]
    net.neck.bias.data.add_(1)
    assert values.look(named(net), [optimizer]) == ["neck.bias"]


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
