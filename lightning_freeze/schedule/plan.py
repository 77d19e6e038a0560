"""What a schedule does over a whole fit: when each phase holds, what trains then, and at which rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, callbacks_of
from lightning_freeze.freezing.batchnorm import affine_frozen_by_hand, has_running_statistics
from lightning_freeze.freezing.eval_mode import BY_HAND, interceptor
from lightning_freeze.freezing.holder import Holder, ledger_of
from lightning_freeze.functional import can_train
from lightning_freeze.schedule.fit import resolve_phases
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.preset import phases_for
from lightning_freeze.schedule.progress import planned
from lightning_freeze.schedule.rates import Ramp
from lightning_freeze.schedule.spans import FitLength, Span, length_in_steps, past_spans, phase_spans
from lightning_freeze.selectors import named_unique_parameters, unwrapped

if TYPE_CHECKING:
    from lightning_freeze.schedule.callback import FreezeSchedule

Factor = float | Ramp


class FitOptions(TypedDict, total=False):
    """What a preview may be told of a fit beside ``max_epochs``, see :meth:`FreezeSchedule.preview`."""

    max_steps: int | None
    steps_per_epoch: int | None
    callbacks: Sequence[Callback] | None


@dataclass(frozen=True)
class Plan:
    """A schedule over a fit of one module.

    Args:
        phases: The schedule.
        model: The module, without wrappers.
        length: How long the fit takes.
        spans: From where to where each phase lasts, in the length's unit; None for one that never begins.
        factors: For each phase, the learning rate scale of all that trains, by name.
        in_eval: For each phase, the modules that run in eval mode.
        happened: Whether this is what a fit did, rather than what one would do.
    """

    phases: Sequence[Phase]
    model: nn.Module
    length: FitLength
    spans: list[Span | None]
    factors: list[dict[str, Factor]]
    in_eval: list[set[nn.Module]]
    happened: bool = False

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
        taken = 0 if trainer is None else trainer.global_step + schedule.progress.uncounted
        if trainer is not None and happened and taken and schedule in callbacks_of(trainer):
            past, length = list(schedule.history), length_in_steps(trainer)
        else:
            past, length = [], FitLength.of(max_epochs, max_steps, steps_per_epoch, trainer)
        if callbacks is None:
            callbacks = callbacks_of(trainer) if trainer is not None else []
        parameters, layers = named_unique_parameters(model), running_statistics(model)
        ledger = ledger_of(trainer) if trainer is not None else None
        found = {id(p) for p in parameters.values() if can_train(p) and not p.requires_grad}
        came_frozen = found if ledger is None else ledger.came_frozen
        holds = {one.state_key: one.holds(model) for one in callbacks if isinstance(one, Holder)}
        held = {key: who for who, hold in holds.items() for key in hold.frozen}
        held |= dict.fromkeys(affine_frozen_by_hand(model), BY_HAND)
        steps = length.total_steps or math.inf
        phases = schedule.phases if past else phases_for(schedule.phases, model, {*came_frozen, *held}, steps)
        phases = planned(phases, length.total_steps)
        resolved = resolve_phases(
            model,
            parameters,
            phases,
            came_frozen=came_frozen,
            held=held,
            mode=schedule.frozen_mode,
            left_alone={module for hold in holds.values() for module in hold.own},
        )
        spans = past_spans(past, len(phases), taken) if past else phase_spans(phases, length)
        stay = {module for hold in holds.values() for module in hold.eval_mode}
        stay |= {one for one in layers if (by := interceptor(one)) is not None and BY_HAND in by.holders}
        in_eval = [stay.union(hold.eval_mode) for hold in resolved.holds]
        factors: list[dict[str, Factor]] = [
            {name: scales.get(id(parameter), 1.0) for name, parameter in trains.items()}
            for scales, trains in zip(resolved.scales, resolved.trains, strict=True)
        ]
        return cls(phases, model, length, spans, factors, in_eval, bool(past))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that can train, by name."""
        return {name: p for name, p in named_unique_parameters(self.model).items() if can_train(p)}

    @cached_property
    def reached(self) -> dict[int, Span]:
        """The spans of the phases that begin, by index."""
        return {index: span for index, span in enumerate(self.spans) if span is not None}

    @property
    def end(self) -> float:
        """Where the fit ends: at its limit, or with the last phase."""
        return max(end for _, end in self.reached.values())

    @property
    def step(self) -> float | None:
        """The length of an optimizer step, None if unknown."""
        if self.length.unit == "step":
            return 1.0
        return float(1 / self.length.per_epoch) if self.length.per_epoch else None

    def course(self, name: str) -> tuple[Factor | None, ...]:
        """Return the learning rate scale of a parameter in each phase that begins, None where it is frozen."""
        return tuple(self.factors[index].get(name) for index in self.reached)

    def ramp_end(self, index: int, ramp: Ramp) -> float:
        """Return where a ramp of a phase ends."""
        begin = Fraction(self.reached[index][0])
        if ramp.steps is not None:
            return float(begin + self.length.steps(ramp.steps, f"{ramp} takes"))
        if ramp.epochs is not None:
            return float(begin + self.length.epochs(ramp.epochs, f"{ramp} takes"))
        return float(self.length.end(self.phases[index], begin) or self.length.total)

    def at(self, index: int, factor: Factor, position: float) -> float:
        """Return what a scale of a phase is at a position of the fit."""
        if not isinstance(factor, Ramp):
            return factor
        begin = self.reached[index][0]
        return factor.at((position - begin) / (self.ramp_end(index, factor) - begin))


def trainer_of(model: nn.Module) -> Trainer | None:
    """Return the Trainer that a LightningModule is attached to."""
    try:
        return model.trainer if isinstance(model, LightningModule) else None
    except RuntimeError:  # it is attached to none
        return None


def running_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the layers with running statistics."""
    return [layer for layer in model.modules() if has_running_statistics(layer)]
