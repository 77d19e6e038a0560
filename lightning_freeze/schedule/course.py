"""The course of one fit through the phases of a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_freeze._lightning import LightningModule, Trainer, logged_step
from lightning_freeze.ranks import check_agreement, mean_over_ranks, only_true, refuse_differences
from lightning_freeze.schedule import report
from lightning_freeze.schedule.fit import Fit, steps_per_epoch
from lightning_freeze.schedule.monitor import Monitor
from lightning_freeze.schedule.phases import Phase, describe
from lightning_freeze.schedule.progress import Progress, begin_or_go_on


@dataclass
class Course:
    """A schedule that moves on through its phases.

    Args:
        phases: The schedule.
        fit: What the phases mean in this fit.
        trainer: The Trainer.
        who: By which name the ledger knows the schedule.
        verbose: Whether a line is logged for each phase that begins.
        before: The progress of the fit that this one goes on from, None for a fresh one.
        progress: Where in the schedule the fit is.
        monitor: What tells new values of a plateau's metric.
        looks: Whether there is anything to do at a batch's start, where most phases have nothing.
    """

    phases: Sequence[Phase]
    fit: Fit
    trainer: Trainer
    who: str
    verbose: bool
    before: Progress | None
    progress: Progress = field(default_factory=Progress)
    monitor: Monitor = field(default_factory=Monitor)
    looks: bool = True

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.progress.index]

    @property
    def step(self) -> int:
        """Optimizer steps taken, also those that ``trainer.global_step`` has missed."""
        return self.trainer.global_step + self.progress.uncounted

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Find out which phase holds and apply it, before optimizers and loops are restored."""
        self.fit.begin(self.trainer)
        self.fit.ledger.steps.before.insert(0, self._follow)
        self._find(saved)
        self.apply(modes=False)

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from what a checkpoint held; tuners restore one in the middle of a fit too."""
        self._find(saved)
        if saved is not None:
            report.another_schedule(self.trainer, self.phases, saved, self.progress.index)
            self.fit.load_state(saved.get("optimizers", []))
        self.apply()

    def begin_epoch(self, pl_module: LightningModule) -> bool:
        """Look at what the last epoch logged; begin the next phase if this one is over, and return whether it was."""
        self._look(self.epoch_value())
        self.progress.unlooked = None
        self._check_metrics()
        self.monitor.begin_epoch()
        advanced = self._advance(pl_module)
        self._log_phase()
        return advanced

    def begin_batch(self, pl_module: LightningModule, batch_idx: int) -> None:
        """Begin the next phase between two optimizer steps if this one is over, and log scaled rates."""
        due = self.progress.is_due(self.phases, self.step)
        if due and batch_idx % self.trainer.accumulate_grad_batches == 0:
            # Where the user steps, only a step since then tells that no accumulation window is open.
            closed = pl_module.automatic_optimization or self.step != self.progress.plateau.ended_at
            if self._advance(pl_module, plateau=closed):
                self._log_phase()
        if not pl_module.automatic_optimization:
            self.fit.stepped = (0, self.trainer.global_step)
        # As LearningRateMonitor does: after the batch a scheduler has gone on to the next step's rate.
        logs = self.phase.scales and self.trainer.loggers
        if logs and (logged_step(self.trainer) + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            rates = self.fit.rates(self.progress.index)
            self._log({f"freeze/lr/{select}": rate for select, rate in rates.items()})

    def end_batch(self) -> None:
        """Count the optimizer steps that Lightning has not counted."""
        steps = self.fit.ledger.steps
        if steps.begun:  # user code may have caught the error of one
            steps.reset()
        if self.fit.stepped[0] and (uncounted := self.fit.uncounted(self.trainer.global_step)):
            report.steps_uncounted(self.trainer, first=self.progress.uncounted == 0)
            self.progress.uncounted += uncounted

    def begin_validation(self) -> None:
        """Note what is logged before validation logs."""
        self.monitor.begin_validation(self.phase.until, self.trainer.callback_metrics)

    def end_validation(self) -> None:
        """Look at the phase's metric if validation has logged it."""
        if not self.trainer.sanity_checking:
            value = self.monitor.end_validation(self.phase.until, self.trainer.callback_metrics, self.progress.index)
            self._look(mean_over_ranks(self.trainer.strategy, value) if self.phase.until else None)

    def epoch_value(self) -> float | None:
        """Return the metric's value that the next epoch's start will look at, the same on all ranks."""
        if self.phase.until is None or not self.monitor.epoch_over:
            return self.progress.unlooked
        value = self.monitor.epoch_value(self.phase.until, self.trainer.callback_metrics)
        return mean_over_ranks(self.trainer.strategy, value)

    def apply(self, *, modes: bool = True) -> None:
        """Bring everything in line with the phase; doing it twice changes nothing."""
        index, resolved = self.progress.index, self.fit.resolved
        check_agreement(
            self.trainer.strategy,
            lambda: {
                "schedule": describe(self.phases),
                "epoch": self.trainer.current_epoch,
                "phase": index,
                "trains": [(name, tuple(p.shape)) for name, p in resolved.trains[index].items()],
            },
        )
        self.fit.ledger.hold(self.who, resolved.holds[index])
        self.fit.ledger.settle(modes=modes)
        self.fit.apply(index)
        phase, by_hand = self.phase, not self.trainer.lightning_module.automatic_optimization
        self.looks = by_hand or any(one is not None for one in (phase.steps, phase.until, phase.lr_scale))

    def announce(self, pl_module: LightningModule) -> None:
        """Log the line of the current phase."""
        if self.verbose and self.trainer.is_global_zero:
            report.phase_begins(pl_module, self.phases, self.progress, self.fit)

    def check_batches(self) -> None:
        """Refuse ranks of which some would run out of batches before others: no phase would end for all at once."""
        if len(self.phases) == 1:
            return
        trainer = self.trainer
        batches: float = trainer.num_training_batches
        if trainer.max_steps >= 0:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        refuse_differences(
            trainer.strategy,
            "Ranks have different numbers of training batches, and Lightning waits forever for those that run out. "
            "Give every rank as many, for example by limit_train_batches=….",
            batches=batches,
        )
        if any(phase.until is not None for phase in self.phases):
            refuse_differences(
                trainer.strategy,
                "A rank has no validation batches, and those that have some would wait for it forever to agree on the "
                "Plateau's metric. Give every rank some.",
                validates=sum(trainer.num_val_batches) > 0,
            )

    def _follow(self, optimizer: Optimizer) -> None:
        """Take over an optimizer that somebody has put in the place of another, before its first step."""
        if optimizer not in self.fit.followed and self.fit.follow(self.trainer):
            report.optimizers_exchanged(self.trainer)
            self.fit.apply(self.progress.index)

    def _find(self, saved: Mapping[str, Any] | None) -> None:
        at = (self.trainer.current_epoch, self.trainer.global_step)
        self.progress = begin_or_go_on(self.phases, self.before, saved, at, lambda: steps_per_epoch(self.trainer))

    def _advance(self, pl_module: LightningModule, *, plateau: bool = True) -> bool:
        if not self.progress.advance(self.phases, self.trainer.current_epoch, self.step, plateau=plateau):
            return False
        self.monitor.by_validation = False  # the next phase may have another metric
        self.apply()
        self.announce(pl_module)
        return True

    def _look(self, value: float | None) -> None:
        if self.phase.until is not None and value is not None:
            self.progress.plateau.look(self.phase.until, value, self.step)

    def _check_metrics(self) -> None:
        """Raise for a plateau that can never come, as soon as every loop has run that could log its metric."""
        index, metrics = self.progress.index, self.trainer.callback_metrics
        epochs = self.trainer.current_epoch - self.progress.history[-1][0]
        for number in self.monitor.checkable(index, len(self.phases), epochs, self.trainer.enable_validation):
            until = self.phases[number].until
            if until is not None and only_true(self.trainer.strategy, until.monitor not in metrics):
                report.metric_is_missing(self.trainer, self.phases, number, is_current=number == index)

    def _log_phase(self) -> None:
        trainable = float(self.fit.trainable())
        values = {"freeze/phase": float(self.progress.index), "freeze/trainable_parameters": trainable}
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        self._log(values)

    def _log(self, values: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=logged_step(self.trainer))
