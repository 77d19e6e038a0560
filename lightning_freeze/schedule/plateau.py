"""Plateaus, as users write them: plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_freeze.schedule.arguments import number, plain_options
from lightning_freeze.words import one_of, whole_number

Mode = Literal["min", "max"]


@plain_options
@dataclass(frozen=True)
class Plateau:
    """The end of a phase: a metric has stopped getting better, or is good enough.

    A value is taken after each validation run that logs the metric, or after each training epoch if validation does
    not log it; with several processes it is their mean. A value that is not finite is no improvement, and a warning
    tells of it. ``EarlyStopping`` beside it counts anew in each phase.

    Args:
        monitor: The name of a logged metric, as in ``trainer.callback_metrics``.
        patience: After how many values without improvement the phase ends, at least 1.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        min_delta: By how much a value has to be better, in the metric's own unit, at least 0.
        min_epochs: How many epochs the phase lasts at least; values are taken from its first on.
        threshold: A value at which the phase ends at once, without patience.
        restore_best: Whether weights and buffers come back as they were at the best value, when the plateau ends the
            phase; if epochs or steps end it first, they stay as they are. A copy of what can have moved in the phase
            is kept on the CPU and in checkpoints. The optimizer's state stays as it is.

    Raises:
        TypeError: If a number or a flag is of another type.
        ValueError: If an argument is out of range.

    Example:
        >>> Plateau("val_loss", patience=2).patience
        2
    """

    monitor: str
    patience: int = 3
    mode: Mode = "min"
    min_delta: float = 0.0
    min_epochs: int = 0
    threshold: float | None = None
    restore_best: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ValueError(f"Plateau(monitor={self.monitor!r}): name a logged metric, for example 'val_loss'.")
        one_of("Plateau", "mode", self.mode, get_args(Mode))
        min_delta = f"Plateau(min_delta={self.min_delta!r}): min_delta"
        values = {
            "patience": whole_number("Plateau", "patience", self.patience),
            "min_delta": number(min_delta, self.min_delta),
            "min_epochs": whole_number("Plateau", "min_epochs", self.min_epochs) if self.min_epochs else 0,
        }
        if not values["min_delta"] >= 0:
            raise ValueError(f"{min_delta} is 0 or more; mode says which direction is better.")
        if self.threshold is not None:
            values["threshold"] = number(f"Plateau(threshold={self.threshold!r}): threshold", self.threshold)
        if not isinstance(self.restore_best, bool):
            raise TypeError(f"Plateau(restore_best={self.restore_best!r}): restore_best is True or False.")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def better(self, value: float, best: float | None) -> bool:
        """Return whether a value improves on the best one so far.

        Example:
            >>> Plateau("acc", mode="max", min_delta=0.1).better(0.55, 0.5)
            False
        """
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta

    def reaches(self, value: float) -> bool:
        """Return whether a value is as good as ``threshold``.

        Example:
            >>> Plateau("acc", mode="max", threshold=0.9).reaches(0.95)
            True
        """
        if self.threshold is None:
            return False
        return value <= self.threshold if self.mode == "min" else value >= self.threshold
