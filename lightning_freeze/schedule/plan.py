"""What a schedule does over a whole fit: when each phase holds, what trains then, and at which rate."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, callbacks_of
from lightning_freeze.freezing.batchnorm import affine_frozen_by_hand
from lightning_freeze.freezing.eval_mode import BY_HAND, interceptor
from lightning_freeze.freezing.holder import Holder, ledger_of
from lightning_freeze.freezing.ledger import Hold, Ledger
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

# The steps that an epoch of unknown length counts as: more than any fit takes, and shares of it come out.
_UNKNOWN = 10**12


@dataclass(frozen=True)
class FitLength:
    """How long a fit takes, in optimizer steps, and whether it is shown in these or in epochs."""

    total: int
    unit: Literal["epoch", "step"]
    per_epoch: float  # optimizer steps an epoch takes

    @classmethod
    def of(
        cls,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        per_epoch: float | None = None,
        trainer: Trainer | None = None,
    ) -> FitLength:
        """Return the length of a fit that ends at the first of its limits; those of the Trainer if none is given."""
        if max_epochs is None and max_steps is None and trainer is not None:
            max_epochs, max_steps = (n if n and n > 0 else None for n in (trainer.max_epochs, trainer.max_steps))
        if per_epoch is not None:
            per_epoch = whole_number("preview", "steps_per_epoch", per_epoch)
        elif trainer is not None:
            per_epoch = steps_per_epoch(trainer)
        per_epoch, total = per_epoch or _UNKNOWN, sys.maxsize
        if max_steps is not None:
            total = whole_number("preview", "max_steps", max_steps)
            if max_epochs is None:
                return cls(total, "step", per_epoch)
        epochs = whole_number("preview", "max_epochs", max_epochs)
        length = cls(min(total, round(epochs * per_epoch)), "epoch", per_epoch)
        length.check("With max_epochs,", steps=max_steps)
        return length

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

    def planned(self, phases: Sequence[Phase]) -> tuple[Sequence[Phase], list[int]]:
        """Return a schedule as the fit goes through it, and the steps at which phases begin and the last one ends.

        When a plateau comes, nobody knows: a phase that only a plateau or a function ends has an equal share of what
        is left. A ValueError says what cannot be told in the unit.
        """
        for phase in phases:
            self.check(f"Phase {phase.label!r} lasts", epochs=phase.epochs, steps=phase.steps)
        phases = planned(phases, self.total)

        def share(begin: Begin) -> End:
            step = begin[1] + max(1, round((self.total - begin[1]) / (len(phases) - begin[2])))
            return step, int(step / self.per_epoch), ""

        begins = walk([*phases, Phase("*")], math.inf, math.inf, self.per_epoch, share)
        return phases, [min(step, self.total) for _, step, _ in begins]


@dataclass(frozen=True)
class Part:
    """A phase in a plan; where it begins and ends are optimizer steps."""

    number: int  # from 1
    phase: Phase
    begin: int
    end: int  # its begin, if the fit does not reach it
    lasts: Length  # at most
    factors: dict[str, Factor]  # the learning rate scale of all that trains, by name
    in_eval: set[nn.Module]  # what runs in eval mode

    def at(self, factor: Factor, step: float) -> float:
        """Return what a scale of the phase is at a step of the fit."""
        return planned_factor(factor, step - self.begin, self.lasts)


@dataclass(frozen=True)
class Plan:
    """A schedule over a fit of one module."""

    parts: Sequence[Part]
    model: nn.Module  # without wrappers
    length: FitLength
    trainer: Trainer | None  # that the model is attached to
    ledger: Ledger | None  # of the fit that runs
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
        model = unwrapped(model)
        trainer = None
        with suppress(RuntimeError):  # it is attached to none
            trainer = model.trainer if isinstance(model, LightningModule) else None
        ledger = ledger_of(trainer) if trainer is not None else None
        if callbacks is None:
            callbacks = callbacks_of(trainer) if trainer is not None else []
        holds = _holds(model, callbacks)
        held = {key: who for who, hold in holds.items() for key in hold.frozen}
        parameters = named_unique_parameters(model).values()
        found = {id(p) for p in parameters if can_train(p) and not p.requires_grad}
        came_frozen = ledger.came_frozen if ledger is not None else found
        past = _went(schedule, trainer) if happened and trainer is not None else None
        if past is not None:
            phases, (length, borders) = schedule.progress.phases, past
        else:
            length = FitLength.of(max_epochs, max_steps, steps_per_epoch, trainer)
            steps = length.total if length.knows("step") else math.inf
            phases, borders = length.planned(phases_for(schedule.phases, model, {*came_frozen, *held}, steps))
        left_alone = {module for hold in holds.values() for module in hold.own}
        resolved = resolve_phases(
            *(model, phases), came_frozen=came_frozen, held=held, mode=schedule.frozen_mode, left_alone=left_alone
        )
        parts, spans = [], pairwise([*borders, *borders[-1:] * len(phases)])
        for index, (phase, (begin, end)) in enumerate(zip(phases, spans, strict=False)):
            at = (int(begin / length.per_epoch), begin)
            lasts = planned_length(phase, at, epoch=length.per_epoch, total=length.total)
            scales, trains = resolved.scales[index], resolved.trains[index]
            factors: dict[str, Factor] = {name: scales.get(id(p), 1.0) for name, p in trains.items()}
            in_eval = {module for hold in (resolved.holds[index], *holds.values()) for module in hold.eval_mode}
            parts.append(Part(index + 1, phase, begin, end, lasts, factors, in_eval))
        return cls(parts, model, length, trainer, ledger, happened=past is not None)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that can train, by name."""
        return {name: p for name, p in named_unique_parameters(self.model).items() if can_train(p)}

    @property
    def reached(self) -> list[Part]:
        """The phases that begin before the fit ends."""
        return [part for part in self.parts if part.begin < part.end]

    @property
    def end(self) -> int:
        """The step at which the fit ends: at its limit, or with the last phase."""
        return max(part.end for part in self.parts)

    def course(self, name: str) -> tuple[Factor | None, ...]:
        """Return the learning rate scale of a parameter in each phase that begins, None where it is frozen."""
        return tuple(part.factors.get(name) for part in self.reached)


def _holds(model: nn.Module, callbacks: Sequence[Callback]) -> dict[str, Hold]:
    """Return what callbacks, and the user by :func:`freeze_batchnorm`, keep frozen in every phase."""
    holds = {one.state_key: one.holds(model) for one in callbacks if isinstance(one, Holder)}
    by_hand = [one for one in model.modules() if interceptor(one, BY_HAND) is not None]
    return {**holds, BY_HAND: Hold(frozenset(affine_frozen_by_hand(by_hand)), tuple(by_hand))}


def _went(schedule: FreezeSchedule, trainer: Trainer) -> tuple[FitLength, list[int]] | None:
    """Return the length of a schedule's fit, and the steps at which phases began and the last one ended, if any did."""
    taken = trainer.global_step + schedule.progress.uncounted
    if not taken or schedule not in callbacks_of(trainer):
        return None
    length = FitLength(steps_in_all(trainer) or taken, "step", steps_per_epoch(trainer) or _UNKNOWN)
    return length, [*(step for _, step, _ in schedule.history), taken]
