"""The lists that LR schedulers keep with one entry a parameter group, also those of nested schedulers.

When groups are appended to an optimizer, these lists must grow with it, and a checkpoint must hold them as the user's
own groups have them. Which attributes are such lists is known by their names, as torch has no register of them, and by
their length: a list of stages may be called ``stage_lrs`` too.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

# base_lrs, max_lrs, min_lrs, _last_lr: learning rates. lr_lambdas, base_momentums, max_momentums: not.
_RATES = ("_lrs", "_last_lr")
_OTHERS = ("_lambdas", "_momentums")

#: What of a parameter group belongs to its members.
MEMBERS = frozenset({"params", "param_names", "name", "adopted"})


class Scheduler(Protocol):
    """What a learning rate scheduler is here: anything that keeps its state in attributes."""

    __dict__: dict[str, Any]

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


def other_lists(scheduler: Scheduler, own: int) -> set[Place]:
    """Give the lists that are called like lists with an entry a group and are none, before groups are appended.

    Args:
        scheduler: Any scheduler, nested ones too.
        own: How many groups the optimizer has.
    """
    return {(id(node), name) for node, name, values in _lists(scheduler, ()) if len(values) != own}


def follow_groups(
    scheduler: Scheduler, own: int, followers: Sequence[Follower], others: Collection[Place] = ()
) -> None:
    """Make every per-group list of a scheduler ``own`` entries long plus one for each follower.

    Calling it again, with other followers or after a checkpoint was loaded, gives the same as calling it once.

    Args:
        scheduler: Any scheduler, nested ones too.
        own: How many groups the user's optimizer has.
        followers: The groups appended to them, in order.
        others: What :func:`other_lists` gave; these are left alone.
    """
    for node, name, values in list(_lists(scheduler, others)):
        # What is as it should be stays the user's own object; a checkpoint can have brought entries of its own groups.
        if len(values) > own or (followers and len(values) == own):
            tail = [scaled(values[f.source], f.scale if _is_rate_list(name) else 1.0) for f in followers]
            node[name] = [*values[:own], *tail]


@contextmanager
def first_groups(scheduler: Scheduler, count: int, others: Collection[Place] = ()) -> Iterator[None]:
    """Show only the entries of the first ``count`` groups for the time of the context, to save the scheduler.

    Args:
        scheduler: Any scheduler, nested ones too.
        count: How many groups the checkpoint has.
        others: What :func:`other_lists` gave; these are left alone.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(adam, 9)
        >>> with first_groups(scheduler, 1):
        ...     state = scheduler.state_dict()
        >>> state["base_lrs"], scheduler.base_lrs
        ([0.1], [0.1, 0.1])
    """
    whole = list(_lists(scheduler, others))
    for node, name, values in whole:
        node[name] = values[:count]
    try:
        yield
    finally:
        for node, name, values in whole:
            node[name] = values


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


def _nodes(scheduler: Scheduler) -> Iterator[dict[str, Any]]:
    yield scheduler.__dict__
    for value in list(scheduler.__dict__.values()):
        if isinstance(value, list | tuple):
            for inner in value:
                if hasattr(inner, "optimizer") and hasattr(inner, "get_last_lr"):
                    yield from _nodes(inner)


def _lists(scheduler: Scheduler, others: Collection[Place]) -> Iterator[tuple[dict[str, Any], str, list[Any]]]:
    for node in _nodes(scheduler):
        for name, values in node.items():
            if _is_per_group(name, values) and (id(node), name) not in others:
                yield node, name, values


def _is_per_group(name: str, values: object) -> bool:
    return isinstance(values, list) and name.endswith(_RATES + _OTHERS)


def _is_rate_list(name: str) -> bool:
    return name.endswith(_RATES)
