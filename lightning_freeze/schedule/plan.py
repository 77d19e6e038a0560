"""What a schedule does over a whole fit: when each phase holds, what trains then, and at which rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypedDict

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, callbacks_of
from lightning_freeze.freezing.batchnorm import affine_frozen_by_hand, has_running_statistics
from lightning_freeze.freezing.eval_mode import BY_HAND, interceptor
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.freezing.ledger import ledger_of
from lightning_freeze.functional import can_train
from lightning_freeze.schedule.fit import resolve_phases, steps_per_epoch
from lightning_freeze.schedule.meaning import scale_owners
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.rates import Ramp
from lightning_freeze.selectors import named_unique_parameters, unwrapped
from lightning_freeze.words import whole_number

if TYPE_CHECKING:
    from lightning_freeze.schedule.callback import FreezeSchedule

Span = tuple[float, float]
Factor = float | Ramp


class FitOptions(TypedDict, total=False):
    """What a preview may be told of a fit beside ``max_epochs``, see :meth:`FreezeSchedule.preview`."""

    max_steps: int | None
    steps_per_epoch: int | None
    callbacks: Sequence[Callback] | None


@dataclass(frozen=True)
class FitLength:
    """How long a fit takes.

    Args:
        total: How many epochs or optimizer steps.
        unit: Which of the two.
        per_epoch: Optimizer steps an epoch takes, None if unknown.
    """

    total: Fraction
    unit: Literal["epoch", "step"]
    per_epoch: Fraction | None = None

    @classmethod
    def of(
        cls,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        per_epoch: int | None = None,
        trainer: Trainer | None = None,
    ) -> FitLength:
        """Return the length of a fit that ends at the first of its limits; those of the Trainer if none is given.

        Raises:
            TypeError: If a number is no whole one, or no limit is known.
            ValueError: If a number is below 1, or two limits are given that cannot be compared.

        Example:
            >>> FitLength.of(3, max_steps=25, per_epoch=10)
            FitLength(total=Fraction(5, 2), unit='epoch', per_epoch=Fraction(10, 1))
        """
        if max_epochs is None and max_steps is None and trainer is not None:
            max_epochs, max_steps = (n if n and n > 0 else None for n in (trainer.max_epochs, trainer.max_steps))
        if max_epochs is not None or max_steps is None:
            max_epochs = whole_number("preview", "max_epochs", max_epochs)
        if max_steps is not None:
            max_steps = whole_number("preview", "max_steps", max_steps)
        known = steps_per_epoch(trainer) if trainer is not None else None
        if per_epoch is not None:
            known = whole_number("preview", "steps_per_epoch", per_epoch)
        steps = Fraction(known) if known else None
        length = cls(Fraction(max_epochs or max_steps or 0), "epoch" if max_epochs else "step", steps)
        if max_epochs is None or max_steps is None:
            return length
        return replace(length, total=min(length.total, length.steps(max_steps, "With max_epochs,")))

    def epochs(self, count: float, who: str) -> Fraction:
        """Return epochs in the fit's unit; ``who`` begins the error if ``steps_per_epoch`` is missing."""
        return Fraction(count) * (1 if self.unit == "epoch" else self._steps(f"{who} {count:g} epochs"))

    def steps(self, count: int, who: str) -> Fraction:
        """Return optimizer steps in the fit's unit."""
        return Fraction(count) / (1 if self.unit == "step" else self._steps(f"{who} {count} steps"))

    def end(self, phase: Phase, begin: Fraction) -> Fraction | None:
        """Return where a phase is over at the latest, None if it goes by no count."""
        ends, who = list[Fraction](), f"Phase {phase.label!r} lasts"
        if phase.epochs is not None:
            epoch = self.epochs(1, who)
            ends.append((begin // epoch + phase.epochs) * epoch)
        if phase.steps is not None:
            ends.append(begin + self.steps(phase.steps, who))
        if phase.fraction is not None:
            share = Fraction(phase.fraction) * self.total
            step = None if self.unit == "epoch" and self.per_epoch is None else self.steps(1, who)
            ends.append(begin + (share if step is None else max(1, round(share / step)) * step))
        return min([self.total, *ends]) if ends else None

    def _steps(self, what: str) -> Fraction:
        if self.per_epoch is None:
            raise ValueError(f"{what}: give steps_per_epoch.")
        return self.per_epoch


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
        """Return the plan of a schedule, or what it did in a fit.

        Args:
            schedule: The schedule.
            model: The module.
            max_epochs: As of :meth:`FreezeSchedule.preview`, and so are those that follow.
            max_steps: See there.
            steps_per_epoch: See there.
            callbacks: See there.
            happened: Whether to return what it did, if it had begun in a fit of the model.
        """
        model, trainer = unwrapped(model), trainer_of(model)
        if trainer is not None and happened and schedule.history and trainer.global_step >= schedule.history[-1][1]:
            length = _length_in_steps(trainer)
        else:
            happened, length = False, FitLength.of(max_epochs, max_steps, steps_per_epoch, trainer)
        if callbacks is None:
            callbacks = callbacks_of(trainer) if trainer is not None else []
        parameters, layers = named_unique_parameters(model), running_statistics(model)
        ledger = ledger_of(trainer) if trainer is not None else None
        found = {id(p) for p in parameters.values() if can_train(p) and not p.requires_grad}
        came_frozen = found if ledger is None else ledger.came_frozen
        holds = {one.state_key: one.holds(model) for one in callbacks if isinstance(one, Holder)}
        held = {key: who for who, hold in holds.items() for key in hold.frozen}
        held |= dict.fromkeys(affine_frozen_by_hand(layers), BY_HAND)
        phases = schedule.phases
        resolved = resolve_phases(
            model,
            parameters,
            phases,
            came_frozen=came_frozen,
            held=held,
            mode=schedule.frozen_mode,
            left_alone={module for hold in holds.values() for module in hold.own},
        )
        spans = (
            _spans_of(schedule.history, len(phases), trainer.global_step)
            if happened and trainer is not None
            else phase_spans(phases, length)
        )
        stay = {module for hold in holds.values() for module in hold.eval_mode}
        stay |= {one for one in layers if (by := interceptor(one)) is not None and BY_HAND in by.holders}
        in_eval = [stay.union(hold.eval_mode) for hold in resolved.holds]
        owners = [scale_owners(model, phase) for phase in phases]
        factors = [
            {name: phase.scales[owner[name]] if name in owner else 1.0 for name in trains}
            for phase, owner, trains in zip(phases, owners, resolved.trains, strict=True)
        ]
        return cls(phases, model, length, spans, factors, in_eval, happened)

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


def phase_spans(phases: Sequence[Phase], length: FitLength) -> list[Span | None]:
    """Return from where to where each phase lasts, in the length's unit; None for one that never begins.

    When a plateau comes, nobody knows: a phase that only a plateau or a function ends is shown with an equal share of
    the rest of the fit.

    Raises:
        ValueError: If a phase lasts a number of steps, or epochs, and ``steps_per_epoch`` is not known.

    Example:
        >>> phase_spans([Phase("a", steps=15), Phase("b", epochs=9), Phase("c")], FitLength.of(4, per_epoch=10))
        [(0.0, 1.5), (1.5, 4.0), None]
    """
    # Thirds of an epoch have to add up to whole ones.
    begin, spans = Fraction(0), list[Span | None]()
    for index, phase in enumerate(phases):
        end = length.end(phase, begin) or begin + (length.total - begin) / (len(phases) - index)
        spans.append((float(begin), float(end)) if begin < length.total else None)
        begin = end
    return spans


def trainer_of(model: nn.Module) -> Trainer | None:
    """Return the Trainer that a LightningModule is attached to."""
    try:
        return model.trainer if isinstance(model, LightningModule) else None
    except RuntimeError:  # it is attached to none
        return None


def running_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the layers with running statistics."""
    return [layer for layer in model.modules() if has_running_statistics(layer)]


def _length_in_steps(trainer: Trainer) -> FitLength:
    """Return how long the Trainer's fit takes at most; where that is unknown, how long it took."""
    per_epoch = Fraction(steps_per_epoch(trainer) or 0) or None
    limits = [trainer.max_steps, (trainer.max_epochs or 0) * (per_epoch or 0)]
    known = [Fraction(limit) for limit in limits if limit > 0]
    return FitLength(min(known, default=Fraction(trainer.global_step)), "step", per_epoch)


def _spans_of(history: Sequence[tuple[int, int, int]], count: int, end: int) -> list[Span | None]:
    """Return the spans of phases that have begun, in optimizer steps."""
    spans: list[Span | None] = [None] * count
    for (_, begin, index), (_, until, _) in pairwise([*history, (0, end, 0)]):
        spans[index] = (float(begin), float(until)) if until > begin else None
    return spans
