"""The lists that LR schedulers keep with one entry a parameter group, also those of nested schedulers.

When groups are appended to an optimizer, these lists must grow with it, and a checkpoint must hold them as the user's
own groups have them. Which attributes are such lists is known by their names, as torch has no register of them. Names
that users gave can mislead: a list of stages may be called ``stage_lrs`` too. For their classes it is tried out.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Any, Protocol, TypeGuard

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# base_lrs, max_lrs, min_lrs, _last_lr: learning rates. lr_lambdas, base_momentums, max_momentums: not.
_RATES = ("_lrs", "_last_lr")
_OTHERS = ("_lambdas", "_momentums")
# Where a group's rate stands, and where a scheduler writes with which it began.
_BEGINS = ("lr", "initial_lr")
# What torch's base class keeps with an entry a group, in every scheduler.
_OF_BASE = ("base_lrs", "_last_lr")
# Every choice among eight lists; of more, those that turn few.
_TRIALS = 256
# Longer lists hold data, and no schedulers.
_FEW = 64

#: What of a parameter group belongs to its members.
MEMBERS = frozenset({"params", "param_names", "name", "adopted"})


class Scheduler(Protocol):
    """What a learning rate scheduler is here: anything that keeps its state in attributes."""

    __dict__: dict[str, Any]
    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint holds of it."""


#: A list of one scheduler: the identity of the scheduler's attributes, and the list's name.
Place = tuple[int, str]


class Follower(Protocol):
    """An appended group: it takes everything from the group ``source``, learning rates times ``scale``."""

    @property
    def source(self) -> int:
        """The index of the group it follows."""

    @property
    def scale(self) -> float:
        """The factor on learning rates."""


@dataclass
class _Unlike:
    """A follower whose rates are nobody else's."""

    source: int
    scale: float = 0.6180339887


def schedulers_of(optimizer: Optimizer, holders: Iterable[object] = ()) -> list[Scheduler]:
    """Give every LR scheduler of an optimizer, also what nobody returned from ``configure_optimizers``.

    Args:
        optimizer: The optimizer.
        holders: Objects that may hold schedulers of classes that are not of torch's, in attributes and in lists, tuples
            and dicts there. Those of torch's classes are found wherever they are.
    """
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), LRScheduler)]
    found = {id(node): node for thing in [*alive, *holders] for node in _nodes(thing, optimizer)}
    return list(found.values())


def lists_apart(schedulers: Sequence[Scheduler], own: int, followers: Sequence[Follower]) -> dict[Place, bool]:
    """Tell which lists have an entry a group although their names do not say so, and which have none though they do.

    A class that computes its rates in a ``get_lr()`` of the user's is asked for them, now and for later: the rates of
    the user's groups have to be what they are without the groups appended.

    Args:
        schedulers: Schedulers, each nested one among them. They are left as they were.
        own: How many groups the user's optimizer has.
        followers: The groups appended to them, in order.

    Returns:
        For each list that is not what its name says, whether it has an entry a group.

    Raises:
        ValueError: If a class gives no rates for the groups appended, or other rates for the user's.
    """
    apart: dict[Place, bool] = {}
    for node in schedulers:
        for name, values in _sequences(node):
            if _is_per_group(name):
                if len(values) != own:
                    apart[id(node), name] = False
            elif not (_is_of_torch(type(node)) or _is_asked(node)) and _are_rates(values, node.optimizer, own):
                apart[id(node), name] = True
    for node in schedulers:
        if followers and _is_asked(node):
            apart |= _by_trial(node, own, followers, apart)
    return apart


