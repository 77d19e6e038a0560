"""A plateau's metric in a fit: when its values are taken, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lightning_freeze._lightning import EarlyStopping, MisconfigurationException, Trainer, callbacks_of
from lightning_freeze.freezing.ledger import Ledger
from lightning_freeze.logs import get_logger
from lightning_freeze.ranks import mean_over_ranks
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.progress import Progress, numbered
from lightning_freeze.schedule.weights import movable
from lightning_freeze.words import suggestion

_log = get_logger(__name__)


@dataclass
class Looks:
    """Takes the values of the metric that a phase waits for: one a validation run that logs it, else one an epoch.

    What validation logs is final when validation ends. What training logs is final when the next epoch begins, after
    every hook of the epoch's end.
    """

    trainer: Trainer
    ledger: Ledger
    phases: Sequence[Phase]
    validated_in: int | None = None  # the phase in which validation last ran
    epoch_over: bool = False  # whether an epoch has ended, and none has begun since
    by_validation: set[str] = field(default_factory=set)  # the names that validation has logged
    stale: Mapping[str, Any] = field(default_factory=dict)  # what was logged when the validation that runs began
    earlier: Mapping[str, Any] = field(default_factory=dict)  # the plateaus' metrics when the epoch began
    looked_ahead: bool = False  # whether the metrics of later phases have been looked for
    warned_in: int | None = None  # the last phase in which a value was not finite

    def begin_validation(self) -> None:
        """Note what is logged before validation logs."""
        self.stale = dict(self.trainer.callback_metrics)

    def end_validation(self, progress: Progress) -> None:
        """Look at the metric if validation has logged it."""
        self.validated_in, until, metrics = progress.index, progress.phase.plateau, self.trainer.callback_metrics
        # Validation's results replace what was there by new objects; a name that it did not log keeps the old one.
        new = {name: value for name, value in metrics.items() if value is not self.stale.get(name)}
        self.by_validation |= new.keys()
        self.stale = {}  # which would keep what was logged alive
        if until is not None:
            self._look(progress, self._mean(new.get(until.monitor)), self.trainer.current_epoch)
            self._make_way(progress, progress.plateau.why)

    def end_epoch(self, progress: Progress) -> None:
        """Note that an epoch is over; what it logs is final after all hooks, when the next one begins."""
        epoch = self.trainer.current_epoch
        self.epoch_over = epoch > progress.last_epoch  # a fit with max_steps that resumes ends an epoch once more
        progress.last_epoch = epoch
        foreseen, until = replace(progress.plateau), progress.phase.plateau
        if until is not None and (value := self.epoch_value(progress)) is not None:
            foreseen.look(until, value)
        self._make_way(progress, foreseen.why)

    def epoch_value(self, progress: Progress) -> float | None:
        """Return the metric's value that the next epoch's start will look at, the same on all ranks."""
        until = progress.phase.plateau
        if until is None or not self.epoch_over:
            return progress.unlooked
        value = self.trainer.callback_metrics.get(until.monitor)
        is_old = until.monitor in self.by_validation or value is self.earlier.get(until.monitor)
        return self._mean(None if is_old else value)

    def begin_epoch(self, progress: Progress) -> None:
        """Look at what training has logged in the epoch before; raise for a metric that nothing logs."""
        self._look(progress, self.epoch_value(progress), self.trainer.current_epoch - 1)
        progress.unlooked = None
        has_run = self.epoch_over and self.trainer.current_epoch > progress.history[-1][0]
        if has_run and (not self.trainer.enable_validation or self.validated_in == progress.index):
            ahead = range(progress.index + 1, len(self.phases)) if not self.looked_ahead else ()
            self.check(progress, [progress.index, *ahead], progress.index)
            self.looked_ahead = True
        self.epoch_over = False
        names = {phase.plateau.monitor for phase in self.phases if phase.plateau is not None}
        self.earlier = {name: value for name, value in self.trainer.callback_metrics.items() if name in names}

    def check(self, progress: Progress, numbers: Iterable[int], current: int | None = None) -> None:
        """Raise for a plateau of the current phase that can never come, warn of one of another phase."""
        metrics = self.trainer.callback_metrics
        for number in numbers:
            phase, until = self.phases[number], self.phases[number].plateau
            if until is None or until.monitor in self.logged(progress, [phase]):
                continue
            logged = sorted(name for name in map(str, metrics) if not name.startswith("freeze/"))
            # With several dataloaders, and for each step and each epoch, Lightning puts something behind a name.
            longer = [f" Did you mean {name!r}?" for name in logged if name.startswith(until.monitor)]
            missing = (
                f"ends by Plateau(monitor={until.monitor!r}), but no metric of that name was logged."
                f"{next(iter(longer), suggestion(until.monitor, logged))} Logged are: {', '.join(logged) or 'none'}."
            )
            if number == current:
                raise MisconfigurationException(f"Phase {phase.label!r} {missing}")
            _log.warning(
                "%s %s If it is not logged in that phase either, the fit ends there with an error.",
                *(numbered(self.phases, number), missing),
            )

    def logged(self, progress: Progress, phases: Sequence[Phase]) -> list[str]:
        """Return the metrics of plateaus that have been logged so far, the same on all ranks."""
        is_missing, metrics = self.trainer.strategy.reduce_boolean_decision, self.trainer.callback_metrics
        names = dict.fromkeys(phase.plateau.monitor for phase in phases if phase.plateau is not None)
        return [name for name in names if name in progress.logged or not is_missing(name not in metrics)]

    def _mean(self, value: Any) -> float | None:
        return mean_over_ranks(self.trainer.strategy, None if value is None else float(value))

    def _look(self, progress: Progress, value: float | None, epoch: int) -> None:
        until, begin = progress.phase.plateau, progress.history[-1][0]
        if until is None or value is None:
            return
        if not math.isfinite(value) and self.warned_in != progress.index:
            self.warned_in = progress.index
            _log.warning(
                "%s waits for a plateau of %r, which is %s at epoch %d, step %d: no improvement on any value.",
                *(numbered(progress.phases, progress.index), until.monitor, value),
                *(self.trainer.current_epoch, self.trainer.global_step),
            )
        if progress.plateau.look(until, value, early=epoch - begin < until.min_epochs) and until.restore_best:
            now = movable(self.ledger).items()
            progress.plateau.kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in now}

    def _make_way(self, progress: Progress, why: str) -> None:
        """Have EarlyStopping of the same metric not end the fit at the look at which only a phase ends."""
        until = progress.phase.plateau
        if until is not None and why and not progress.is_last:
            count_anew(self.trainer, until.monitor)


def stoppers(trainer: Trainer, monitor: str | None = None) -> list[EarlyStopping]:
    """Return the Trainer's EarlyStopping callbacks, those of one metric or all."""
    found = [callback for callback in callbacks_of(trainer) if isinstance(callback, EarlyStopping)]
    return [stopper for stopper in found if monitor in (None, stopper.monitor)]


def count_anew(trainer: Trainer, monitor: str | None = None) -> None:
    """Have EarlyStopping forget what earlier phases reached: a phase begins worse than the one before it ended."""
    for stopper in stoppers(trainer, monitor):
        stopper.wait_count = 0
        stopper.best_score = torch.tensor(torch.inf if stopper.mode == "min" else -torch.inf)
