"""The check that no tensor keeps a graph alive between steps, and the search for the way to it."""

from __future__ import annotations

import gc
import re
import sys
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, compress
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses import FakeTensor  # what a compiler leaves in its caches has a graph, but no memory

from lightning_freeze._lightning import callbacks_of
from lightning_freeze.audit.checks import At, Check, Moment
from lightning_freeze.audit.findings import Finding
from lightning_freeze.audit.libraries import is_users

_THINGS = 300_000
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, range, torch.dtype, torch.device, torch.Generator)


class Graphs(Check):
    """Finds tensors that keep a graph, other than those that have one when the fit begins."""

    moments: tuple[At, ...] = ("phase start", "step end", "first steps end", "epoch end")

    def __init__(self) -> None:
        self._before = [weakref.ref(tensor) for tensor in tensors_with_graph()]
        self._batches = 0
        self._found: list[Finding] = []

    def begin(self, now: Moment, undo: ExitStack) -> None:
        """Search before the second batch of a phase: what the first had in hand is gone by then."""
        self._batches += 1
        if self._batches == 2:
            self._found = self._search(now)

    def observe(self, now: Moment) -> list[Finding]:
        """Return the findings of this process."""
        if now.at == "phase start":
            self._batches = 0
        found, self._found = self._found, []
        return self._search(now) if now.at == "epoch end" else found

    def _search(self, now: Moment) -> list[Finding]:
        known = {id(tensor) for reference in self._before if (tensor := reference()) is not None}
        apply_to_collection(now.batch, Tensor, lambda tensor: known.add(id(tensor)))
        roots: dict[str, object] = {"self": now.module}
        roots |= {type(callback).__name__: callback for callback in callbacks_of(now.trainer)}
        roots |= {name: module for name, module in list(sys.modules.items()) if _is_users(name)}
        roots["trainer"] = now.trainer
        return kept_graphs(tensors_with_graph(known | by_design(now.module)), roots, now.step)


def kept_graphs(tensors: Collection[Tensor], roots: Mapping[str, object], step: int) -> list[Finding]:
    """Return a finding for each place that keeps tensors with a graph; its name is the way to the last of them."""
    ways = ways_to(tensors, roots)
    places: dict[str, list[str]] = {}
    for tensor in tensors:
        way = ways.get(id(tensor), "somewhere (no attribute or global leads to it)")
        places.setdefault(container(way), []).append(way)
    findings = []
    for place, members in places.items():
        what = f"{place} holds {len(members)} tensors" if len(members) > 1 else f"{members[0]} is a tensor"
        cause = f"After the step {what} with a graph behind it, so all that the graph needs stays in memory."
        fix = "Keep loss.detach() instead, or drop the tensor at the end of the step."
        findings.append(Finding("graph_kept", max(members, key=lambda way: (len(way), way)), cause, fix, step))
    return findings


def container(way: str) -> str:
    """Return the way to what a tensor is kept in: the same for all members of one list.

    Example:
        >>> container("self.losses[31]"), container("self.last"), container("self.a[2]._base (… is a view of it)")
        ('self.losses', 'self.last', 'self.a')
    """
    return re.sub(r"(\[\d+\])+(\._base \(.*\))?$", "", way)


def by_design(module: nn.Module) -> set[int]:
    """Return the identities of tensors that a module computes from others in every forward, and so have a graph.

    The classic weight and spectral normalisation and pruning keep ``weight``, computed from ``weight_g``,
    ``weight_orig`` and so on, as an attribute until the next forward; an LSTM lists them once more.
    """
    return {
        id(tensor)
        for child in module.modules()
        for name, _ in child.named_parameters(recurse=False)
        if name.endswith(("_g", "_v", "_orig"))
        for tensor in (vars(child).get(name.rpartition("_")[0]), *vars(child).get("_flat_weights", ()))
    }


def tensors_with_graph(ignore: Container[int] = ()) -> list[Tensor]:
    """Return all living tensors that have a graph, wherever they are, but those whose identity is in ``ignore``.

    Between two training steps there should be none. Python's garbage collector knows them all, so a list in a closure
    or in a global is found as well as an attribute. What only waits to be collected does not count.
    """
    if not _with_graph(ignore):
        return []
    gc.collect()
    return _with_graph(ignore)


