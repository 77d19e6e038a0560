"""Learning rates that move within a phase."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_freeze.freezing.step_view import Scale, factor_at
from lightning_freeze.schedule.arguments import plain_options
from lightning_freeze.words import one_of

Shape = Literal["linear", "exponential", "cosine"]


@plain_options
@dataclass(frozen=True)
class Ramp:
    """A learning rate scale that moves from one factor to another as a phase goes on, and then stays there.

    What unfreezes meets the full learning rate at once, which can undo what was learned; a ramp raises it bit by bit.
    The factor is a function of the optimizer steps since the phase began: nothing is saved, and a resumed fit has the
    same rates.

    Args:
        start: The factor of the phase's first step, 0 or more.
        end: The factor from the ramp's end on.
        epochs: How many epochs the ramp takes, which may be a fraction of one.
        steps: How many optimizer steps the ramp takes; without either it takes the whole phase.
        shape: ``"linear"``, ``"exponential"`` (by the same ratio each step), or ``"cosine"`` (slow at both ends).

    Raises:
        TypeError: If a number is of another type.
        ValueError: If a number is out of range, or both ``epochs`` and ``steps`` are there.

    Example:
        >>> ramp = Ramp(0.1, steps=10)
        >>> ramp.at(0.0), ramp.at(0.5), ramp.at(2.0)
        (0.1, 0.55, 1.0)
    """

    start: float
    end: float = 1.0
    _: dataclasses.KW_ONLY
    epochs: float | None = None
    steps: int | None = None
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) < math.inf:
                shown = f"Ramp({name}={getattr(self, name)!r}): {name}"
                raise ValueError(f"{shown} is a factor on the learning rate: 0 or more, and finite.")
        one_of("Ramp", "shape", self.shape, get_args(Shape))
        if self.shape == "exponential" and not (self.start and self.end):
            raise ValueError(f"{self!r}: an exponential ramp multiplies, so both of its ends are above 0.")
        if not self.end:
            raise ValueError(f"{self!r}: it ends at 0, so nothing would learn any more. End above 0, or end the phase.")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"{self!r}: say epochs or steps, not both.")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"Ramp(epochs={self.epochs!r}): epochs is above 0 and finite.")

    def at(self, done: float) -> float:
        """Return the factor when a share of the ramp is done, from 0 to 1; it stays at ``end`` beyond.

        Example:
            >>> Ramp(0.01, shape="exponential").at(0.5)
            0.1
        """
        if done >= 1:
            return self.end
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** done)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Length:
    """How long a phase lasts at most and an epoch is, in optimizer steps; None where that cannot be known."""

    phase: int | None = None
    epoch: float | None = None

    def of(self, ramp: Ramp) -> float | None:
        """Return how many steps a ramp takes."""
        if ramp.epochs is not None:
            return None if self.epoch is None else ramp.epochs * self.epoch
        return self.phase if ramp.steps is None else ramp.steps


def planned_factor(scale: Scale, step: float, length: Length) -> float:
    """Return the factor on the learning rate in a step of a phase of a length, from 0.

    ``scale`` is a value of ``Phase.scales``; a ramp of unknown length stays at its beginning.
    """
    if not isinstance(scale, Ramp):
        return factor_at(scale)
    steps = length.of(scale)
    return scale.at(step / steps if steps else 0.0)
