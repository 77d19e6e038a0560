from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze.audit.uses import Uses, runs_in_python, watching
from tests.audit.test_gradients import Net, named


def used(net: nn.Module, act: Any) -> Uses:
    """Give what becomes of a network's parameters in a call."""
    uses: Uses = {}
    scene: Any = SimpleNamespace(step=act)
    with watching(scene, "step", named(net), uses):
        scene.step()
    return uses


def test_watching_changes_no_result_and_no_random_number() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.LSTM(4, 4))
    x = torch.randn(3, 4)
    results = []
    for watch in (False, True):
        torch.manual_seed(0)
        if watch:
            with watching(net, "forward", named(net), uses := {}):
                output = net(x)[0]
        else:
            output = net(x)[0]
        grads = torch.autograd.grad(output.sum(), list(net.parameters()))
        results.append([output.detach(), *grads, torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert set(uses) == set(named(net))
    assert all(set(use) == {"linked"} for use in uses.values())


@pytest.mark.parametrize(
    ("act", "linked", "unlinked", "cut"),
    [
        (lambda net, x: net.a(x), True, False, None),
        (lambda net, x: net.a(x).detach(), True, False, ".detach()"),
        (lambda net, x: net.a(x).detach_(), True, False, ".detach_()"),
        (lambda net, x: (net.a(x) * 2).relu().data, True, False, ".data"),
        (lambda net, x: torch.detach(net.a(x)), True, False, ".detach()"),
        (lambda net, x: net.a(x).sum().tolist(), True, False, ".tolist()"),
        (lambda net, x: torch.no_grad()(net.a)(x), False, True, None),
        (lambda net, x: torch.inference_mode()(net.a)(x), False, True, None),
        (lambda net, x: x @ net.a.weight.detach() + net.a.bias.detach(), False, False, ".detach()"),
        (lambda net, x: (net.a.weight.shape, net.a.bias.requires_grad), None, None, None),
        (lambda net, x: x, None, None, None),
    ],
)
def test_use_and_cut_of_a_parameter_are_noted_with_their_line(act: Any, linked: Any, unlinked: Any, cut: Any) -> None:
    net = Net()
    uses = used(net, lambda: act(net, torch.ones(1, 2)))
    assert set(uses) == set(named(net))
    assert {name for name, use in uses.items() if use} == (set() if linked is None else {"a.weight", "a.bias"})
    for use in filter(None, uses.values()):
        assert ("linked" in use, "unlinked" in use) == (linked, unlinked)
        assert use.get("cut", "").startswith(f"{cut} at audit/test_uses.py:" if cut else "")
        assert ("cut" in use) == (cut is not None)


def test_python_properties_of_tensors_are_passed_on() -> None:
    net = Net()
    assert used(net, lambda: hasattr(net.a.weight, "__cuda_array_interface__"))["a.weight"] == {}


def test_calls_are_watched_and_the_method_is_put_back() -> None:
    net: Any = Net()
    uses: Uses = {}
    with watching(net, "forward", named(net), uses):
        net(torch.ones(1, 2))
        net(torch.ones(1, 2))
    assert all(set(use) == {"linked"} for use in uses.values())
    assert "forward" not in vars(net)
    net.forward = mine = net.forward
    with pytest.raises(ZeroDivisionError), watching(net, "forward", named(net), uses):
        raise ZeroDivisionError
    assert vars(net)["forward"] is mine


def test_compiled_and_scripted_modules_are_told_apart() -> None:
    net = Net()
    assert runs_in_python(net)
    net.b.compile(backend="eager")
    assert not runs_in_python(net)
    net = Net()
    net.a = torch.compile(net.a, backend="eager")  # type: ignore[assignment]
    assert not runs_in_python(net)


def test_a_decorated_method_keeps_the_names_of_its_arguments() -> None:
    class Decorated(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    for net in (Net(), Decorated()):
        seen = getattr(net.forward, "__wrapped__", net.forward)
        with watching(net, "forward", named(net), {}):
            assert inspect.signature(net.forward.__wrapped__) == inspect.signature(seen)  # as Lightning looks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_function_compiled_whole_runs_while_watched() -> None:
    net = Net()
    compiled = torch.compile(lambda x: net.b(x), backend="eager", fullgraph=True)
    outputs = []
    uses = used(net, lambda: outputs.append(compiled(net.a(torch.ones(1, 2)))))
    assert torch.equal(outputs[0], net(torch.ones(1, 2)))
    assert uses["a.weight"]
