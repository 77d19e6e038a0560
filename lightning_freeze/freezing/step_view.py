"""Learning rate scales: parameter groups that an optimizer sees only while it steps."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# What of a parameter group belongs to its members.
_MEMBERS = frozenset({"params", "param_names"})


class Moving(Hashable, Protocol):
    """A scale that moves: a factor for each share of its way."""

    def at(self, done: float, /) -> float:
        """Return the factor when a share of the way is done, from 0 to 1."""


Scale: TypeAlias = float | Moving


def is_rate(option: str) -> bool:
    """Return whether an option of a parameter group is a learning rate.

    Example:
        >>> is_rate("lr"), is_rate("initial_lr"), is_rate("momentum")
        (True, True, False)
    """
    return option == "lr" or option.endswith("_lr")


def factor_at(scale: Scale, done: float = 0.0) -> float:
    """Return the factor of a scale when a share of its way is done.

    Example:
        >>> factor_at(0.5, done=1.0)
        0.5
    """
    return scale if isinstance(scale, float | int) else scale.at(done)


@dataclass
class _Part:
    """Members of one group that have the same scale in every phase; ``before`` is what the step began with."""

    scales: tuple[Scale, ...]
    group: dict[str, Any]
    factor: float = 1.0
    before: dict[str, Any] = field(default_factory=dict)

    def take(self, option: str, value: Any) -> None:
        """Take an option over from the user's group."""
        if not is_rate(option) or value is None:
            self.group[option] = value
        elif isinstance(value, Tensor) and isinstance(mine := self.group.get(option), Tensor):
            torch.mul(value, self.factor, out=mine)  # in place: captured graphs hold on to a rate that is a tensor
        else:
            self.group[option] = value * self.factor if isinstance(value, Tensor) or self.factor != 1.0 else value


