from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze.audit.graphs import by_design, tensors_with_graph, ways_to


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
def test_the_way_to_a_tensor(make: Any, way: str) -> None:
    tensor = graph()
    root = SimpleNamespace(x=make(tensor), other=graph())
    assert ways_to([tensor], {"self": root}) == {id(tensor): way}


def test_the_way_through_a_module_is_as_one_writes_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[1].running_mean = net[0](torch.ones(1, 2))[0]
    net[1].seen = [net[1].running_mean.sum()]
    net.me = net  # type: ignore[assignment]
    assert set(ways_to([net[1].running_mean, net[1].seen[0]], {"self": net}).values()) == {
        "self.1.running_mean",
        "self.1.seen[0]",
    }


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
    assert ways_to([angry.loss], {"self": angry}) == {id(angry.loss): "self.loss"}


def test_all_living_tensors_with_a_graph_are_found_and_no_dead_ones() -> None:
    gc.collect()
    known = {id(tensor) for tensor in tensors_with_graph()}
    tensor, plain = graph(), torch.ones(2)
    cycle: list[Any] = [graph()]
    cycle.append(cycle)
    del cycle
    assert [id(one) for one in tensors_with_graph(known)] == [id(tensor)]
    assert plain.grad_fn is None


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_has_a_graph_by_design() -> None:
    normal = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    pruned = torch.nn.utils.prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)
    plain = nn.Linear(2, 2)
    plain.kept = plain(torch.ones(1, 2))
    assert id(normal.weight) in by_design(normal)
    assert id(pruned.weight) in by_design(pruned)
    assert id(plain.kept) not in by_design(plain)
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    assert by_design(nn.Sequential(scripted)) == set()


def test_no_unfinished_tuple_of_another_thread_is_held() -> None:
    """Python refuses to finish a tuple that somebody else holds; a progress bar's thread died of that."""

    def numbers() -> Iterator[int]:
        for number in range(50):
            if number == 5:
                tensors_with_graph()
            yield number

    finished: list[int] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            finished.append(len(tuple((number,) for number in range(50))))

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=work)
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        for _ in range(20):
            assert len(tuple(numbers())) == 50
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert set(finished) == {50}
