"""When the phases of a schedule hold over a whole fit: planned, or as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from lightning_freeze._lightning import Trainer
from lightning_freeze.schedule.length import steps_per_epoch
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.words import counted, whole_number

Span = tuple[float, float]


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

    @property
    def total_steps(self) -> int | None:
        """How many optimizer steps the fit takes, None if unknown."""
        if self.unit == "step":
            return int(self.total)
        return None if self.per_epoch is None else int(self.total * self.per_epoch)

    def epochs(self, count: float, who: str) -> Fraction:
        """Return epochs in the fit's unit; ``who`` begins the error if ``steps_per_epoch`` is missing."""
        return Fraction(count) * (1 if self.unit == "epoch" else self._steps(f"{who} {count:g} epochs"))

    def steps(self, count: int, who: str) -> Fraction:
        """Return optimizer steps in the fit's unit."""
        return Fraction(count) / (1 if self.unit == "step" else self._steps(f"{who} {counted(count, 'step')}"))

    def end(self, phase: Phase, begin: Fraction) -> Fraction | None:
        """Return where a phase is over at the latest, None if it goes by no count."""
        ends, who = list[Fraction](), f"Phase {phase.label!r} lasts"
        if phase.epochs is not None:
            epoch = self.epochs(1, who)
            ends.append((begin // epoch + phase.epochs) * epoch)
        if phase.steps is not None:
            ends.append(begin + self.steps(phase.steps, who))
        if phase.fraction is not None:
            ends.append(begin + Fraction(phase.fraction) * self.total)
        return min([self.total, *ends]) if ends else None

    def _steps(self, what: str) -> Fraction:
        if self.per_epoch is None:
            raise ValueError(f"{what}: give steps_per_epoch.")
        return self.per_epoch


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


def length_in_steps(trainer: Trainer) -> FitLength:
    """Return how long the Trainer's fit takes at most; where that is unknown, how long it took."""
    per_epoch = Fraction(steps_per_epoch(trainer) or 0) or None
    limits = [trainer.max_steps, (trainer.max_epochs or 0) * (per_epoch or 0)]
    known = [Fraction(limit) for limit in limits if limit > 0]
    return FitLength(min(known, default=Fraction(trainer.global_step)), "step", per_epoch)


def past_spans(history: Sequence[tuple[int, int, int]], count: int, end: int) -> list[Span | None]:
    """Return the spans of phases that have begun, in optimizer steps."""
    spans: list[Span | None] = [None] * count
    for (_, begin, index), (_, until, _) in pairwise([*history, (0, end, 0)]):
        spans[index] = (float(begin), float(until)) if until > begin else None
    return spans