def _with_graph(ignore: Container[int]) -> list[Tensor]:
    tensors = _instances(set(_subclasses(Tensor)) - {FakeTensor})
    return [tensor for tensor in tensors if id(tensor) not in ignore and tensor.grad_fn is not None]


def _instances(kinds: set[type]) -> list[Any]:
    """Return all living objects of exactly these types.

    The list of everything must be gone before another thread runs: Python fails in ``tuple(generator)`` there if
    somebody else holds the unfinished tuple, as for a progress bar's thread. So it is made, read twice and let go of
    within one call that runs no Python code.
    """
    end = [None]  # one more to read than types: so both readers, which are in the list and hold it, come to its end
    everything: defaultdict[int, list[Any]] = defaultdict(gc.get_objects, {1: end})
    return list(
        compress(
            chain.from_iterable(map(everything.__getitem__, [0, 1])),
            map(kinds.__contains__, map(type, chain.from_iterable(map(everything.pop, [0])))),
        )
    )


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    child: type
    for child in type.__subclasses__(cls):
        yield from _subclasses(child)


def ways_to(tensors: Iterable[Tensor], roots: Mapping[str, Any]) -> dict[int, str]:
    """Return the shortest way from named roots to each tensor, as one would write it in Python, by identity.

    Attributes, also of the user's classes, dicts, sequences, sets, closures, bound arguments and what a tensor is a
    view of are followed; no property is read.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.history = {"loss": [net(torch.ones(1, 2)).sum()]}
        >>> list(ways_to(net.history["loss"], {"self": net}).values())
        ["self.history['loss'][0]"]
    """
    wanted = {id(tensor) for tensor in tensors}
    ways: dict[int, str] = {}
    seen = {id(root) for root in roots.values()}
    ahead = deque(roots.items())
    left = _THINGS
    while ahead and left and len(ways) < len(wanted):
        left -= 1
        way, thing = ahead.popleft()
        for step, child in _children(thing):
            if id(child) in seen or isinstance(child, _PLAIN):
                continue
            seen.add(id(child))
            if not isinstance(child, Tensor):
                ahead.append((way + step, child))
            elif id(child) in wanted:
                ways[id(child)] = way + step
            elif id(base := child._base) in wanted:  # a view made under no_grad keeps the graph of its base alive
                ways.setdefault(id(base), f"{way}{step}._base ({way}{step} is a view of it)")
    return ways


def _is_users(module: str) -> bool:
    return module == "__main__" or is_users(getattr(sys.modules.get(module), "__file__", None))


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, dict):
        for key, value in list(dict.items(thing)):
            yield f"[{key!r}]" if isinstance(key, str | int | float | bool) else "[…]", value
    elif isinstance(thing, list | tuple | deque | set | frozenset):
        for index, value in enumerate(list(thing)):
            yield "{…}" if isinstance(thing, set | frozenset) else f"[{index}]", value
    elif isinstance(thing, types.FunctionType):
        yield ".__defaults__", thing.__defaults__
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                yield f".{name}", cell.cell_contents
    elif isinstance(thing, types.MethodType | partial):
        names = ("func", "args", "keywords") if isinstance(thing, partial) else ("__self__", "__func__")
        yield from ((f".{name}", getattr(thing, name)) for name in names)
    else:
        yield from _attributes(thing)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    own: Any = {}
    with suppress(AttributeError):
        own = object.__getattribute__(thing, "__dict__")
    for name, value in list(own.items()):
        if isinstance(thing, nn.Module) and name in ("_modules", "_buffers", "_parameters"):
            yield from ((f".{key}", member) for key, member in list(value.items()))
        elif not isinstance(value, types.ModuleType):
            yield f".{name}", value
    for cls in type(thing).__mro__:
        users = _is_users(cls.__module__)
        for name, value in list(vars(cls).items()) if users or "__slots__" in vars(cls) else ():
            if isinstance(value, types.MemberDescriptorType):
                with suppress(AttributeError):  # a slot that is not set
                    yield f".{name}", value.__get__(thing)
            elif users and not name.startswith("__") and not hasattr(type(value), "__get__"):  # no method, no property
                yield f".{name}", value
