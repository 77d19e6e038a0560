"""The check that no tensor keeps a graph alive between steps."""

from __future__ import annotations

import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_freeze._lightning import Trainer, callbacks_of
from lightning_freeze.audit.checks import Check, Moment
from lightning_freeze.audit.findings import Finding, container
from lightning_freeze.audit.libraries import is_users
from lightning_freeze.tensors import base_of

_THINGS = 300_000
_SKIPPED = (str, bytes, int, float, complex, bool, type(None), type, range, torch.dtype, torch.device, Trainer)


class Graphs(Check):
    """Finds tensors that keep a graph, other than those that had one when the fit began, at ``start``."""

    moments = ("phase start", "step end", "first steps end", "epoch end")

    def __init__(self, start: Moment) -> None:
        self._before = [weakref.ref(tensor) for tensor in tensors_with_graph(_roots(start)).values()]
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
        fine = by_design(now.module) | {id(tensor) for reference in self._before if (tensor := reference()) is not None}
        apply_to_collection(now.batch, Tensor, lambda tensor: fine.add(id(tensor)))
        places: dict[str, list[str]] = {}
        for way, tensor in tensors_with_graph(_roots(now)).items():
            if id(tensor) not in fine:
                places.setdefault(container(way), []).append(way)
        return [_finding(place, ways, now.step) for place, ways in places.items()]


def _roots(now: Moment) -> list[tuple[str, object]]:
    """Return where to search: the module, the callbacks and the user's own Python modules."""
    callbacks = [(type(callback).__name__, callback) for callback in callbacks_of(now.trainer)]
    modules = [(name, module) for name, module in list(sys.modules.items()) if type(module) is types.ModuleType]
    users = [(name, m) for name, m in modules if name == "__main__" or is_users(vars(m).get("__file__"))]
    return [("self", now.module), *callbacks, *users]


def _finding(place: str, ways: list[str], step: int) -> Finding:
    what = f"{place} holds {len(ways)} tensors" if len(ways) > 1 else f"{ways[0]} is a tensor"
    cause = f"After the step {what} with a graph behind it, so all that the graph needs stays in memory."
    fix = "Keep loss.detach() instead, give metrics preds.detach(), or drop the tensor at the end of the step."
    return Finding("graph_kept", max(ways, key=lambda way: (len(way), way)), cause, fix, step)  # the last of them


def by_design(module: nn.Module) -> set[int]:
    """Return the identities of tensors that a module computes from others in every forward, and so have a graph."""
    # Weight norm, spectral norm and pruning keep `weight`, made from `weight_g` or `weight_orig`; an LSTM lists it.
    return {
        id(tensor)
        for child in module.modules()
        for name, _ in child.named_parameters(recurse=False)
        if name.endswith(("_g", "_v", "_orig"))
        for tensor in (vars(child).get(name.rpartition("_")[0]), *vars(child).get("_flat_weights", ()))
    }


def tensors_with_graph(roots: Iterable[tuple[str, object]]) -> dict[str, Tensor]:
    """Return the tensors with a graph that named roots hold, by the shortest way there as one would write it."""
    ahead, found = deque((way, root, False) for way, root in roots), dict[str, Tensor]()
    seen = {id(root) for _, root, _ in ahead}
    left = _THINGS
    while ahead and left:
        left -= 1
        way, thing, in_library = ahead.popleft()
        if _is_users(type(thing)) or issubclass(type(thing), nn.Module):
            in_library = False
        elif type(thing).__module__.partition(".")[0] not in sys.stdlib_module_names:
            if in_library:  # what belongs to a library's own objects may be half of the process
                continue
            in_library = True
        for step, child in _children(thing):
            # Not isinstance, which may read a property: __class__.
            if issubclass(type(child), _SKIPPED) or id(child) in seen:
                continue
            seen.add(id(child))
            if not issubclass(type(child), Tensor):
                ahead.append((way + step, child, in_library))
            elif child.grad_fn is not None:
                found[way + step] = child
            elif (base := base_of(child)) is not None and base.grad_fn is not None:
                found[f"{way}{step}._base ({way}{step} is a view of it)"] = base
    return found


def _is_users(cls: type) -> bool:
    return cls.__module__ == "__main__" or is_users(getattr(sys.modules.get(cls.__module__), "__file__", None))


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    kind = type(thing)
    if issubclass(kind, dict):
        for key, value in list(dict.items(thing)):
            yield f"[{key!r}]" if issubclass(type(key), str | int | float | bool) else "[…]", value
    elif issubclass(kind, list | tuple | deque | set | frozenset):
        for index, value in enumerate(list(thing)):
            yield "{…}" if issubclass(kind, set | frozenset) else f"[{index}]", value
    elif issubclass(kind, types.FunctionType):
        yield ".__defaults__", thing.__defaults__
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                yield f".{name}", cell.cell_contents
    elif issubclass(kind, types.MethodType | partial):
        names = ("func", "args", "keywords") if issubclass(kind, partial) else ("__self__", "__func__")
        yield from ((f".{name}", getattr(thing, name)) for name in names)
    else:
        yield from _attributes(thing)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    own: Any = {}
    with suppress(AttributeError):
        own = object.__getattribute__(thing, "__dict__")
    for name, value in list(own.items()):
        if issubclass(type(thing), nn.Module) and name in ("_modules", "_buffers", "_parameters"):
            yield from ((f".{key}", member) for key, member in list(value.items()))
        elif not issubclass(type(value), types.ModuleType):
            yield f".{name}", value
    for cls in type(thing).__mro__:
        users = _is_users(cls)
        for name, value in list(vars(cls).items()) if users or "__slots__" in vars(cls) else ():
            if issubclass(type(value), types.MemberDescriptorType):
                with suppress(AttributeError):  # a slot that is not set
                    yield f".{name}", value.__get__(thing)
            elif users and not name.startswith("__") and not hasattr(type(value), "__get__"):  # no method, no property
                yield f".{name}", value
