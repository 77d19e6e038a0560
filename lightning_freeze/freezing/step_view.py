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
MEMBERS = frozenset({"params", "param_names"})

Group = dict[str, Any]


class Moving(Hashable, Protocol):
    """A scale that moves: a factor for each share of its way."""

    def at(self, done: float, /) -> float:
        """Return the factor when a share of the way is done, from 0 to 1."""


Scale: TypeAlias = float | Moving


def is_rate(option: str) -> bool:
    """Return whether an option of a parameter group is a learning rate: ``lr``, or one such as ``initial_lr``."""
    return option == "lr" or option.endswith("_lr")


def factor_at(scale: Scale, done: float = 0.0) -> float:
    """Return the factor of a scale when a share of its way is done."""
    return scale if isinstance(scale, float | int) else scale.at(done)


@dataclass
class _Split:
    """One of the user's groups in parts, each of the members that have the same scale in every phase."""

    group: Group
    parts: list[Group]
    scales: list[tuple[Scale, ...]]  # of each part, in each phase
    factors: list[float] = field(default_factory=list)
    seen: Group = field(default_factory=dict)  # the options that the parts have taken over from the user's group
    before: Group = field(default_factory=dict)  # the first part as the step found it

    def together(self) -> set[frozenset[float]]:
        """Return the factors that are there at once; of those that move, the first, one in the middle, and the last."""
        return {
            frozenset(factor_at(scale, done) for scale in scales)
            for scales in zip(*self.scales, strict=True)
            for done in (0.0, 0.5, 1.0)
        }

    def move(self, phase: int, factor: Callable[[Scale], float]) -> None:
        self.factors = [factor(scales[phase]) for scales in self.scales]
        self.seen = {option: value for option, value in self.seen.items() if not is_rate(option)}

    def show(self) -> list[Group]:
        """Return the parts, with what the user or a scheduler has changed since the last step."""
        seen = self.seen
        for option, value in self.group.items():
            # What is unchanged stays each part's own: its running sums.
            if seen.get(option, self) is value or option in MEMBERS:
                continue
            is_tensor = isinstance(value, Tensor)
            if not is_tensor:  # one can change in place, so it is taken over at every step
                seen[option] = value
            scales = value is not None and is_rate(option)
            for part, factor in zip(self.parts, self.factors, strict=True):
                if scales and is_tensor:  # written in place: captured graphs hold on to a rate that is a tensor
                    mine = part.get(option)
                    part[option] = torch.mul(value, factor, out=mine if isinstance(mine, Tensor) else None)
                else:
                    part[option] = value * factor if scales else value
        self.before = self.parts[0].copy()
        return self.parts

    def hide(self) -> None:
        """Write into the user's group what the step has changed in the first part."""
        before = self.before
        for option, value in self.parts[0].items():
            if before.get(option, self) is value or option in MEMBERS:
                continue
            scale = self.factors[0] if is_rate(option) else 1.0
            if not scale:  # what a step makes of a rate of 0 says nothing of the user's
                continue
            self.group[option] = value if scale == 1.0 else value / scale
            if not isinstance(value, Tensor):
                self.seen[option] = self.group[option]

    def own(self) -> list[Group]:
        """Return, for each part, what its steps have written: running sums, not what it took from the user's group."""
        return [
            {o: v for o, v in part.items() if not (o in MEMBERS or is_rate(o) or v is self.seen.get(o))}
            for part in self.parts
        ]


