from __future__ import annotations

import torch
from torch import nn

from lightning_freeze.freezing.gradients import FrozenGradients


class Gradients(FrozenGradients):
    """Keeps the stray ones."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.stray: list[nn.Parameter] = []
        super().__init__(self.stray.extend)
        self.watch(parameters)

    def new(self) -> list[nn.Parameter]:
        stray = list(self.stray)
        self.stray.clear()
        return stray


def layers(*frozen: int) -> tuple[nn.ModuleList, list[torch.optim.Optimizer], Gradients]:
    """Three layers with an optimizer each."""
    net = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net]
    return net, optimizers, Gradients([p for index in frozen for p in net[index].parameters()])


def test_only_gradients_of_what_is_frozen_are_dropped() -> None:
    net, _, gradients = layers(0, 2)
    for layer in net:
        layer(torch.ones(1, 2)).sum().backward()
    gradients.drop()
    assert gradients.new() == [*net[0].parameters(), *net[2].parameters()]
    assert [[p.grad is None for p in layer.parameters()] for layer in net] == [[True] * 2, [False] * 2, [True] * 2]
    gradients.drop()
    assert gradients.new() == []


def test_lent_gradient_stays_until_its_own_optimizer_steps() -> None:
    """On the smallest tensor of each wholly frozen optimizer; any other gradient is dropped beside it."""
    net, optimizers, gradients = layers(0, 2)
    gradients.lend(optimizers)
    assert [p.grad is not None for p in net.parameters()] == [False, True, False, False, False, True]
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    net[2].weight.grad = torch.ones(2, 2)
    gradients.begin_step(optimizers[1])
    assert gradients.new() == [net[2].weight]
    assert net[0].bias.grad is not None
    gradients.begin_step(optimizers[0])
    assert net[0].bias.grad is None
    assert net[2].bias.grad is not None
    net[2].bias.grad = torch.ones(2)  # other code has put another in its place
    gradients.begin_step(optimizers[2])
    assert net[2].bias.grad is None
    gradients.lend(optimizers)
    gradients.drop()
    assert all(p.grad is None for p in net.parameters())


def test_no_gradient_is_lent_where_a_part_trains() -> None:
    net, optimizers, _ = layers()
    gradients = Gradients([net[0].weight])
    gradients.lend([*optimizers, torch.optim.SGD([{"params": []}], lr=0.1)])
    assert all(p.grad is None for p in net.parameters())