@dataclass
class _Split:
    """The parts of one of the user's groups, and the options that they have taken over from it."""

    parts: list[_Part]
    seen: dict[str, Any] = field(default_factory=dict)

    def move(self, phase: int, factor: Callable[[Scale], float]) -> None:
        for part in self.parts:
            part.factor = factor(part.scales[phase])
        self.seen = {option: value for option, value in self.seen.items() if not is_rate(option)}

    def show(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the parts, with what the user or a scheduler has changed since the last step."""
        for option, value in group.items():
            # A tensor can have changed in place. What is unchanged stays each part's own: its running sums.
            if option not in _MEMBERS and (isinstance(value, Tensor) or self.seen.get(option, self) is not value):
                self.seen[option] = value
                for part in self.parts:
                    part.take(option, value)
        for part in self.parts:
            part.before = dict(part.group)
        return [part.group for part in self.parts]

    def hide(self, group: dict[str, Any]) -> None:
        """Write into the user's group what the step has changed in the first part."""
        first = self.parts[0]
        for option, value in first.group.items():
            if option in _MEMBERS or value is first.before.get(option, self):
                continue
            if not is_rate(option) or first.factor == 1.0:
                group[option] = self.seen[option] = value
            elif first.factor:  # what a step makes of a rate of 0 says nothing of the user's
                group[option] = self.seen[option] = value / first.factor

    def own(self) -> list[dict[str, Any]]:
        """Return, for each part, what its steps have written: running sums, not what it took from the user's group."""
        return [
            {
                option: value
                for option, value in part.group.items()
                if option not in _MEMBERS and not is_rate(option) and value is not self.seen.get(option)
            }
            for part in self.parts
        ]


class StepView:
    """Splits the groups of an optimizer by learning rate scale while it steps; at any other time they are the user's.

    Args:
        optimizer: The optimizer.
        scales: For each phase, the identity of each parameter whose learning rate is scaled, and its factor, or what
            moves it.

    Raises:
        ValueError: If the optimizer has no learning rate where one is scaled.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> view = StepView(sgd, scales=[{id(net[1].weight): 0.5}])
        >>> view.show(sgd)
        >>> [group["lr"] for group in sgd.param_groups]
        [0.1, 0.05]
        >>> view.hide(sgd)
        >>> [group["lr"] for group in sgd.param_groups]
        [0.1]
    """

    def __init__(self, optimizer: Optimizer, scales: Sequence[Mapping[int, Scale]]) -> None:
        self.optimizer = optimizer
        self._splits: dict[int, _Split] = {}
        self._moving = [any(not isinstance(scale, float | int) for scale in phase.values()) for phase in scales]
        self._hidden: list[tuple[Optimizer, list[dict[str, Any]]]] = []  # who shows the parts, and the user's groups
        for index, group in enumerate(optimizer.param_groups):
            places: dict[tuple[Scale, ...], list[int]] = {}
            for place, parameter in enumerate(group["params"]):
                places.setdefault(tuple(scale.get(id(parameter), 1.0) for scale in scales), []).append(place)
            if any(scale != 1.0 for own in places for scale in own):
                _check_rate(optimizer, index)
                self._splits[index] = _Split(
                    [
                        _Part(own, {key: [group[key][place] for place in members] for key in _MEMBERS & group.keys()})
                        for own, members in places.items()
                    ]
                )
        self.begin(0)

    def __bool__(self) -> bool:
        return bool(self._splits)

    @property
    def factors(self) -> dict[int, set[frozenset[float]]]:
        """The factors that are in a group at once, in any phase, by the index of the group that they split.

        Scales that move are taken at their beginning, in the middle and at their end.
        """
        return {
            index: {
                frozenset(factor_at(scale, done) for scale in scales)
                for scales in zip(*(part.scales for part in split.parts), strict=True)
                for done in (0.0, 0.5, 1.0)
            }
            for index, split in self._splits.items()
        }

    def begin(self, phase: int, factor: Callable[[Scale], float] = factor_at) -> None:
        """Take the scales of a phase; ``factor`` says, before each step, what one that moves is."""
        self._phase, self._factor = phase, factor
        self._move()

    def show(self, stepping: Optimizer) -> None:
        """Split the groups of an optimizer that begins to step, as far as they are this one's."""
        own = self._own()
        splits = {id(own[index]): split for index, split in self._splits.items() if index < len(own)}
        if not any(id(group) in splits for group in stepping.param_groups):
            return
        if self._moving[self._phase]:
            self._move()
        self._hidden.append((stepping, list(stepping.param_groups)))
        shown: list[dict[str, Any]] = []
        for group in stepping.param_groups:
            shown += splits[id(group)].show(group) if id(group) in splits else [group]
        stepping.param_groups[:] = shown

    def hide(self, stepping: Optimizer) -> None:
        """Restore the groups of an optimizer that has stepped."""
        if not self._hidden or self._hidden[-1][0] is not stepping:
            return
        _, groups = self._hidden.pop()
        stepping.param_groups[:] = groups
        own = self._own()
        for index, split in self._splits.items():
            split.hide(own[index])

    def state(self) -> list[list[dict[str, Any]]]:
        """Return what steps have counted in the parts of a group other than in the group itself, for a checkpoint."""
        return [split.own() for split in self._splits.values()]

    def load_state(self, options: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Take over what :meth:`state` returned, if the groups are split as they were."""
        if [len(own) for own in options] == [len(split.parts) for split in self._splits.values()]:
            for (index, split), own in zip(self._splits.items(), options, strict=True):
                split.show(self.optimizer.param_groups[index])
                for part, values in zip(split.parts, own, strict=True):
                    part.group.update(values)

    def rate(self, parameter: nn.Parameter) -> float | None:
        """Return the learning rate at which a parameter would be stepped now, None if it is in no group."""
        for index, group in enumerate(self.optimizer.param_groups):
            if any(member is parameter for member in group["params"]):
                parts = self._splits[index].parts if index in self._splits else []
                own = (part.scales for part in parts if any(m is parameter for m in part.group["params"]))
                return float(group["lr"]) * next((self._factor(scales[self._phase]) for scales in own), 1.0)
        return None

    def _move(self) -> None:
        for split in self._splits.values():
            split.move(self._phase, self._factor)

    def _own(self) -> list[dict[str, Any]]:
        """Return the user's groups, also while the optimizer, or one that shares its list, shows the parts."""
        shown = self.optimizer.param_groups
        return next((groups for showing, groups in self._hidden if showing.param_groups is shown), shown)


def _check_rate(optimizer: Optimizer, index: int) -> None:
    group = optimizer.param_groups[index]
    rates = [value for key, value in group.items() if is_rate(key)]
    if not isinstance(group.get("lr", next(iter(rates), None)), numbers.Real | Tensor):
        raise ValueError(
            f"lr_scale scales lr, which is {repr(group['lr']) if 'lr' in group else 'not there'} in group {index} "
            f"of {type(optimizer).__name__}. Give it an lr that is a number, or leave lr_scale out."
        )