class StepView:
    """Splits the groups of an optimizer by learning rate scale while it steps; at any other time they are the user's.

    ``scales`` and what is raised are as of :class:`PhasedOptimizer`.

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
        self.optimizer, self._scales = optimizer, scales
        self._moving = [any(not isinstance(scale, float | int) for scale in phase.values()) for phase in scales]
        self._built: list[tuple[int, ...]] = []  # the layout of the groups that were split
        self._splits: dict[tuple[int, ...], _Split] = {}
        self._showing: list[tuple[Optimizer, list[Group]]] = []  # with the groups that were in the place of the parts
        self.begin(0)
        self._split()

    def __bool__(self) -> bool:
        return bool(self._splits)

    @property
    def factors(self) -> list[tuple[Group, set[frozenset[float]]]]:
        """The groups that are split, each with the factors that are in it at once, in any phase."""
        return [(split.group, split.together()) for split in self._splits.values()]

    def begin(self, phase: int, factor: Callable[[Scale], float] = factor_at) -> None:
        """Take the scales of a phase; ``factor`` says, before each step, what one that moves is."""
        self._phase, self._factor = phase, factor
        self._move()

    def show(self, stepping: Optimizer) -> None:
        """Split the groups of an optimizer that begins to step, as far as they are this one's."""
        if not self._showing:
            self._split()
        split_of, groups = {id(split.group): split for split in self._splits.values()}, stepping.param_groups
        if split_of.keys().isdisjoint(map(id, groups)):
            return
        if self._moving[self._phase]:
            self._move()
        shown: list[Group] = []
        for group in groups:
            split = split_of.get(id(group))
            shown += [group] if split is None else split.show()
        self._showing.append((stepping, groups[:]))
        groups[:] = shown

    def hide(self, stepping: Optimizer) -> None:
        """Restore the groups of an optimizer that has stepped."""
        if not self._showing or self._showing[-1][0] is not stepping:
            return
        _, stepping.param_groups[:] = self._showing.pop()
        for split in self._splits.values():
            split.hide()

    def state(self) -> list[list[Group]]:
        """Return what steps have counted in the parts of a group other than in the group itself, for a checkpoint."""
        return [split.own() for split in self._splits.values()]

    def load_state(self, options: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Take over what :meth:`state` returned, if the groups are split as they were."""
        self._split()  # a load has exchanged the groups
        if [len(own) for own in options] == [len(split.parts) for split in self._splits.values()]:
            for split, own in zip(self._splits.values(), options, strict=True):
                for part, values in zip(split.show(), own, strict=True):
                    part.update(values)

    def rate(self, parameter: nn.Parameter) -> float | None:
        """Return the learning rate at which a parameter would be stepped now, None if it is in no group."""
        for group in self.optimizer.param_groups:
            if any(member is parameter for member in group["params"]):
                return float(group["lr"]) * self._factor(self._scales[self._phase].get(id(parameter), 1.0))
        return None

    def _split(self) -> None:
        """Split the groups, anew where somebody has added, moved, exchanged or taken out some of them, or members."""
        groups = self.optimizer.param_groups
        layout = [(id(group), len(group["params"]), *map(id, group["params"][:1])) for group in groups]
        if layout == self._built:
            return
        kept = {key[1:]: split for key, split in self._splits.items()}
        self._built, self._splits = layout, {}
        for index, (key, group) in enumerate(zip(layout, groups, strict=True)):
            places: dict[tuple[Scale, ...], list[int]] = {}
            for place, parameter in enumerate(group["params"]):
                places.setdefault(tuple(scale.get(id(parameter), 1.0) for scale in self._scales), []).append(place)
            if any(scale != 1.0 for own in places for scale in own):
                _check_rate(self.optimizer, index)
                own = [{k: [group[k][p] for p in at] for k in MEMBERS & group.keys()} for at in places.values()]
                split = self._splits[key] = kept.get(key[1:]) or _Split(group, own, list(places))
                split.group = group
        self._move()

    def _move(self) -> None:
        for split in self._splits.values():
            split.move(self._phase, self._factor)


def _check_rate(optimizer: Optimizer, index: int) -> None:
    group = optimizer.param_groups[index]
    rates = [value for key, value in group.items() if is_rate(key)]
    if not isinstance(group.get("lr", next(iter(rates), None)), numbers.Real | Tensor):
        raise ValueError(
            f"lr_scale scales lr, which is {repr(group['lr']) if 'lr' in group else 'not there'} in group {index} "
            f"of {type(optimizer).__name__}. Give it an lr that is a number, or leave lr_scale out."
        )
