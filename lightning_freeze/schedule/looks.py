"""A plateau's metric in a fit: when its values are taken, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lightning_freeze._lightning import Trainer
from lightning_freeze.freezing.ledger import Ledger
from lightning_freeze.ranks import mean_over_ranks
from lightning_freeze.schedule import report
from lightning_freeze.schedule.best import keep
from lightning_freeze.schedule.monitor import Monitor
from lightning_freeze.schedule.neighbours import count_anew, stoppers
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.progress import Progress


@dataclass
class Looks:
    """Takes the values of the metric that the current phase waits for.

    Args:
        trainer: The Trainer.
        ledger: The fit's.
        monitor: What tells new values.
        warned_in: The last phase in which a value was not finite.
    """

    trainer: Trainer
    ledger: Ledger
    monitor: Monitor = field(default_factory=Monitor)
    warned_in: int | None = None

    def begin_validation(self) -> None:
        """Note what is logged before validation logs."""
        self.monitor.begin_validation(self.trainer.callback_metrics)

    def end_validation(self, progress: Progress) -> None:
        """Look at the metric if validation has logged it."""
        until = progress.phase.plateau
        value = self.monitor.end_validation(until, self.trainer.callback_metrics, progress.index)
        if until is not None:
            self._look(progress, mean_over_ranks(self.trainer.strategy, value), self.trainer.current_epoch)
            self._make_way(progress, progress.plateau.why)

    def end_epoch(self, progress: Progress) -> None:
        """Note that an epoch is over; what it logs is final after all hooks, when the next one begins."""
        self.monitor.epoch_over = True
        until = progress.phase.plateau
        if until is not None and stoppers(self.trainer, until.monitor):
            foreseen, value = replace(progress.plateau), self.epoch_value(progress)
            if value is not None:
                foreseen.look(until, value)
            self._make_way(progress, foreseen.why)

    def epoch_value(self, progress: Progress) -> float | None:
        """Return the metric's value that the next epoch's start will look at, the same on all ranks."""
        until = progress.phase.plateau
        if until is None or not self.monitor.epoch_over:
            return progress.unlooked
        return mean_over_ranks(self.trainer.strategy, self.monitor.epoch_value(until, self.trainer.callback_metrics))

    def begin_epoch(self, progress: Progress, phases: Sequence[Phase]) -> None:
        """Look at what training has logged in the epoch before; raise for a metric that nothing logs."""
        self._look(progress, self.epoch_value(progress), self.trainer.current_epoch - 1)
        progress.unlooked = None
        epochs = self.trainer.current_epoch - progress.history[-1][0]
        due = self.monitor.checkable(progress.index, len(phases), epochs, self.trainer.enable_validation)
        self.check(phases, due, progress.index)
        self.monitor.begin_epoch()

    def check(self, phases: Sequence[Phase], numbers: Iterable[int], current: int | None = None) -> None:
        """Raise for a plateau of the current phase that can never come, warn of one of another phase."""
        metrics = self.trainer.callback_metrics
        for number in numbers:
            until = phases[number].plateau
            if until is not None and self.trainer.strategy.reduce_boolean_decision(until.monitor not in metrics):
                report.metric_is_missing(self.trainer, phases, number, is_current=number == current)

    def _look(self, progress: Progress, value: float | None, epoch: int) -> None:
        until = progress.phase.plateau
        if until is None or value is None:
            return
        if not math.isfinite(value) and self.warned_in != progress.index:
            self.warned_in = progress.index
            report.metric_is_not_finite(self.trainer, progress, value)
        if progress.look(until, value, epoch) and until.restore_best:
            progress.plateau.kept = keep(self.ledger)

    def _make_way(self, progress: Progress, why: str) -> None:
        """Have EarlyStopping of the same metric not end the fit at the look at which only a phase ends."""
        until = progress.phase.plateau
        if until is not None and why and not progress.is_last:
            count_anew(self.trainer, until.monitor)
