from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze.audit.gradients import Received
from tests.nets import Stops


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def named(net: nn.Module) -> dict[str, nn.Parameter]:
    return dict(net.named_parameters())


def test_received_counts_each_backward_and_nothing_from_before() -> None:
    net = Net()
    net(torch.ones(1, 2)).sum().backward()
    with ExitStack() as undo:
        received = Received(named(net), undo)
        net.b(torch.ones(1, 2)).sum().backward()
        assert received.names == {"b.weight", "b.bias"}
    net(torch.ones(1, 2)).sum().backward()
    assert received.names == {"b.weight", "b.bias"}


def test_a_gradient_that_is_set_by_hand_was_received() -> None:
    net = Net()
    received = Received(named(net), ExitStack())
    net.a.bias.grad = torch.ones(2)
    net.b.bias.grad = torch.ones(2)
    received.take_in([net.a.weight, net.a.bias])
    assert received.names == {"a.bias"}


@pytest.mark.parametrize("kind", ["dense", "complex", "sparse", "compressed"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_gradient_zeroed_in_place_was_not_received(kind: str) -> None:
    def gradient(value: float) -> Tensor:
        dense = torch.full((2, 2), value, dtype=torch.complex64 if kind == "complex" else torch.float32)
        return {"sparse": dense.to_sparse, "compressed": dense.to_sparse_csr}.get(kind, dense.clone)()

    whole = gradient(1.0)
    parameter = nn.Parameter(whole if kind == "compressed" else torch.ones(2, 2, dtype=whole.dtype))
    for value, expected in ((1.0, {"p"}), (0.0, set())):
        received = Received({"p": parameter}, ExitStack())
        parameter.grad = gradient(value)
        received.take_in([parameter])
        assert received.names == expected


def test_received_follows_what_thaws_and_what_was_switched() -> None:
    net = Net()
    net.a.requires_grad_(False)
    received = Received(named(net), ExitStack())
    net.b.requires_grad_(False)
    net.b.requires_grad_(True)
    net.a.requires_grad_(True)
    received.follow()
    net(torch.ones(1, 2)).sum().backward()
    assert received.names == set(named(net))


def test_received_counts_no_backward_without_a_gradient() -> None:
    net = Net()
    received = Received(named(net), ExitStack())
    net.b(Stops.apply(net.a(torch.ones(1, 2)))).sum().backward()
    assert received.names == {"b.weight", "b.bias"}


def test_received_counts_a_gradient_that_is_taken_at_once() -> None:
    net = Net()
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    received = Received(named(net), ExitStack())
    net(torch.ones(1, 2)).sum().backward()
    assert received.names == set(named(net))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_received_follows_what_is_lazy_once_it_has_a_value() -> None:
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    with ExitStack() as undo:
        received = Received(named(net), undo)
        loss = net(torch.ones(1, 3)).sum()
        received.follow()
        loss.backward()
    assert received.names == set(named(net))
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in net.parameters())