def follow_groups(
    scheduler: Scheduler, own: int, followers: Sequence[Follower], apart: Mapping[Place, bool] | None = None
) -> None:
    """Make every per-group list of a scheduler ``own`` entries long plus one for each follower.

    Calling it again, with other followers or after a checkpoint was loaded, gives the same as calling it once.

    Args:
        scheduler: Any scheduler, nested ones too.
        own: How many groups the user's optimizer has.
        followers: The groups appended to them, in order.
        apart: What :func:`lists_apart` gave.
    """
    for node, name, values in list(_lists(scheduler, apart or {})):
        # What is as it should be stays the user's own object; a checkpoint can have brought entries of its own groups.
        if len(values) > own or (followers and len(values) == own):
            tail = [scaled(values[f.source], f.scale if name.endswith(_RATES) else 1.0) for f in followers]
            node.__dict__[name] = type(values)([*values[:own], *tail])


@contextmanager
def first_groups(scheduler: Scheduler, count: int, apart: Mapping[Place, bool] | None = None) -> Iterator[None]:
    """Show only the entries of the first ``count`` groups for the time of the context, to save the scheduler.

    Args:
        scheduler: Any scheduler, nested ones too.
        count: How many groups the checkpoint has.
        apart: What :func:`lists_apart` gave.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(adam, 9)
        >>> with first_groups(scheduler, 1):
        ...     state = scheduler.state_dict()
        >>> state["base_lrs"], scheduler.base_lrs
        ([0.1], [0.1, 0.1])
    """
    whole = list(_lists(scheduler, apart or {}))
    for node, name, values in whole:
        node.__dict__[name] = values[:count]
    try:
        yield
    finally:
        for node, name, values in whole:
            node.__dict__[name] = values


def scaled_rates(group: dict[str, Any], scale: float) -> dict[str, Any]:
    """Give a parameter group's options, its learning rates times ``scale``, without what belongs to its members."""
    return {key: scaled(value, scale) if is_rate(key) else value for key, value in group.items() if key not in MEMBERS}


@functools.cache
def is_rate(option: str) -> bool:
    """Whether an option of a parameter group is a learning rate."""
    return option == "lr" or option.endswith("_lr")


def scaled(value: Any, scale: float) -> Any:
    """Give a number or tensor times ``scale``; a tensor is always a new one."""
    if isinstance(value, Tensor):
        return value * scale
    return value if scale == 1.0 else value * scale


def _nodes(thing: object, optimizer: object) -> Iterator[Any]:
    """Give the schedulers of an optimizer that a thing is or has in attributes, and those in them."""
    seen: set[int] = set()
    ahead = [thing]
    while ahead:
        thing = ahead.pop()
        is_scheduler = _attributes(thing).get("optimizer") is optimizer and callable(getattr(thing, "step", None))
        if id(thing) not in seen and (is_scheduler or not seen):
            seen.add(id(thing))
            if is_scheduler:
                yield thing
            ahead += _inside(list(_attributes(thing).values()))


def _attributes(thing: object) -> dict[str, Any]:
    """Give what an instance holds: to ask it by name could run a property."""
    attributes = getattr(thing, "__dict__", None)
    return attributes if type(attributes) is dict else {}


def _inside(values: Sequence[object], depth: int = 2) -> Iterator[object]:
    """Give what is in values, and in small containers among them."""
    for value in values:
        if isinstance(value, list | tuple | dict):
            if depth and len(value) <= _FEW:
                yield from _inside(list(value.values() if isinstance(value, dict) else value), depth - 1)
        else:
            yield value


def _sequences(node: Scheduler) -> list[tuple[str, Any]]:
    return [(name, values) for name, values in node.__dict__.items() if type(values) in (list, tuple)]


def _lists(scheduler: Scheduler, apart: Mapping[Place, bool]) -> Iterator[tuple[Scheduler, str, Any]]:
    for node in _nodes(scheduler, scheduler.optimizer):
        for name, values in _sequences(node):
            if apart.get((id(node), name), _is_per_group(name)):
                yield node, name, values


def _is_per_group(name: str) -> bool:
    return name.endswith(_RATES + _OTHERS)


def _is_of_torch(made: object) -> bool:
    return str(getattr(made, "__module__", "")).startswith("torch.")


