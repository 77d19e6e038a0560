"""Scheduled freezing and unfreezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from lightning_freeze._lightning import (
    BaseFinetuning,
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    logged_step,
)
from lightning_freeze.freezing.callback import refuse_new_statistics
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.freezing.optimizers import OptimizerState
from lightning_freeze.ranks import check_agreement, mean_over_ranks, only_true, refuse_differences
from lightning_freeze.schedule import report
from lightning_freeze.schedule.checkpoint import restore, trained_so_far, weights_to_keep
from lightning_freeze.schedule.fit import Fit, begin_fit, steps_per_epoch
from lightning_freeze.schedule.meaning import FrozenMode
from lightning_freeze.schedule.monitor import Monitor
from lightning_freeze.schedule.phases import Phase, as_phases, describe
from lightning_freeze.schedule.plot import plot_schedule
from lightning_freeze.schedule.preview import Plan, preview_table
from lightning_freeze.schedule.progress import Progress, begin_or_go_on
from lightning_freeze.words import Table, one_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FreezeSchedule(Holder):
    """Say which parameters train when; everything that has to follow follows.

    Before the first batch, and whenever a phase ends, the flags of all parameters, the mode of frozen BatchNorm layers,
    the optimizers and the DDP wrapper are brought in line with the phase. The phase changes at an epoch's start or
    between optimizer steps, never inside an accumulation window; only in manual optimization a window that spans an
    epoch's end is cut by a phase that lasts epochs. The last phase holds until the fit ends. What a
    :class:`TargetNetwork` or :class:`FreezeBatchNorm` keeps frozen never trains, also where a phase selects it with
    other parameters. After the fit, also after one that was interrupted, flags, modes and optimizers are as they were;
    what was learned stays.

    Args:
        phases: The schedule: :class:`Phase` objects, or dicts of their arguments, as YAML gives them.
        frozen_mode: How wholly frozen modules run: ``"batchnorm"`` puts only layers with running statistics, and
            modules that learn in buffers alone, in eval mode, ``"eval"`` the whole module (its dropout is off too),
            ``"train"`` leaves modes alone.
        optimizer_state: What becomes of a parameter's optimizer state when it freezes: ``"keep"``; ``"drop"``, its
            memory is freed and it starts anew; or ``"offload"``, to the CPU until the parameter trains again.
        verbose: Log a line for each phase that begins.

    Attributes:
        phases: The schedule as a list of :class:`Phase`.

    Raises:
        ValueError: If the schedule is empty or a phase that is not the last has no end; at fit start, if a phase names
            or trains nothing, or if an optimizer would refuse in mid-fit what the schedule asks of it.
        TypeError: If an argument is of another type.
        MisconfigurationException: At fit start, if the Trainer has a strategy, an optimizer or another callback with
            which the schedule cannot be exact.

    Example:
        >>> schedule = FreezeSchedule([
        ...     Phase(train="head", epochs=2),
        ...     Phase(train="*", lr_scale={"backbone": 0.1}),
        ... ])
        >>> net = nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": nn.Linear(4, 1)})
        >>> print(schedule.preview(net, max_epochs=5))
        phase  trains  epochs  parameters    share  BatchNorm frozen  lr scale
        -----  ------  ------  ----------  -------  ----------------  -------------
            1  head    0-1              5   20.0 %  0/0               1
            2  *       2-4             25  100.0 %  0/0               backbone: 0.1
    """

    def __init__(
        self,
        phases: Sequence[Phase | Mapping[str, Any]],
        *,
        frozen_mode: FrozenMode = "batchnorm",
        optimizer_state: OptimizerState = "keep",
        verbose: bool = True,
    ) -> None:
        self.phases = list(as_phases(phases))
        self.frozen_mode = one_of("FreezeSchedule", "frozen_mode", frozen_mode, get_args(FrozenMode))
        self.optimizer_state = one_of("FreezeSchedule", "optimizer_state", optimizer_state, get_args(OptimizerState))
        self.verbose = verbose
        self._progress: Progress | None = None
        self._before: Progress | None = None  # that of the fit that this one goes on from
        self._loaded: dict[str, Any] | None = None
        self._optimizers: list[dict[str, Any]] = []  # what the last fit left for a checkpoint that is written after it
        self._monitor = Monitor()
        self._fit: Fit | None = None

    @property
    def history(self) -> list[tuple[int, int, int]]:
        """Where each phase began: ``(epoch, global_step, phase_index)``.

        Under ``ddp_spawn`` and ``ddp_fork`` it stays in the processes that train: use ``strategy="ddp"`` to read it
        after the fit.
        """
        return self._progress.history if self._progress is not None else []

    @property
    def phase_index(self) -> int:
        """The index of the current phase, from 0."""
        return self._progress.index if self._progress is not None else 0

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.phase_index]

    @property
    def trained(self) -> list[str]:
        """The names of all parameters that a phase so far has trained: what a trainable-only checkpoint has to keep."""
        return trained_so_far(self.fit, self.history)

    @property
    def fit(self) -> Fit:
        """The schedule at work, during a fit."""
        if self._fit is None:
            raise RuntimeError("No fit is running.")
        return self._fit

    def preview(
        self,
        model: nn.Module,
        max_epochs: int,
        *,
        steps_per_epoch: int | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> Table:
        """Return what each phase would train, without training.

        Args:
            model: The LightningModule, or any module with the same names.
            max_epochs: The Trainer's.
            steps_per_epoch: Optimizer steps an epoch takes, for schedules with phases that last a number of steps.
            callbacks: The Trainer's other callbacks, which may keep parameters frozen too; those of the Trainer that
                the model is attached to if not given.

        Returns:
            A table, one row a phase; print it.

        Raises:
            ValueError: If a phase names or trains nothing, or a number of epochs or steps is not positive.
        """
        return preview_table(self._plan(model, max_epochs, steps_per_epoch, callbacks))

    def plot(
        self,
        model: nn.Module,
        max_epochs: int,
        *,
        steps_per_epoch: int | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> Figure:
        """Draw which modules train when, without training.

        Args:
            model: The LightningModule, or any module with the same names.
            max_epochs: The Trainer's.
            steps_per_epoch: Optimizer steps an epoch takes, for schedules with phases that last a number of steps.
            callbacks: As in :meth:`preview`.

        Returns:
            A matplotlib figure.

        Raises:
            ValueError: As :meth:`preview`.
            ModuleNotFoundError: If matplotlib is not installed; ``pip install 'lightning-freeze[plot]'`` does it.
        """
        return plot_schedule(self._plan(model, max_epochs, steps_per_epoch, callbacks))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, the schedule to recognise it by, and the state of what optimizers were not given."""
        optimizers = self._fit.state() if self._fit is not None else self._optimizers
        progress = self._progress or Progress([])
        return {**progress.state_dict(self.phases), "optimizers": optimizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the progress from a checkpoint at the next hook; one written before a fit has none."""
        self._loaded = state_dict if state_dict["history"] else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the metric's value that no look has taken in yet; hyperparameters as they are after the fit."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._fit is not None:
            self.progress.unlooked = self._epoch_value(trainer)
            kept = weights_to_keep(pl_module, self._fit, self.history)
            checkpoint["callbacks"][self.state_key] = self.state_dict() | {"trained": kept}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore weights that a trainable-only checkpoint lacks; refuse what version 0.1.0 adopted."""
        restore(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key), pl_module)

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._loaded = None  # of a fit that failed before it could go on; this fit's checkpoint is restored later
        if sum(isinstance(callback, FreezeSchedule) for callback in callbacks_of(trainer)) > 1:
            raise MisconfigurationException(
                "The Trainer has two FreezeSchedule callbacks, and each would undo what the other does. "
                "Put their phases into one."
            )
        for callback in callbacks_of(trainer):
            if isinstance(callback, BaseFinetuning):
                raise MisconfigurationException(
                    f"The Trainer has FreezeSchedule and {type(callback).__name__}, and each would undo what the other "
                    "does. Leave one of them out."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the schedule against the module and apply the phase, before anything is trained or restored."""
        if self.frozen_mode != "train":
            refuse_new_statistics(trainer, pl_module, type(self).__name__)
        super().on_fit_start(trainer, pl_module)
        fresh = self._loaded is not None or (trainer.current_epoch, trainer.global_step) == (0, 0)
        self._before = None if fresh else self._progress
        self._optimizers = []
        self._fit = begin_fit(
            self.phases,
            self.ledger,
            pl_module,
            mode=self.frozen_mode,
            policy=self.optimizer_state,
            who=self.state_key,
        )
        self._fit.begin(trainer)
        self._take_up(trainer)
        self._apply(trainer, modes=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the phase again, now that progress, optimizers and schedulers are restored."""
        self._monitor = Monitor()
        self._check_batches(trainer)
        self._restore(trainer)
        report.begin(trainer, pl_module, self.phases, self.fit, steps_per_epoch(trainer))
        self._announce(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next phase if this one is over, and put right what other code has switched."""
        if self._loaded is not None:
            self._restore(trainer)
        self._look(trainer, self._epoch_value(trainer))
        self.progress.unlooked = None
        self._check_monitors(trainer)
        self._monitor.begin_epoch()
        if not self._advance(trainer, pl_module):
            self.ledger.settle()
        self._log_metrics(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the next phase between two optimizer steps if this one is over, and log scaled rates."""
        if self._loaded is not None:
            self._restore(trainer)
        fit, progress = self.fit, self.progress
        if fit.follow(trainer):
            report.log_exchange(trainer)
            self._apply(trainer)
        step = trainer.global_step + progress.uncounted
        # Every batch comes here: the cheap question first.
        if progress.is_due(self.phases, step) and batch_idx % trainer.accumulate_grad_batches == 0:
            # Where the user steps, only a step since then tells that no accumulation window is open.
            closed = pl_module.automatic_optimization or step != progress.plateau.ended_at
            if self._advance(trainer, pl_module, plateau=closed):
                self._log_metrics(trainer)
        fit.begin_batch(trainer.global_step)
        # As LearningRateMonitor does: after the batch a scheduler has gone on to the next step's rate.
        if self.phase.scales and trainer.loggers and (logged_step(trainer) + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_rates(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimizer steps that Lightning has not counted."""
        self.ledger.steps.reset()  # user code may have caught the error of one
        if uncounted := self.fit.uncounted(trainer.global_step):
            report.log_uncounted(trainer, first=self.progress.uncounted == 0)
            self.progress.uncounted += uncounted

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the monitored metric, to tell whether validation logs it."""
        self._monitor.begin_validation(self.phase.until, trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the monitored metric if validation has logged it."""
        if self._fit is not None and not trainer.sanity_checking:
            value = self._monitor.end_validation(self.phase.until, trainer.callback_metrics, self.phase_index)
            self._look(trainer, mean_over_ranks(trainer.strategy, value) if self.phase.until else None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch is over; what it logs is final after all hooks, when the next one begins."""
        self._monitor.epoch_over = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the fit ends before the last phase."""
        self.progress.unlooked = self._epoch_value(trainer)
        report.end(trainer, self.phases, self.progress)

    def _close(self, trainer: Trainer) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            if self._loaded is not None:  # a checkpoint of a fit that had nothing left to do
                fit.load_state(self._loaded.get("optimizers", []))
            self._optimizers = fit.release()
        super()._close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore everything."""
        super().teardown(trainer, pl_module, stage)
        self._loaded = None

    # What

    @property
    def progress(self) -> Progress:
        """Where in the schedule the fit is, from fit start on."""
        assert self._progress is not None
        return self._progress

    def _take_up(self, trainer: Trainer) -> None:
        at = (trainer.current_epoch, trainer.global_step)
        self._progress = begin_or_go_on(self.phases, self._before, self._loaded, at, lambda: steps_per_epoch(trainer))

    def _restore(self, trainer: Trainer) -> None:
        """Go on from what a checkpoint held; tuners restore one in the middle of a fit too."""
        self._take_up(trainer)
        if self._loaded is not None:
            report.another_schedule(trainer, self.phases, self._loaded, self.phase_index)
            self.fit.load_state(self._loaded.get("optimizers", []))
        self._loaded = None
        self._apply(trainer)

    def _advance(self, trainer: Trainer, pl_module: LightningModule, *, plateau: bool = True) -> bool:
        step = trainer.global_step + self.progress.uncounted
        if not self.progress.advance(self.phases, trainer.current_epoch, step, plateau=plateau):
            return False
        self._monitor.begin_phase()
        self._apply(trainer)
        self._announce(trainer, pl_module)
        return True

    def _apply(self, trainer: Trainer, *, modes: bool = True) -> None:
        """Bring everything in line with the phase; doing it twice changes nothing."""
        index, resolved = self.phase_index, self.fit.resolved
        check_agreement(
            trainer.strategy,
            schedule=describe(self.phases),
            epoch=trainer.current_epoch,
            phase=index,
            trains=[(name, tuple(p.shape)) for name, p in resolved.trains[index].items()],
        )
        self.ledger.hold(self.state_key, resolved.holds[index])
        self.ledger.settle(modes=modes)
        self.fit.apply(index)

    # Plateaus

    def _epoch_value(self, trainer: Trainer) -> float | None:
        """Return the metric's value that the next epoch's start will look at, the same on all ranks."""
        if self.phase.until is None or not self._monitor.epoch_over:
            return self.progress.unlooked
        return mean_over_ranks(trainer.strategy, self._monitor.epoch_value(self.phase.until, trainer.callback_metrics))

    def _look(self, trainer: Trainer, value: float | None) -> None:
        if self.phase.until is not None and value is not None:
            step = trainer.global_step + self.progress.uncounted
            self.progress.plateau.look(self.phase.until, value, step)

    def _check_monitors(self, trainer: Trainer) -> None:
        """Raise for a plateau that can never come, as soon as every loop has run that could log its metric."""
        index, validates = self.phase_index, trainer.enable_validation
        numbers = self._monitor.checkable(
            index, len(self.phases), trainer.current_epoch - self.history[-1][0], validates
        )
        for number in numbers:
            until = self.phases[number].until
            if until is not None and only_true(trainer.strategy, until.monitor not in trainer.callback_metrics):
                report.metric_is_missing(trainer, self.phases, number, is_current=number == index)

    def _check_batches(self, trainer: Trainer) -> None:
        """Refuse ranks of which some would run out of batches before others: no phase would end for all at once."""
        if len(self.phases) == 1:
            return
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

    # Words

    def _announce(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.verbose and trainer.is_global_zero:
            report.phase_begins(pl_module, self.phases, self.progress, self.fit)

    def _log_metrics(self, trainer: Trainer) -> None:
        values = {"freeze/phase": float(self.phase_index), "freeze/trainable_parameters": float(self.fit.trainable())}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logged_step(trainer))

    def _log_rates(self, trainer: Trainer) -> None:
        rates = {f"freeze/lr/{select}": rate for select, rate in self.fit.rates(self.phase_index).items()}
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=logged_step(trainer))

    def _plan(self, model: nn.Module, max_epochs: int, steps: int | None, callbacks: Sequence[Callback] | None) -> Plan:
        return Plan.of(self.phases, model, max_epochs, steps, self.frozen_mode, callbacks)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return super().__getstate__() | {"_fit": None, "_optimizers": [], "_monitor": Monitor()}
