from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze.audit.gradient_flow import (
    Received,
    Uses,
    can_be_watched,
    stop_watching,
    watch_next_call,
    watching,
)
from lightning_freeze.feature_cache.interceptor import Interceptor
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
    received = Received(named(net))
    net.b(torch.ones(1, 2)).sum().backward()
    assert received.names == {"b.weight", "b.bias"}
    received.take_in(net.parameters())
    assert received.names == {"b.weight", "b.bias"}
    net.a.bias.grad = torch.ones(2)
    received.take_in([net.a.weight, net.a.bias])
    assert received.names == {"b.weight", "b.bias", "a.bias"}
    received.close()
    net(torch.ones(1, 2)).sum().backward()
    assert "a.weight" not in received.names


@pytest.mark.parametrize("kind", ["dense", "complex", "sparse", "compressed"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_gradient_zeroed_in_place_was_not_received(kind: str) -> None:
    def gradient(value: float) -> Tensor:
        dense = torch.full((2, 2), value, dtype=torch.complex64 if kind == "complex" else torch.float32)
        return {"sparse": dense.to_sparse, "compressed": dense.to_sparse_csr}.get(kind, dense.clone)()

    whole = gradient(1.0)
    parameter = nn.Parameter(whole if kind == "compressed" else torch.ones(2, 2, dtype=whole.dtype))
    for value, expected in ((1.0, {"p"}), (0.0, set())):
        parameter.grad = gradient(1.0)
        received = Received({"p": parameter})
        parameter.grad = gradient(value)
        received.take_in([parameter])
        received.close()
        assert received.names == expected


def test_received_follows_what_thaws_and_what_was_switched() -> None:
    net = Net()
    net.a.requires_grad_(False)
    received = Received(named(net))
    net.b.requires_grad_(False)
    net.b.requires_grad_(True)
    net.a.requires_grad_(True)
    received.follow()
    net(torch.ones(1, 2)).sum().backward()
    assert received.names == set(named(net))


def test_received_counts_no_backward_without_a_gradient() -> None:
    net = Net()
    received = Received(named(net))
    loss = net(torch.ones(1, 2)).sum()
    torch.autograd.grad(loss, list(net.parameters()))
    assert received.names == set()
    net.b(Stops.apply(net.a(torch.ones(1, 2)))).sum().backward()
    assert received.names == {"b.weight", "b.bias"}


def test_received_counts_a_gradient_that_is_taken_at_once() -> None:
    net = Net()
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    received = Received(named(net))
    net(torch.ones(1, 2)).sum().backward()
    assert received.names == set(named(net))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_received_follows_what_is_lazy_once_it_has_a_value() -> None:
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    received = Received(named(net))
    loss = net(torch.ones(1, 3)).sum()
    received.follow()
    loss.backward()
    assert received.names == set(named(net))
    received.close()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in net.parameters())


def test_watching_changes_no_result_and_no_random_number() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.LSTM(4, 4))
    x = torch.randn(3, 4)
    results = []
    for watch in (False, True):
        torch.manual_seed(0)
        if watch:
            with watching(named(net), uses := Uses()):
                output = net(x)[0]
        else:
            output = net(x)[0]
        grads = torch.autograd.grad(output.sum(), list(net.parameters()))
        results.append([output.detach(), *grads, torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert set(uses.of) == set(named(net))
    assert all(use.linked and not use.unlinked for use in uses.of.values())


@pytest.mark.parametrize(
    ("act", "linked", "unlinked", "cut"),
    [
        (lambda net, x: net.a(x), True, False, None),
        (lambda net, x: net.a(x).detach(), True, False, ".detach()"),
        (lambda net, x: (net.a(x) * 2).relu().data, True, False, ".data"),
        (lambda net, x: torch.detach(net.a(x)), True, False, "torch.detach()"),
        (lambda net, x: net.a(x).sum().tolist(), True, False, ".tolist()"),
        (lambda net, x: torch.no_grad()(net.a)(x), False, True, None),
        (lambda net, x: torch.inference_mode()(net.a)(x), False, True, None),
        (lambda net, x: x @ net.a.weight.detach() + net.a.bias.detach(), False, False, ".detach()"),
        (lambda net, x: (net.a.weight.shape, net.a.bias.requires_grad), None, None, None),
        (lambda net, x: x, None, None, None),
    ],
)
def test_what_becomes_of_a_parameter(act: Any, linked: Any, unlinked: Any, cut: Any) -> None:
    net, uses = Net(), Uses()
    with watching(named(net), uses):
        act(net, torch.ones(1, 2))
    assert set(uses.of) == (set() if linked is None else {"a.weight", "a.bias"})
    for use in uses.of.values():
        assert (use.linked is not None, use.unlinked is not None) == (linked, unlinked)
        assert use.cut is None if cut is None else use.cut.startswith(f"{cut} at tests/test_gradient_flow.py:")


def test_one_call_is_watched_and_the_method_is_put_back() -> None:
    net, uses = Net(), Uses()
    watch_next_call(net, "forward", named(net), uses)
    net(torch.ones(1, 2))
    assert set(uses.of) == set(named(net))
    assert "forward" not in vars(net)
    watch_next_call(net, "forward", named(net), uses)
    stop_watching(net, "forward")
    stop_watching(net, "forward")
    assert "forward" not in vars(net)


def test_a_method_of_the_instance_is_put_back_too() -> None:
    net, uses = Net(), Uses()
    mine = net.forward
    net.forward = mine  # type: ignore[method-assign]
    watch_next_call(net, "forward", named(net), uses)
    stop_watching(net, "forward")
    assert vars(net)["forward"] is mine


def test_what_python_does_not_see() -> None:
    net = Net()
    assert can_be_watched(net)
    stand_in = Interceptor(net.b, lambda run, args, kwargs: run(*args, **kwargs))
    assert can_be_watched(net)
    stand_in.remove()
    net.b.compile(backend="eager")
    Interceptor(net.b, lambda run, args, kwargs: run(*args, **kwargs))
    assert not can_be_watched(net)
    net = Net()
    net.a = torch.compile(net.a, backend="eager")  # type: ignore[assignment]
    assert not can_be_watched(net)


def test_a_decorated_method_keeps_the_names_of_its_arguments() -> None:
    class Decorated(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    for net in (Net(), Decorated()):
        seen = getattr(net.forward, "__wrapped__", net.forward)
        watch_next_call(net, "forward", named(net), Uses())
        assert inspect.signature(net.forward.__wrapped__) == inspect.signature(seen)  # as Lightning looks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_function_that_is_compiled_whole() -> None:
    net, uses = Net(), Uses()
    compiled = torch.compile(lambda x: net.b(x), backend="eager", fullgraph=True)
    with watching(named(net), uses):
        output = compiled(net.a(torch.ones(1, 2)))
    assert torch.equal(output, net(torch.ones(1, 2)))
    assert "a.weight" in uses.of