def _is_asked(node: object) -> TypeGuard[LRScheduler]:
    """Whether it computes rates in a method that is not torch's; what those read is known by name."""
    return isinstance(node, LRScheduler) and not _is_of_torch(type(node).get_lr)


def _are_rates(values: Sequence[Any], optimizer: Optimizer, own: int) -> bool:
    """Whether these are the learning rates that groups have, or began with."""
    if len(values) != own or not all(isinstance(value, float) for value in values):
        return False
    return any(list(values) == [group.get(key) for group in optimizer.param_groups[:own]] for key in _BEGINS)


def _by_trial(
    asked: LRScheduler, own: int, followers: Sequence[Follower], apart: Mapping[Place, bool]
) -> dict[Place, bool]:
    """Find the lists that have to follow, as near as can be to what their names say."""
    nodes = list(_nodes(asked, asked.optimizer))
    known = {id(node) for node in nodes}
    places = {
        (id(node), name): apart.get((id(node), name), _is_per_group(name))
        for node in nodes
        for name, values in _sequences(node)
        if len(values) == own and name not in _OF_BASE and not any(id(value) in known for value in values)
    }
    # A scale that is 1 for now would hide that an entry has got where it is read for the user's own group.
    unlike = [_Unlike(follower.source) for follower in followers]
    groups = asked.optimizer.param_groups
    appended = groups[own:]
    del groups[own:]
    alone = _rates_to_come(asked, nodes)
    groups.extend(appended)
    choices = chain.from_iterable(combinations(places, count) for count in range(len(places) + 1))
    for turned in islice(choices, _TRIALS):
        trial = {**apart, **{place: places[place] != (place in turned) for place in places}}
        with _unchanged(nodes, groups):
            follow_groups(asked, own, unlike, trial)
            rates = _rates_to_come(asked, nodes)
        if all(a is None or (b is not None and b[:own] == a) for a, b in zip(alone, rates, strict=True)):
            return {place: trial[place] for place in turned}
    raise ValueError(
        f"{type(asked).__name__}.get_lr() does not give learning rates for a parameter group that is added to its "
        "optimizer, as lr_scale does, or a phase that trains what the optimizer was not given. Compute them from "
        "self.optimizer.param_groups, or from lists with an entry a group whose names end in _lrs; or give the "
        "optimizer all parameters, with groups of their own rates, and leave lr_scale out."
    )


def _rates_to_come(scheduler: LRScheduler, nodes: Sequence[Scheduler]) -> list[list[str] | None]:
    """Give the rates of each group at some epochs, as text for comparison; None where it cannot be asked or fails."""
    rates: list[list[str] | None] = []
    groups = scheduler.optimizer.param_groups
    for epoch in (0, *(2**power for power in range(16))):
        with _unchanged(nodes, groups), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.last_epoch = epoch
            scheduler._get_lr_called_within_step = True
            try:
                answer = [str(float(rate)) for rate in scheduler.get_lr()]
            except Exception:  # whatever the user's code raises where it is not made for this epoch or these groups
                answer = []
        rates.append(answer if len(answer) == len(groups) else None)
    return rates


@contextmanager
def _unchanged(nodes: Sequence[Scheduler], groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Put back, after the context, what schedulers and groups hold, also what is in their lists and dicts."""
    dicts: list[dict[Any, Any]] = [*(node.__dict__ for node in nodes), *groups]
    inner = [value for held in dicts for key, value in held.items() if key not in MEMBERS]
    dicts += [value for value in inner if type(value) is dict]
    lists = [value for value in inner if type(value) is list]
    tensors = [(value, value.clone()) for value in inner if isinstance(value, Tensor)]
    before = [dict(held) for held in dicts], [list(held) for held in lists]
    try:
        yield
    finally:
        for held, content in zip(dicts, before[0], strict=True):
            held.clear()
            held.update(content)
        for values, entries in zip(lists, before[1], strict=True):
            values[:] = entries
        for tensor, value in tensors:
            tensor.copy_(value)
