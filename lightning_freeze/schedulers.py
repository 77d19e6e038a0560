"""The lists that LR schedulers keep with one entry a parameter group, also those of nested schedulers.

When groups are appended to an optimizer, these lists must grow with it, and a checkpoint must hold them as the user's
own groups have them. Which attributes are such lists is known by their names; torch has no register of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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


class Follower(Protocol):
    """An appended group: it takes everything from the group ``source``, learning rates times ``scale``."""

    @property
    def source(self) -> int:
        """The index of the group it follows."""

    @property
    def scale(self) -> float:
        """The factor on learning rates."""


def follow_groups(scheduler: Scheduler, own: int, followers: Sequence[Follower]) -> None:
    """Make every per-group list of a scheduler ``own`` entries long plus one for each follower.

    Calling it again, with other followers or after a checkpoint was loaded, gives the same as calling it once.

    Args:
        scheduler: Any scheduler, nested ones too.
        own: How many groups the user's optimizer has.
        followers: The groups appended to them, in order.
    """
    for node in _nodes(scheduler):
        for name, values in list(node.items()):
            if _is_per_group(name, values) and len(values) >= own:
                tail = [scaled(values[f.source], f.scale if _is_rate_list(name) else 1.0) for f in followers]
                node[name] = [*values[:own], *tail]


def own_state(state: dict[str, Any], own: int) -> dict[str, Any]:
    """Give a scheduler's ``state_dict()`` with the entries of the user's own groups only.

    Example:
        >>> own_state({"base_lrs": [0.1, 0.01], "milestones": [3, 9]}, 1)
        {'base_lrs': [0.1], 'milestones': [3, 9]}
    """
    return {name: _own_value(name, value, own) for name, value in state.items()}


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


def _own_value(name: str, value: Any, own: int) -> Any:
    if _is_per_group(name, value):
        return value[:own]
    if isinstance(value, list):  # the states of nested schedulers
        return [own_state(inner, own) if isinstance(inner, dict) else inner for inner in value]
    return value


def _is_per_group(name: str, values: object) -> bool:
    return isinstance(values, list) and name.endswith(_RATES + _OTHERS)


def _is_rate_list(name: str) -> bool:
    return name.endswith(_RATES)
