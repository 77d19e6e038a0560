"""Scheduled freezing and unfreezing."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_freeze._lightning import (
    BaseFinetuning,
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    _MockOptimizer,
    without_fit,
)
from lightning_freeze.freezing.averagers import refuse_new_statistics, refuse_rates_by_group
from lightning_freeze.freezing.batchnorm import (
    every_module,
    has_running_statistics,
    held_affine,
    hold_eval,
    is_held,
    release_eval,
)
from lightning_freeze.freezing.hyperparameters import give_back_modules
from lightning_freeze.freezing.optimizers import HomeGroups, OptimizerState, check_optimizer, homeless, strangers
from lightning_freeze.freezing.strategies import (
    CheckpointsByName,
    check_agreement,
    check_strategy,
    follow_trainable_set,
    mean_over_ranks,
    only_true,
    reshard,
)
from lightning_freeze.functional import scalars, set_trainable
from lightning_freeze.logs import get_logger
from lightning_freeze.schedule.phases import Phase, PlateauWatch, as_phases, describe, walk
from lightning_freeze.schedule.plan import (
    FrozenMode,
    HoldsBatchNorm,
    KeepsFrozen,
    held_modules,
    phase_scales,
    phase_trains,
    without_held,
)
from lightning_freeze.schedule.preview import plot_schedule, preview_table
from lightning_freeze.selectors import named_unique_parameters
from lightning_freeze.words import Table, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = get_logger(__name__)
_HOLDER = "FreezeSchedule"


class FreezeSchedule(Callback):
    """Say which parameters train when; everything that has to follow follows.

    Before the first batch, and whenever a phase ends, the flags of all parameters, the mode of frozen BatchNorm layers,
    the optimizer's groups with the learning rates in them, and the DDP wrapper are brought in line with the phase. The
    phase changes at an epoch's start or between optimizer steps, never inside an accumulation window; only in manual
    optimization a window that spans an epoch's end is cut by a phase that lasts epochs. The last phase holds until the
    fit ends. The target of a :class:`TargetNetwork` never trains, also where a phase selects it with other parameters.
    After the fit, also after one that was interrupted, everything is given back as it was; what was learned stays.

    Args:
        phases: The schedule: :class:`Phase` objects, or dicts of their arguments, as YAML gives them.
        frozen_mode: How wholly frozen modules run: ``"batchnorm"`` puts only layers with running statistics in eval
            mode, ``"eval"`` the whole module (its dropout is off too), ``"train"`` leaves modes alone.
        optimizer_state: What becomes of a parameter's optimizer state when it freezes: ``"keep"``; ``"drop"``, its
            memory is freed and it starts anew; or ``"offload"``, to the CPU until the parameter trains again.
        verbose: Log a line for each phase that begins.

    Attributes:
        phases: The schedule as a list of :class:`Phase`.
        history: Where each phase began: a list of ``(epoch, global_step, phase_index)``. Under ``ddp_spawn`` and
            ``ddp_fork`` it stays in the processes that train: use ``strategy="ddp"`` to read it after the fit.

    Raises:
        ValueError: If the schedule is empty or a phase that is not the last has no end; at fit start, if a phase names
            or trains nothing.
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
        self.frozen_mode = _one_of("frozen_mode", frozen_mode, get_args(FrozenMode))
        self.optimizer_state = _one_of("optimizer_state", optimizer_state, get_args(OptimizerState))
        self.verbose = verbose
        self.history: list[tuple[int, int, int]] = []
        self._watch = PlateauWatch()
        self._loaded: dict[str, Any] | None = None
        self._continues = False
        self._fit: _Fit | None = None
        # The metric's value taken in last and that before validation, whether one was taken in this epoch, the phase in
        # which validation last ran, epochs begun, whether metrics of later phases have been looked for.
        self._seen: torch.Tensor | None = None
        self._before_validation: torch.Tensor | None = None
        self._looked = False
        self._validated: int | None = None
        self._epochs = 0
        self._looked_ahead = False

    @property
    def phase_index(self) -> int:
        """The index of the current phase, from 0."""
        return self.history[-1][2] if self.history else 0

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.phase_index]

    def preview(self, model: nn.Module, max_epochs: int, *, steps_per_epoch: int | None = None) -> Table:
        """Give what each phase would train, without training.

        Args:
            model: The LightningModule, or any module with the same names.
            max_epochs: The Trainer's.
            steps_per_epoch: Optimizer steps an epoch takes, for schedules with phases that last a number of steps.

        Returns:
            A table, one row a phase; print it.

        Raises:
            ValueError: If a phase names or trains nothing, or a number of epochs or steps is not positive.
        """
        return preview_table(self.phases, model, max_epochs, steps_per_epoch, self.frozen_mode)

    def plot(self, model: nn.Module, max_epochs: int, *, steps_per_epoch: int | None = None) -> Figure:
        """Draw which modules train when, without training.

        Args:
            model: The LightningModule, or any module with the same names.
            max_epochs: The Trainer's.
            steps_per_epoch: Optimizer steps an epoch takes, for schedules with phases that last a number of steps.

        Returns:
            A matplotlib figure.

        Raises:
            ValueError: As :meth:`preview`.
            ModuleNotFoundError: If matplotlib is not installed; ``pip install 'lightning-freeze[plot]'`` does it.
        """
        return plot_schedule(self.phases, model, max_epochs, steps_per_epoch)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Give the progress of the schedule, and the schedule itself to recognise it by."""
        return {
            "history": [list(begin) for begin in self.history],
            "plateau": dataclasses.asdict(self._watch),
            "schedule": describe(self.phases),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the progress from a checkpoint at the next hook; one written before a fit has none."""
        self._loaded = state_dict if state_dict["history"] else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the checkpoint as the user's own: LR schedulers without entries for the groups that only show here.

        Modules among the hyperparameters are saved as they are after the fit.
        """
        if self._fit is None:
            return
        reduced = trainer._logger_connector._first_loop_iter is None  # before, metrics are the last batch's
        if reduced and not trainer.validating and trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._look_once(trainer)  # a metric logged in LightningModule.on_train_epoch_end is only there now
        checkpoint["callbacks"][self.state_key] = self.state_dict()
        homes = {id(home.optimizer): home for home in self._fit.homes}
        checkpoint["lr_schedulers"] = [
            homes[id(config.scheduler.optimizer)].scheduler_state(config.scheduler)
            if id(config.scheduler.optimizer) in homes
            else state
            for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True)
        ]
        give_back_modules(checkpoint, pl_module, self._fit.flags)

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        self._loaded = None  # of a fit that failed before it could go on; this fit's checkpoint is restored later
        check_strategy(trainer.strategy)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, FreezeSchedule) for callback in callbacks) > 1:
            raise MisconfigurationException(
                "The Trainer has two FreezeSchedule callbacks, and each would undo what the other does. "
                "Put their phases into one."
            )
        for callback in callbacks:
            if isinstance(callback, BaseFinetuning):
                raise MisconfigurationException(
                    f"The Trainer has FreezeSchedule and {type(callback).__name__}, and each would undo what the other "
                    "does. Leave one of them out."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the schedule against the module and apply the phase, before anything is trained or restored."""
        if self.frozen_mode != "train":
            refuse_new_statistics(trainer, pl_module, type(self).__name__)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HoldsBatchNorm):  # before flags change: it notes what it finds, to give it back
                callback.hold(trainer, pl_module)
        self._take_up(trainer, restored=False)
        self._fit = _begin_fit(self, trainer, pl_module)
        # Modes wait for on_train_start: before it, Lightning warns of modules in eval mode.
        self._apply(trainer, pl_module, modes=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the phase again, now that progress, optimizers and schedulers are restored."""
        self._looked, self._validated, self._epochs, self._looked_ahead = False, None, 0, False
        self._check_batches(trainer)
        self._restore(trainer, pl_module)
        self._announce(trainer, pl_module)
        self._warn_of_unreached(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next phase if this one is over."""
        if self._loaded is not None:
            self._restore(trainer, pl_module)
        self._look_once(trainer)  # as in on_save_checkpoint
        if self._epochs > 0:
            self._check_monitors(trainer)
        self._looked = False
        # Whoever has read validation metrics after our look has left the old value as a new object.
        self._seen = self._monitored(trainer)
        self._epochs += 1
        self._advance(trainer, pl_module, plateau=self._watch.ended)
        self._log_metrics(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the next phase between two optimizer steps if this one is over."""
        if self._loaded is not None:
            self._restore(trainer, pl_module)
        begin = self.history[-1]
        steps = self.phases[begin[2]].steps
        if not self._watch.ended and (steps is None or trainer.global_step - begin[1] < steps):
            return  # every step comes here: the cheap question first
        if batch_idx % trainer.accumulate_grad_batches:
            return
        # Where the user steps, only a step since then tells that no accumulation window is open.
        closed = pl_module.automatic_optimization or trainer.global_step != self._watch.ended_at
        if self._advance(trainer, pl_module, plateau=self._watch.ended and closed):
            self._log_metrics(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Show scaled learning rates as they will be used, to an optimizer that calls no hooks."""
        if self._fit is not None:
            for homes in self._fit.homes:
                if not homes.calls_hooks:
                    homes.follow()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show scaled learning rates as they will be used, after the schedulers have stepped."""
        if self._fit is not None:
            for homes in self._fit.homes:
                homes.follow()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the monitored metric's value, to tell whether validation logs it."""
        if self._fit is not None:
            self._before_validation = self._monitored(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the monitored metric if validation has logged it."""
        if self._fit is not None and not trainer.sanity_checking:
            self._validated = self.phase_index
            self._looked = self._look(trainer, old=self._before_validation) or self._looked

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the monitored metric if training has logged it."""
        self._look_once(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give everything back."""
        self._release(trainer, pl_module)
        self._loaded = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give everything back."""
        self._release(trainer, pl_module)

    # What

    def _take_up(self, trainer: Trainer, *, restored: bool) -> None:
        """Find out where in the schedule the fit is: fresh, continued, resumed, or resumed from another schedule."""
        epoch, step = trainer.current_epoch, trainer.global_step
        if self._loaded is not None and self._loaded["schedule"] == describe(self.phases):
            self.history = [(epoch, step, index) for epoch, step, index in self._loaded["history"]]
            self._watch = PlateauWatch(**self._loaded["plateau"])
            return
        if not restored:
            self._continues = self._loaded is None and bool(self.history) and (epoch, step) != (0, 0)
        if self._continues and self.history[-1][:2] <= (epoch, step):  # else a checkpoint without us went back
            return
        was = self._loaded["history"][-1][2] if self._loaded and self._loaded["history"] else 0
        self.history = walk(self.phases, epoch, step, _steps_per_epoch(trainer), passed=was)
        self._watch = PlateauWatch()
        if restored and self._loaded is not None and trainer.is_global_zero:
            then = self._loaded["schedule"]
            _log.warning(
                "The checkpoint was written under another schedule. It was in phase %d/%d %r; this schedule is, at "
                "epoch %d, step %d, in phase %d/%d %r.\nThe schedule was: %s\nThe schedule is:  %s",
                *(was + 1, len(then), then[was]["name"] or then[was]["train"], epoch, step),
                *(self.phase_index + 1, len(self.phases), self.phase.label, _line(then), _line(describe(self.phases))),
            )

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from what a checkpoint held; tuners restore one in the middle of a fit too."""
        self._take_up(trainer, restored=True)
        self._loaded = None
        self._apply(trainer, pl_module)

    def _advance(self, trainer: Trainer, pl_module: LightningModule, *, plateau: bool) -> bool:
        """Begin the next phase, and the one after it, as long as one is over; give whether one began.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            plateau: Whether its plateau ends the current phase.
        """
        before = self.phase_index
        while self.phase_index + 1 < len(self.phases):
            begin = self.history[-1][:2]
            if not (plateau or self.phase.is_over(begin, trainer.current_epoch, trainer.global_step)):
                break
            self.history.append((trainer.current_epoch, trainer.global_step, self.phase_index + 1))
            self._watch, plateau = PlateauWatch(), False
            self._seen = self._monitored(trainer)
        if self.phase_index == before:
            return False
        self._apply(trainer, pl_module)
        self._announce(trainer, pl_module)
        return True

    def _apply(self, trainer: Trainer, pl_module: LightningModule, *, modes: bool = True) -> None:
        """Bring flags, modes, optimizers and wrapper in line with the phase; doing it twice changes nothing."""
        assert self._fit is not None
        check_agreement(
            trainer.strategy,
            schedule=describe(self.phases),
            epoch=trainer.current_epoch,
            phase=self.phase_index,
            trains=[(name, tuple(p.shape)) for name, p in self._fit.trains[self.phase_index].items()],
        )
        reshard(trainer.strategy, pl_module)
        selected = self._fit.trains[self.phase_index]
        trains = {id(p) for p in without_held(self.phase, selected, held_affine(pl_module)).values()}
        ours = [p for p in self._fit.parameters.values() if id(p) not in self._fit.kept]
        changed = [p for p in ours if p.requires_grad != (id(p) in trains)]
        for parameter in changed:
            set_trainable(parameter, id(parameter) in trains)
        if modes:
            stay = [m for m in held_modules(pl_module, trains, self.frozen_mode) if m not in self._fit.kept_modules]
            release_eval(pl_module, _HOLDER, keep=set(stay))
            hold_eval(stay, _HOLDER)
        for homes in self._fit.homes:
            homes.apply(self.phase_index, trains)
        if changed:
            follow_trainable_set(trainer.strategy, froze=[p for p in changed if not p.requires_grad])

    def _release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit, self._fit = self._fit, None
        if fit is None:
            return
        fit.checkpoints.release()
        reshard(trainer.strategy, pl_module)
        for homes in fit.homes:
            homes.release()
        release_eval(pl_module, _HOLDER)
        for parameter, flag in fit.flags:
            parameter.requires_grad = flag

    # Plateaus

    def _monitored(self, trainer: Trainer) -> torch.Tensor | None:
        """Give the value of the metric that ends the phase, None if there is none."""
        until = self.phase.until
        return trainer.callback_metrics.get(until.monitor) if until is not None else None

    def _look(self, trainer: Trainer, old: torch.Tensor | None = None) -> bool:
        """Take in the monitored metric if a rank has a new value of it; give whether one had. For all ranks at once.

        The value is the mean over the ranks that logged one: without ``sync_dist`` each has another.
        """
        until, value = self.phase.until, self._monitored(trainer)
        if until is None:
            return False
        if value is self._seen or value is old:
            value = None
        mean = mean_over_ranks(trainer.strategy, None if value is None else float(value))
        self._seen = self._seen if value is None else value
        if mean is not None:
            self._watch.look(until, mean, trainer.global_step)
        return mean is not None

    def _look_once(self, trainer: Trainer) -> None:
        """Look, unless this epoch's value has been taken in: training metrics are new objects at every look."""
        self._looked = self._looked or self._look(trainer)

    def _check_monitors(self, trainer: Trainer) -> None:
        """Raise for a plateau that can never come, as soon as every loop has run that could log its metric.

        Of later phases it can only warn: their metrics may be such that nothing logs before.
        """
        index, validates = self.phase_index, trainer.enable_validation
        ran = trainer.current_epoch > self.history[-1][0] and (not validates or self._validated == index)
        if ran and (missing := self._missing(trainer, self.phase)):
            raise MisconfigurationException(f"Phase {self.phase.label!r} {missing}")
        if self._looked_ahead or (validates and self._validated is None):
            return
        self._looked_ahead = True
        for number, phase in enumerate(self.phases[index + 1 :], index + 2):
            if (missing := self._missing(trainer, phase)) and trainer.is_global_zero:
                _log.warning(
                    "phase %d/%d %r %s If it is not logged in that phase either, the fit ends there with an error.",
                    *(number, len(self.phases), phase.label, missing),
                )

    def _missing(self, trainer: Trainer, phase: Phase) -> str | None:
        """Say which metric a phase waits for that no rank has logged, None if there is none. For all ranks at once."""
        until = phase.until
        if until is None or not only_true(trainer.strategy, until.monitor not in trainer.callback_metrics):
            return None
        logged = sorted(map(str, trainer.callback_metrics))
        close = difflib.get_close_matches(until.monitor, logged, n=1)
        return (
            f"ends by Plateau(monitor={until.monitor!r}), but no metric of that name was logged."
            f"{f' Did you mean {close[0]!r}?' if close else ''} Logged are: {', '.join(logged) or 'none'}."
        )

    def _check_batches(self, trainer: Trainer) -> None:
        """Refuse ranks of which some would run out of batches before others: no phase would end for all at once."""
        if len(self.phases) == 1:
            return
        batches: float = trainer.num_training_batches
        if trainer.max_steps >= 0:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        _refuse_differences(
            trainer,
            "Ranks have different numbers of training batches, and Lightning waits forever for those that run out. "
            "Give every rank as many, for example by limit_train_batches=….",
            batches=batches,
        )
        if any(phase.until is not None for phase in self.phases):
            _refuse_differences(
                trainer,
                "A rank has no validation batches, and those that have some would wait for it forever to agree on the "
                "Plateau's metric. Give every rank some.",
                validates=sum(trainer.num_val_batches) > 0,
            )

    # Words

    def _announce(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.verbose and trainer.is_global_zero and self._fit is not None):
            return
        epoch, step, index = self.history[-1]
        total, trainable = self._fit.total, self._trainable()
        line = (
            f"phase {index + 1}/{len(self.phases)} {self.phase.label!r} from epoch {epoch}, step {step}: "
            f"trains {trainable:,} of {total:,} parameters ({percent(trainable, total)})"
        )
        layers = [layer for layer in every_module(pl_module) if has_running_statistics(layer)]
        if layers:
            line += f", {sum(map(is_held, layers))} of {len(layers)} BatchNorm frozen"
        _log.info(line)

    def _log_metrics(self, trainer: Trainer) -> None:
        values = {"freeze/phase": float(self.phase_index), "freeze/trainable_parameters": float(self._trainable())}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _trainable(self) -> int:
        assert self._fit is not None
        return sum(scalars(p) for p in self._fit.parameters.values() if p.requires_grad)

    def _warn_of_unreached(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        last = walk(
            self.phases,
            sys.maxsize if epochs is None else epochs - 1,
            sys.maxsize if steps is None else steps - 1,
            _steps_per_epoch(trainer),
            passed=len(self.phases),
        )[-1][2]
        limits = [f"max_{unit}={most}" for unit, most in (("epochs", epochs), ("steps", steps)) if most is not None]
        for number, phase in enumerate(self.phases[last + 1 :], last + 2):
            _log.warning(
                "phase %d/%d %r never begins: the fit ends before, at %s.",
                *(number, len(self.phases), phase.label, " or ".join(limits)),
            )
        looks = max(1.0, trainer.num_training_batches / (trainer.val_check_batch or 1))
        for number, phase in enumerate(self.phases[:-1], 1):
            if phase.until is not None and phase.epochs is not None and phase.until.patience >= looks * phase.epochs:
                _log.warning(
                    "phase %d/%d %r cannot end by its plateau: epochs=%d ends it before patience=%d is over.",
                    *(number, len(self.phases), phase.label, phase.epochs, phase.until.patience),
                )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(self.__dict__, _fit=None, _seen=None, _before_validation=None)


@dataclass
class _Fit:
    """What the schedule holds on to during one fit."""

    parameters: dict[str, nn.Parameter]
    trains: list[dict[str, nn.Parameter]]
    flags: list[tuple[nn.Parameter, bool]]
    homes: list[HomeGroups]
    kept: dict[int, str]
    kept_modules: set[nn.Module]
    checkpoints: CheckpointsByName

    @property
    def total(self) -> int:
        return sum(map(scalars, self.parameters.values()))


def _begin_fit(schedule: FreezeSchedule, trainer: Trainer, pl_module: LightningModule) -> _Fit:
    """Resolve every phase, so that each error comes now, then take over the optimizers."""
    reshard(trainer.strategy, pl_module)
    parameters = named_unique_parameters(pl_module)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    keepers = [callback for callback in callbacks if isinstance(callback, KeepsFrozen)]
    keeper_of = {module: type(keeper).__name__ for keeper in keepers for module in keeper.kept_frozen(pl_module)}
    kept = {id(p): keeper for module, keeper in keeper_of.items() for p in module.parameters()}
    kept_modules = {child for module in keeper_of for child in module.modules()}
    held = held_affine(pl_module)
    trains = [phase_trains(pl_module, phase, kept) for phase in schedule.phases]
    for phase, selected in zip(schedule.phases, trains, strict=True):
        without_held(phase, selected, held)
    scales = [phase_scales(pl_module, phase) for phase in schedule.phases]
    optimizers = [optimizer for optimizer in trainer.optimizers if not isinstance(optimizer, _MockOptimizer)]
    for optimizer in optimizers:
        check_optimizer(optimizer)
    if outside := strangers(optimizers, parameters.values()):
        raise MisconfigurationException(
            f"The optimizer holds {len(outside)} parameter(s) that are not the LightningModule's, of shape "
            f"{', '.join(str(tuple(p.shape)) for p in outside[:5])}: they have no name, so no phase can say whether "
            "they train, and no checkpoint would hold them. Make them part of the LightningModule."
        )
    wanted = {name for phase in trains for name in phase}
    adopt = homeless(optimizers, {name: p for name, p in parameters.items() if name in wanted}) if optimizers else {}
    if adopt and len(optimizers) > 1:
        raise MisconfigurationException(
            f"The schedule trains parameters that none of the {len(optimizers)} optimizers holds: {_names(adopt)}. "
            "Which one should is for you to say: give them to one in configure_optimizers."
        )
    if adopt and trainer.is_global_zero:
        _log.info(
            "the schedule trains %d parameters that the optimizer was not given; it takes them into a group like its "
            "first one: %s",
            *(len(adopt), _names(adopt)),
        )
    holders = [*(config.scheduler for config in trainer.lr_scheduler_configs), *pl_module.modules(), *callbacks]
    homes: list[HomeGroups] = []
    try:
        for optimizer in optimizers:
            policy = schedule.optimizer_state
            homes.append(HomeGroups(optimizer, holders, scales=scales, adopt=adopt, optimizer_state=policy))
        if any(home.adds_groups for home in homes):
            refuse_rates_by_group(trainer)
    except Exception:
        for home in homes:
            home.release()
        raise
    flags = [(p, p.requires_grad) for p in parameters.values() if id(p) not in held and id(p) not in kept]

    @contextmanager
    def whole() -> Iterator[None]:
        with ExitStack() as stack:
            for home in homes:
                stack.enter_context(home.whole())
            yield

    checkpoints = CheckpointsByName(trainer.strategy, whole, parameters)
    return _Fit(parameters, trains, flags, homes, kept, kept_modules, checkpoints)


def _refuse_differences(trainer: Trainer, why: str, **facts: Any) -> None:
    try:
        check_agreement(trainer.strategy, **facts)
    except RuntimeError as error:
        raise MisconfigurationException(f"{why} {error}") from None


def _steps_per_epoch(trainer: Trainer) -> float | None:
    """Give the optimizer steps of an epoch, None if that cannot be known."""
    batches = trainer.num_training_batches
    if trainer.lightning_module.automatic_optimization and 0 < batches < math.inf:
        return math.ceil(batches / trainer.accumulate_grad_batches)
    return trainer.global_step / trainer.current_epoch if trainer.current_epoch and trainer.global_step else None


def _names(parameters: Mapping[str, nn.Parameter], most: int = 5) -> str:
    shown = list(parameters)[:most]
    return ", ".join(shown) + (f" and {len(parameters) - most} more" if len(parameters) > most else "")


def _line(schedule: Sequence[Mapping[str, Any]]) -> str:
    return " → ".join(
        " ".join(
            [
                str(phase["train"]),
                *(f"{key}={phase[key]}" for key in ("epochs", "steps", "until", "lr_scale") if phase[key]),
            ]
        )
        for phase in schedule
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"FreezeSchedule({name}={value!r}): {name} is one of {', '.join(map(repr, allowed))}.{hint}")
    return value
