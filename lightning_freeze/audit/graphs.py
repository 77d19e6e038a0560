"""Tensors that keep a graph alive, and the way to them."""

from __future__ import annotations

import gc
import re
import sys
import sysconfig
import types
from collections import defaultdict, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

_THINGS = 300_000
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, range, torch.dtype, torch.device, torch.Generator)


def tensors_with_graph(ignore: Container[int] = ()) -> list[Tensor]:
    """Give all living tensors that have a graph behind them, wherever they are.

    Between two training steps there should be none. Python's garbage collector knows them all, so a list in a closure
    or in a global is found as well as an attribute. What only waits to be collected does not count.

    Args:
        ignore: The identities of tensors that may have one.

    Example:
        >>> known = {id(tensor) for tensor in tensors_with_graph()}
        >>> weight = torch.ones(2, requires_grad=True)
        >>> losses = [weight.sum(), weight.detach().sum()]
        >>> [tensor is losses[0] for tensor in tensors_with_graph(known)]
        [True]
    """
    found = _with_graph(ignore)
    if found:
        del found
        gc.collect()  # a cycle that nobody can reach any longer keeps nothing alive
        found = _with_graph(ignore)
    return found


def _with_graph(ignore: Container[int]) -> list[Tensor]:
    tensors = _instances(set(_subclasses(Tensor)) - {FakeTensor})
    return [tensor for tensor in tensors if id(tensor) not in ignore and tensor.grad_fn is not None]


def _instances(kinds: set[type]) -> list[Any]:
    """Give all living objects of exactly these types.

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


def ways_to(tensors: Iterable[Tensor], roots: Mapping[str, Any], *, avoid: Container[int] = ()) -> dict[int, str]:
    """Give the shortest way from named roots to each tensor, as one would write it in Python.

    Args:
        tensors: What is looked for.
        roots: Name to object. Attributes, also of the user's classes, mappings, sequences, sets, closures, bound
            arguments and what a tensor is a view of are followed; no property is read.
        avoid: The identities of objects that are not followed.

    Returns:
        The identity of each tensor that was found, and the way to it.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.history = {"loss": [net(torch.ones(1, 2)).sum()]}
        >>> list(ways_to(net.history["loss"], {"self": net}).values())
        ["self.history['loss'][0]"]
    """
    wanted = {id(tensor) for tensor in tensors}
    ways: dict[int, str] = {}
    seen = {id(root) for root in roots.values()}
    todo = deque(roots.items())
    left = _THINGS
    while todo and left and len(ways) < len(wanted):
        left -= 1
        way, thing = todo.popleft()
        for step, child in _children(thing):
            if id(child) in seen or id(child) in avoid or isinstance(child, _PLAIN):
                continue
            seen.add(id(child))
            if isinstance(child, Tensor):
                if id(child) in wanted:
                    ways[id(child)] = way + step
                elif (base := _base(child)) is not None and id(base) in wanted:
                    ways.setdefault(id(base), f"{way}{step}._base ({way}{step} is a view of it)")
            else:
                todo.append((way + step, child))
    return ways


def _base(tensor: Tensor) -> Tensor | None:
    """Give what a tensor is a view of; one made under ``no_grad`` has no graph, and keeps that of its base alive."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor._base


def by_design(module: nn.Module) -> set[int]:
    """Give the identities of tensors that have a graph because a module computes them from others in every forward.

    The classic weight and spectral normalisation and pruning keep ``weight``, computed from ``weight_g``,
    ``weight_orig`` and so on, as an attribute until the next forward.

    Example:
        >>> net = torch.nn.utils.spectral_norm(nn.Linear(2, 1))
        >>> id(net.weight) in by_design(net)
        True
    """
    return {
        id(tensor)
        for child in module.modules()
        for name in {name.rpartition("_")[0] for name in _own_parameters(child) if name.endswith(("_g", "_v", "_orig"))}
        for tensor in [child.__dict__.get(name), *_flat(child)]
        if isinstance(tensor, Tensor)
    }


def _own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]  # a scripted module has no dict of them


def _flat(module: nn.Module) -> list[Any]:
    return list(module.__dict__.get("_flat_weights", ()))


def container(way: str) -> str:
    """Give the way to what a tensor is kept in: the same for all members of one list.

    Example:
        >>> container("self.losses[31]"), container("self.last"), container("self.a[2]._base (… is a view of it)")
        ('self.losses', 'self.last', 'self.a')
    """
    return re.sub(r"(\[\d+\])+(\._base \(.*\))?$", "", way)


def globals_of_users() -> dict[str, Any]:
    """Give the modules that are the user's own, by name: neither of the standard library nor installed."""
    return {
        name: module
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and _is_users(name)
    }


def _is_users(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    own = module == "__main__" or (file is not None and not str(file).startswith(_LIBRARIES))
    return own and not module.startswith("lightning_freeze")


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping) and isinstance(thing, dict):
        for key, value in list(dict.items(thing)):
            yield f"[{key!r}]" if isinstance(key, str | int | float | bool) else "[…]", value
        return
    if isinstance(thing, list | tuple | deque):
        for index, value in enumerate(list(thing)):
            yield f"[{index}]", value
    elif isinstance(thing, set | frozenset):
        for value in list(thing):
            yield "{…}", value
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                yield f".{name}", cell.cell_contents
            except ValueError:  # an empty cell
                continue
        for value in thing.__defaults__ or ():
            yield ".__defaults__", value
        return
    elif isinstance(thing, types.MethodType):
        yield ".__self__", thing.__self__
        yield ".__func__", thing.__func__
        return
    elif isinstance(thing, partial):
        yield ".args", thing.args
        yield ".keywords", thing.keywords
    elif isinstance(thing, types.ModuleType):
        for name, value in list(vars(thing).items()):
            if not isinstance(value, types.ModuleType):
                yield f".{name}", value
        return
    yield from _attributes(thing)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        own = {}
    for name, value in list(own.items()) if isinstance(own, dict) else ():
        if isinstance(thing, nn.Module) and name in ("_modules", "_buffers", "_parameters"):
            for key, member in list(value.items()):
                yield f".{key}", member
        else:
            yield f".{name}", value
    for cls in type(thing).__mro__:
        for name in (
            cls.__dict__.get("__slots__", ()) if isinstance(cls.__dict__.get("__slots__"), list | tuple) else ()
        ):
            slot = cls.__dict__.get(name)
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield f".{name}", slot.__get__(thing)
                except AttributeError:  # not set
                    continue
        if _is_users(cls.__module__):
            for name, value in list(cls.__dict__.items()):
                if not name.startswith("__") and not hasattr(type(value), "__get__"):  # neither method nor property
                    yield f".{name}", value
