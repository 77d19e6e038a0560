"""What a schedule does over a whole fit: when each phase holds, what trains then, and at which rate."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, callbacks_of
from lightning_freeze.freezing.batchnorm import affine_frozen_by_hand, has_running_statistics
from lightning_freeze.freezing.eval_mode import BY_HAND, interceptor
from lightning_freeze.freezing.holder import Holder, ledger_of
from lightning_freeze.functional import can_train
from lightning_freeze.schedule.length import planned_length, steps_in_all, steps_per_epoch
from lightning_freeze.schedule.meaning import resolve_phases
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.preset import phases_for
from lightning_freeze.schedule.progress import Begin, End, planned, walk
from lightning_freeze.schedule.rates import Length, Ramp, planned_factor
from lightning_freeze.selectors import named_unique_parameters, unwrapped
from lightning_freeze.words import whole_number

if TYPE_CHECKING:
    from lightning_freeze.schedule.callback import FreezeSchedule

Factor = float | Ramp
Span = tuple[float, float]

# The steps that an epoch of unknown length counts as: more than any fit takes, and shares of it come out.
_UNKNOWN = 10**12


@dataclass(frozen=True)
class FitLength:
    """How long a fit takes, in optimizer steps, and whether it is shown in these or in epochs."""

    total: int
    unit: Literal["epoch", "step"]
    per_epoch: float = _UNKNOWN  # optimizer steps an epoch takes

    @classmethod
    def of(
        cls,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        per_epoch: int | None = None,
        trainer: Trainer | None = None,
    ) -> FitLength:
        """Return the length of a fit that ends at the first of its limits; those of the Trainer if none is given."""
        if max_epochs is None and max_steps is None and trainer is not None:
            max_epochs, max_steps = (n if n and n > 0 else None for n in (trainer.max_epochs, trainer.max_steps))
        if max_epochs is not None or max_steps is None:
            max_epochs = whole_number("preview", "max_epochs", max_epochs)
        if max_steps is not None:
            max_steps = whole_number("preview", "max_steps", max_steps)
        known = steps_per_epoch(trainer) if trainer is not None else None
        if per_epoch is not None:
            known = whole_number("preview", "steps_per_epoch", per_epoch)
        length = cls(max_steps or sys.maxsize, "step" if max_epochs is None else "epoch", known or _UNKNOWN)
        if max_epochs is None:
            return length
        if max_steps is not None:
            length.check("With max_epochs,", steps=max_steps)
        return replace(length, total=min(length.total, round(max_epochs * length.per_epoch)))

    @property
    def size(self) -> float:
        """The steps of one of the unit."""
        return self.per_epoch if self.unit == "epoch" else 1

    def knows(self, unit: str) -> bool:
        """Return whether epochs, or steps, can be told in the unit."""
        return unit == self.unit or self.per_epoch != _UNKNOWN

    def check(self, who: str, *, epochs: float | None = None, steps: int | None = None) -> None:
        """Raise a ValueError for a number of epochs or steps that cannot be told in the unit."""
        for unit, count in (("epoch", epochs), ("step", steps)):
            if count is not None and not self.knows(unit):
                raise ValueError(f"{who} {count:,.15g} {unit}{'s' * (count != 1)}: give steps_per_epoch.")

    def planned(self, phases: Sequence[Phase]) -> tuple[Phase, ...]:
        """Return a schedule as the fit goes through it; raise a ValueError if that cannot be told in the unit."""
        for phase in phases:
            self.check(f"Phase {phase.label!r} lasts", epochs=phase.epochs, steps=phase.steps)
        return planned(phases, self.total)

    def borders(self, phases: Sequence[Phase]) -> list[int]:
        """Return the steps at which phases begin, and at which the last one ends; none is beyond the end of the fit.

        When a plateau comes, nobody knows: a phase that only a plateau or a function ends has an equal share of what
        is left.

        Example:
            >>> FitLength.of(4, per_epoch=10).borders([Phase("a", steps=15), Phase("b", epochs=9), Phase("c")])
            [0, 15, 40, 40]
        """

        def share(begin: Begin) -> End:
            step = begin[1] + max(1, round((self.total - begin[1]) / (len(phases) - begin[2])))
            return step, int(step / self.per_epoch), ""

        begins = walk([*phases, Phase("*")], math.inf, math.inf, self.per_epoch, share)
        return [min(step, self.total) for _, step, _ in begins]


@dataclass(frozen=True)
class Plan:
    """A schedule over a fit of one module."""

    phases: Sequence[Phase]
    model: nn.Module  # without wrappers
    length: FitLength
    reached: dict[int, Span]  # for each phase that begins, from where to where it lasts, in the length's unit
    factors: list[dict[str, Factor]]  # for each phase, the learning rate scale of all that trains, by name
    in_eval: list[set[nn.Module]]  # for each phase, the modules that run in eval mode
    happened: bool = False  # whether this is what a fit did, rather than what one would do

    @classmethod
    def of(
        cls,
        schedule: FreezeSchedule,
        model: nn.Module,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
        callbacks: Sequence[Callback] | None = None,
        *,
        happened: bool = False,
    ) -> Plan:
        """Return the plan of a schedule, with the arguments of :meth:`FreezeSchedule.preview`.

        With ``happened`` it is what the schedule did, if it has begun in a fit of the model.
        """
        model, trainer = unwrapped(model), trainer_of(model)
        past = _went(schedule, trainer) if happened and trainer is not None else None
        length, borders = past or (FitLength.of(max_epochs, max_steps, steps_per_epoch, trainer), None)
        if callbacks is None:
            callbacks = callbacks_of(trainer) if trainer is not None else []
        parameters, layers = named_unique_parameters(model), running_statistics(model)
        ledger = ledger_of(trainer) if trainer is not None else None
        found = {id(p) for p in parameters.values() if can_train(p) and not p.requires_grad}
        came_frozen = found if ledger is None else ledger.came_frozen
        holds = {one.state_key: one.holds(model) for one in callbacks if isinstance(one, Holder)}
        held = {key: who for who, hold in holds.items() for key in hold.frozen}
        held |= dict.fromkeys(affine_frozen_by_hand(model.modules()), BY_HAND)
        steps = length.total if length.knows("step") else math.inf
        phases = schedule.progress.phases
        if borders is None:
            phases = length.planned(phases_for(schedule.phases, model, {*came_frozen, *held}, steps))
            borders = length.borders(phases)
        resolved = resolve_phases(
            model,
            phases,
            came_frozen=came_frozen,
            held=held,
            mode=schedule.frozen_mode,
            left_alone={module for hold in holds.values() for module in hold.own},
        )
        stay = {module for hold in holds.values() for module in hold.eval_mode}
        stay |= {one for one in layers if (by := interceptor(one)) is not None and BY_HAND in by.holders}
        in_eval = [stay.union(hold.eval_mode) for hold in resolved.holds]
        factors: list[dict[str, Factor]] = [
            {name: scales.get(id(parameter), 1.0) for name, parameter in trains.items()}
            for scales, trains in zip(resolved.scales, resolved.trains, strict=True)
        ]
        spans = enumerate((begin / length.size, end / length.size) for begin, end in pairwise(borders))
        reached = {index: span for index, span in spans if span[0] < span[1]}
        return cls(phases, model, length, reached, factors, in_eval, happened=past is not None)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that can train, by name."""
        return {name: p for name, p in named_unique_parameters(self.model).items() if can_train(p)}

    @property
    def end(self) -> float:
        """Where the fit ends: at its limit, or with the last phase."""
        return max(end for _, end in self.reached.values())

    def course(self, name: str) -> tuple[Factor | None, ...]:
        """Return the learning rate scale of a parameter in each phase that begins, None where it is frozen."""
        return tuple(self.factors[index].get(name) for index in self.reached)

    def ramp_end(self, index: int, ramp: Ramp) -> float:
        """Return where a ramp of a phase ends."""
        self.length.check(f"{ramp} takes", epochs=ramp.epochs, steps=ramp.steps)
        return self.reached[index][0] + (self.length_of(index).of(ramp) or 0) / self.length.size

    def at(self, index: int, factor: Factor, position: float) -> float:
        """Return what a scale of a phase is at a position of the fit."""
        steps = (position - self.reached[index][0]) * self.length.size
        return planned_factor(factor, steps, self.length_of(index))

    def length_of(self, index: int) -> Length:
        """Return how long a phase lasts at most."""
        fit, step = self.length, round(self.reached[index][0] * self.length.size)
        begin = (int(step / fit.per_epoch), step)
        return planned_length(self.phases[index], begin, epoch=fit.per_epoch, total=fit.total)


def _went(schedule: FreezeSchedule, trainer: Trainer) -> tuple[FitLength, list[int]] | None:
    """Return the length of a schedule's fit, and the steps at which phases began and the last one ended, if any did."""
    taken = trainer.global_step + schedule.progress.uncounted
    if not taken or schedule not in callbacks_of(trainer):
        return None
    length = FitLength(steps_in_all(trainer) or taken, "step", steps_per_epoch(trainer) or _UNKNOWN)
    return length, [*(step for _, step, _ in schedule.history), taken]


def trainer_of(model: nn.Module) -> Trainer | None:
    """Return the Trainer that a LightningModule is attached to."""
    try:
        return model.trainer if isinstance(model, LightningModule) else None
    except RuntimeError:  # it is attached to none
        return None


def running_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the layers with running statistics."""
    return [layer for layer in model.modules() if has_running_statistics(layer)]
