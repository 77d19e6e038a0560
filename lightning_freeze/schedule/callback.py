"""Scheduled freezing and unfreezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, resume_with_epoch, without_fit
from lightning_freeze.freezing.callback import refuse_new_statistics
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.freezing.optimizers import OptimizerState
from lightning_freeze.schedule import report
from lightning_freeze.schedule.course import Course
from lightning_freeze.schedule.fit import begin_fit
from lightning_freeze.schedule.length import refuse_uneven_ranks
from lightning_freeze.schedule.meaning import FrozenMode
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.plan import Plan
from lightning_freeze.schedule.preset import Preset, as_schedule
from lightning_freeze.schedule.preview import OptimizerLike, preview_table, schedule_text
from lightning_freeze.schedule.progress import Begin, Progress
from lightning_freeze.schedule.weights import restore, weights_to_keep
from lightning_freeze.tables import Table
from lightning_freeze.words import one_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FreezeSchedule(Holder):
    """Say which parameters train when; everything that has to follow follows.

    Before the first batch, and whenever a phase ends, the flags of all parameters, the mode of frozen BatchNorm layers,
    the optimizers and the DDP wrapper are brought in line with the phase. The phase changes at an epoch's start or
    between optimizer steps, never inside an accumulation window; only in manual optimization a window that spans an
    epoch's end is cut by a phase that lasts epochs. With the last phase the fit ends. What a :class:`TargetNetwork` or
    :class:`FreezeBatchNorm` keeps frozen never trains, also where a phase selects it with other parameters. After the
    fit, also after an interrupted one, flags, modes and optimizers are as they were; what was learned stays.

    ``on_phase_start(trainer, pl_module, phase)`` and ``on_phase_end``, with the same arguments, are called around each
    phase on every callback that has them and then on the module.

    Args:
        phases: The schedule: :class:`Phase` objects, dicts of their arguments, as YAML gives them, or a preset.
        frozen_mode: How wholly frozen modules run: ``"batchnorm"`` puts only layers with running statistics, and
            modules that learn in buffers alone, in eval mode, ``"eval"`` the whole module (its dropout is off too),
            ``"train"`` leaves modes alone.
        optimizer_state: What becomes of a parameter's optimizer state when it freezes: ``"keep"``; ``"drop"``, its
            memory is freed and it starts anew; or ``"offload"``, to the CPU until the parameter trains again.
        verbose: Log a line for each phase that begins.

    Raises:
        ValueError: If a phase that is not the last has no end; at fit start, if a phase names or trains nothing, or if
            an optimizer would refuse in mid-fit what the schedule asks of it.
        MisconfigurationException: At fit start, if the Trainer has a strategy, an optimizer or another callback with
            which the schedule cannot be exact.

    Example:
        >>> schedule = FreezeSchedule([
        ...     Phase(train="head", epochs=2),
        ...     Phase(train="*", lr_scale={"backbone": 0.1}),
        ... ])
        >>> schedule.phase
        Phase(train='head', epochs=2)
    """

    _course: Course | None = None
    _loaded: dict[str, Any] | None = None  # what a checkpoint has brought, until a hook takes it over

    def __init__(
        self,
        phases: Sequence[Phase | Mapping[str, Any]] | Preset,
        *others: Any,  # refused
        frozen_mode: FrozenMode = "batchnorm",
        optimizer_state: OptimizerState = "keep",
        verbose: bool = True,
    ) -> None:
        self.phases: Sequence[Phase] = as_schedule(phases, *others)
        self.frozen_mode = one_of("FreezeSchedule", "frozen_mode", frozen_mode, get_args(FrozenMode))
        self.optimizer_state = one_of("FreezeSchedule", "optimizer_state", optimizer_state, get_args(OptimizerState))
        self.verbose = verbose
        # Of the last fit, for a checkpoint that is written after it.
        self._progress = Progress([])
        self._optimizers: list[dict[str, Any]] = []
        self._trained: list[str] = []

    def __repr__(self) -> str:
        return schedule_text(self)

    @property
    def progress(self) -> Progress:
        """Where in the schedule the fit is, or the last one was."""
        return self._course.progress if self._course is not None else self._progress

    @property
    def history(self) -> list[Begin]:
        """Where each phase began, ``(epoch, global_step, phase_index)``; its ``why`` says what ended the one before."""
        return self.progress.history

    @property
    def phase_index(self) -> int:
        """The index of the current phase, from 0."""
        return self.progress.index if self.history else 0

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.phase_index]

    @property
    def trained(self) -> list[str]:
        """The names of what phases so far have trained, after the fit too: what a trainable-only file has to keep."""
        if self._course is None:
            return self._trained
        fit, begun = self._course.fit, {index for _, _, index in self.history}
        return [name for name in fit.ledger.parameters if any(name in fit.resolved.trains[index] for index in begun)]

    @property
    def course(self) -> Course:
        """The course of the fit that runs."""
        assert self._course is not None, "No fit is running."
        return self._course

    def preview(
        self,
        model: nn.Module,
        max_epochs: int | None = None,
        *,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
        callbacks: Sequence[Callback] | None = None,
        optimizer: OptimizerLike | None = None,
    ) -> Table:
        """Return a table of what each phase would train, and what that takes, without training; print it.

        Args:
            model: The LightningModule, or any module with the same names.
            max_epochs: The Trainer's. Without it and ``max_steps``: those of the Trainer that the model is attached to.
            max_steps: The Trainer's.
            steps_per_epoch: Optimizer steps an epoch takes, for schedules in which phases count the other unit.
            callbacks: The Trainer's other callbacks, which may freeze too; those of the model's Trainer if not given.
            optimizer: One, or a function that makes one of parameters, to count its state; the model's if not given.

        Raises:
            ValueError: If a phase names or trains nothing, or a number of epochs or steps is not positive.
        """
        plan = Plan.of(self, model, max_epochs, max_steps, steps_per_epoch, callbacks)
        return preview_table(plan, self.optimizer_state, optimizer)

    def plot(
        self,
        model: nn.Module,
        max_epochs: int | None = None,
        *,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> Figure:
        """Return a figure of what trains when, and the learning rates below; arguments as for :meth:`preview`.

        During a fit and after it, for a model that is attached to its Trainer, the picture is what has happened. It
        needs matplotlib: ``pip install 'lightning-freeze[plot]'``.
        """
        from lightning_freeze.schedule.plot import plot_schedule

        return plot_schedule(Plan.of(self, model, max_epochs, max_steps, steps_per_epoch, callbacks, happened=True))

    def next_phase(self) -> None:
        """End the current phase before the next optimizer step; with the last phase the fit ends.

        An accumulation window is not cut. Of several processes one may ask; they move when the next epoch begins.

        Raises:
            RuntimeError: If no fit is running.
        """
        if self._course is None:
            raise RuntimeError("next_phase() ends a phase of the fit that runs, and none does: call it from a hook.")
        self.progress.asked = True

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, the schedule to recognise it by, and the state of what optimizers were not given."""
        optimizers = self._course.fit.state() if self._course is not None else self._optimizers
        state = {**self.progress.state_dict(self.phases if self.history else []), "optimizers": optimizers}
        return state | (self._loaded or {})  # what a checkpoint has brought and no hook has taken over yet

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the progress from a checkpoint at the next hook; one written before a fit has none."""
        self._loaded = state_dict if state_dict["history"] else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save also a metric's value that no look has taken in yet, and weights that the module may leave out."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._course is not None:
            self._course.fit.schedulers.as_the_users(checkpoint)
            self._course.agree()
        trained = weights_to_keep(pl_module, trainer.strategy, self.trained)
        checkpoint["callbacks"][self.state_key] = {**self.state_dict(), "trained": trained}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore weights that a trainable-only checkpoint lacks; refuse what version 0.1.0 adopted."""
        resume_with_epoch(trainer, checkpoint)
        if self._course is not None:  # a tuner restores in mid-fit; the file has the user's schedulers
            self._course.fit.schedulers.end()
        restore(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key), pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the schedule against the module and apply the phase, before anything is trained or restored."""
        report.refuse_rivals(trainer, FreezeSchedule)
        if self.frozen_mode != "train":
            refuse_new_statistics(trainer, pl_module, type(self).__name__)
        super().on_fit_start(trainer, pl_module)
        is_fresh = self._loaded is not None or (trainer.current_epoch, trainer.global_step) == (0, 0)
        fit = begin_fit(self.phases, self.ledger, trainer, self.frozen_mode, self.optimizer_state, self.state_key)
        self.phases, self._optimizers, before = fit.phases, [], None if is_fresh else self._progress
        self._course = Course(fit, trainer, self.state_key, before, verbose=self.verbose)
        self._course.begin(self._loaded)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the phase again, now that progress, optimizers and schedulers are restored."""
        self.course.fit.take_steps(trainer)
        refuse_uneven_ranks(trainer, self.phases)
        self._restore()
        report.fit_begins(trainer, self, self.progress, self.course.fit)
        self.course.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next phase if this one is over."""
        if self._loaded is not None:
            self._restore()
        if not self.course.begin_epoch():
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the next phase between two optimizer steps if this one is over."""
        if self._loaded is not None:
            self._restore()
        self.course.begin_batch(batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the steps that Lightning has not counted."""
        self.course.end_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is logged, to tell what validation logs."""
        if self._course is not None:
            self._course.looks.begin_validation()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the monitored metric if validation has logged it."""
        if self._course is not None:
            self._course.end_validation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch is over; what it logs is final after all hooks, when the next one begins."""
        self.course.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last phase, or say that it never began."""
        self.course.end()

    def _restore(self) -> None:
        loaded, self._loaded = self._loaded, None
        self.course.restore(loaded)

    def _close(self, trainer: Trainer) -> None:
        course, loaded, self._trained = self._course, self._loaded, self.trained
        self._course = self._loaded = None
        if course is not None:
            if loaded is not None:  # a checkpoint of a fit that had nothing left to do
                course.fit.load_state(loaded.get("optimizers", []))
            self._progress, self._optimizers = course.progress, course.fit.release()
        super()._close(trainer)

    def __getstate__(self) -> dict[str, Any]:
        return without_fit(self, _optimizers=[], _progress=self.progress)
