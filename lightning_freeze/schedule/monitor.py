"""When a plateau looks at its metric, and what to say of one that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_freeze.schedule.plateau import Plateau
from lightning_freeze.words import suggestion

Metrics = Mapping[str, Any]


@dataclass
class Monitor:
    """Tells which values of a metric are new: one for each validation run that logs it, else one a training epoch.

    What validation logs is final when validation ends. What training logs is final when the next epoch begins, after
    every hook of the epoch's end.

    Args:
        validated_in: The phase in which validation last ran, None before.
        epochs: How many epochs have begun.
        epoch_over: Whether the hooks of an epoch's end have been called since it began.
        by_validation: Whether validation has logged the current phase's metric.
        stale: The metric as it was when the validation that runs began.
        looked_ahead: Whether the metrics of later phases have been looked for.
    """

    validated_in: int | None = None
    epochs: int = 0
    epoch_over: bool = False
    by_validation: bool = False
    stale: Tensor | None = None
    looked_ahead: bool = False

    def begin_validation(self, until: Plateau | None, metrics: Metrics) -> None:
        """Note what is there before validation logs."""
        self.stale = metrics.get(until.monitor) if until is not None else None

    def end_validation(self, until: Plateau | None, metrics: Metrics, phase: int) -> float | None:
        """Return the metric's value if this validation run has logged it."""
        self.validated_in = phase
        value = metrics.get(until.monitor) if until is not None else None
        # Validation's results replace what was there by new objects; a name that it did not log keeps the old one.
        if value is None or value is self.stale:
            return None
        self.by_validation = True
        return float(value)

    def epoch_value(self, until: Plateau | None, metrics: Metrics) -> float | None:
        """Return the metric's value of an epoch that is over, if training logs it."""
        if until is None or not self.epoch_over or self.by_validation:
            return None
        value = metrics.get(until.monitor)
        return None if value is None else float(value)

    def begin_epoch(self) -> None:
        """Note that an epoch begins."""
        self.epochs += 1
        self.epoch_over = False

    def checkable(self, phase: int, phases: int, epochs_in_phase: int, validates: bool) -> list[int]:
        """Return the phases, of so many, whose metric should have been logged by now, or could have been.

        The current one is due when every loop that could log its metric has run in it, later ones after an epoch.
        """
        due = [phase] if self.epochs and epochs_in_phase > 0 and (not validates or self.validated_in == phase) else []
        if not self.looked_ahead and self.epochs and (not validates or self.validated_in is not None):
            self.looked_ahead = True
            due += range(phase + 1, phases)
        return due


def missing_metric(until: Plateau, metrics: Metrics) -> str:
    """Return what to say of a metric that nothing has logged."""
    logged = sorted(name for name in map(str, metrics) if not name.startswith("freeze/"))
    # With several dataloaders, and for each step and each epoch, Lightning puts something behind a name.
    longer = [f" Did you mean {name!r}?" for name in logged if name.startswith(until.monitor)]
    return (
        f"ends by Plateau(monitor={until.monitor!r}), but no metric of that name was logged."
        f"{next(iter(longer), suggestion(until.monitor, logged))} Logged are: {', '.join(logged) or 'none'}."
    )
