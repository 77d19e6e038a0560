from __future__ import annotations

import warnings
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze.audit.graphs import by_design, tensors_with_graph
from tests.nets import trainer


def graph() -> Tensor:
    return torch.ones(2, requires_grad=True) * 2


def closure(tensor: Tensor) -> Any:
    return lambda: tensor


@dataclass
class Data:
    loss: Tensor
    more: list[Any] = field(default_factory=list)


class Slots:
    __slots__ = ("loss",)

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


def view(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor[:1]


def of_class(tensor: Tensor) -> Any:
    class Holds:
        losses = [tensor]  # noqa: RUF012
        __slots__ = ()

        @property
        def trap(self) -> None:
            raise AssertionError

    return Holds()


WAYS = [
    (lambda t: [0, t], "self.x[1]"),
    (lambda t: {"a": [t]}, "self.x['a'][0]"),
    (lambda t: {1: t}, "self.x[1]"),
    (lambda t: (t,), "self.x[0]"),
    (lambda t: deque([t]), "self.x[0]"),
    (lambda t: {t}, "self.x{…}"),
    (Data, "self.x.loss"),
    (lambda t: Data(torch.ones(1), [t]), "self.x.more[0]"),
    (Slots, "self.x.loss"),
    (lambda t: SimpleNamespace(deep=SimpleNamespace(loss=t)), "self.x.deep.loss"),
    (of_class, "self.x.losses[0]"),
    (lambda t: {"a": view(t)}, "self.x['a']._base (self.x['a'] is a view of it)"),
    (closure, "self.x.tensor"),
    (lambda t: partial(print, t), "self.x.args[0]"),
    (lambda t: partial(print, end=t), "self.x.keywords['end']"),
]


@pytest.mark.parametrize(("make", "way"), WAYS)
def test_tensor_with_a_graph_is_found_by_the_way_one_writes_it(make: Any, way: str) -> None:
    tensor = graph()
    root = SimpleNamespace(x=make(tensor), other=torch.ones(2))
    found = tensors_with_graph([("self", root)])
    assert list(found) == [way]
    assert found[way] is tensor


def test_the_way_through_a_module_is_as_one_writes_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[1].running_mean = net[0](torch.ones(1, 2))[0]
    net[1].seen = [net[1].running_mean.sum()]
    net.me = net  # type: ignore[assignment]
    assert list(tensors_with_graph([("self", net)])) == ["self.1.running_mean", "self.1.seen[0]"]


def test_no_property_is_read() -> None:
    class Angry:
        def __init__(self) -> None:
            self.loss = graph()

        @property
        def trap(self) -> None:
            raise AssertionError

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    angry = Angry()
    assert list(tensors_with_graph([("self", angry)])) == ["self.loss"]


def test_the_trainer_is_left_out() -> None:
    run = trainer()
    run.seen = graph()  # type: ignore[attr-defined]
    assert tensors_with_graph([("self", SimpleNamespace(trainer=run))]) == {}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_tensors_that_modules_compute_anew_are_left_out() -> None:
    normal = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    pruned = torch.nn.utils.prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)
    plain = nn.Linear(2, 2)
    plain.kept = plain(torch.ones(1, 2))
    assert id(normal.weight) in by_design(normal)
    assert id(pruned.weight) in by_design(pruned)
    assert id(plain.kept) not in by_design(plain)
    with warnings.catch_warnings(action="ignore"):  # later torch deprecates it
        scripted = torch.jit.script(nn.Linear(2, 2))
    assert by_design(nn.Sequential(scripted)) == set()


def test_a_librarys_own_objects_are_left_out() -> None:
    """What a library keeps, such as its configuration or a run, may be half of the process."""

    def of_library(**attributes: Any) -> Any:
        return type("Run", (SimpleNamespace,), {"__module__": "pytest"})(**attributes)

    root = SimpleNamespace(buffer=of_library(items=[graph()], run=of_library(items=[graph()])))
    assert list(tensors_with_graph([("self", root)])) == ["self.buffer.items[0]"]
