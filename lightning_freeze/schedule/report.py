"""What a schedule says in logs and errors while a fit runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_freeze._lightning import (
    BaseFinetuning,
    Callback,
    MisconfigurationException,
    StochasticWeightAveraging,
    Trainer,
    callbacks_of,
)
from lightning_freeze.freezing.eval_mode import is_held
from lightning_freeze.functional import scalars
from lightning_freeze.logs import get_logger
from lightning_freeze.schedule.arguments import shown_value
from lightning_freeze.schedule.fit import Fit
from lightning_freeze.schedule.length import steps_per_epoch
from lightning_freeze.schedule.looks import stoppers
from lightning_freeze.schedule.meaning import what_came_frozen
from lightning_freeze.schedule.phases import Phase, describe
from lightning_freeze.schedule.preset import Preset
from lightning_freeze.schedule.progress import Progress, numbered, walk
from lightning_freeze.words import listed, percent

_log = get_logger(__name__)


def refuse_rivals(trainer: Trainer, kind: type[Callback]) -> None:
    """Refuse two schedules, ``kind`` is their class, and Lightning's own callbacks that freeze."""
    if sum(isinstance(callback, kind) for callback in callbacks_of(trainer)) > 1:
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


def refuse_averages(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Refuse a scheduler of a phase's own where StochasticWeightAveraging puts another in its place."""
    own = [phase for phase in phases if phase.lr_scheduler is not None]
    if own and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks_of(trainer)):
        raise MisconfigurationException(
            f"Phase {own[0].label!r} has lr_scheduler={shown_value(own[0].lr_scheduler)}, and "
            "StochasticWeightAveraging puts a scheduler of its own in its place. Leave one out."
        )


def fit_begins(trainer: Trainer, schedule: Callback, progress: Progress, fit: Fit) -> None:
    """Warn, before the first batch, of what the user may not expect."""
    phases, pl_module, ledger = progress.phases, trainer.lightning_module, fit.ledger
    if isinstance(fit.phases, Preset) and fit.phases.said:
        _log.info("%s", fit.phases.said)
    if said := what_came_frozen(pl_module, phases, ledger.came_frozen, ledger.held(without=schedule.state_key)):
        _log.warning("%s", said)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        for number, why in _ends_too_early(trainer, schedule, phases):
            _log.warning("%s %s", numbered(phases, number - 1), why)


def phase_begins(phases: Sequence[Phase], progress: Progress, fit: Fit) -> None:
    """Log the line of a phase that begins."""
    begin = progress.history[-1]
    total, trainable = sum(map(scalars, fit.ledger.parameters.values())), fit.trainable()
    line = (
        f"{numbered(phases, progress.index)} from epoch {begin[0]}, step {begin[1]}"
        f"{f', after {begin.why}' if begin.why else ''}: "
        f"trains {trainable:,} of {total:,} parameters ({percent(trainable, total)})"
    )
    if layers := fit.ledger.batchnorm:
        line += f", {sum(map(is_held, layers))} of {len(layers)} BatchNorm frozen"
    _log.info("%s", line)


def last_phase_is_over(trainer: Trainer, phases: Sequence[Phase], why: str, *, goes_on: bool) -> None:
    """Log that the last phase is over, and that the fit ends or why it goes on."""
    late = trainer.min_steps is not None and trainer.global_step < trainer.min_steps
    least = f"min_steps={trainer.min_steps}" if late else f"min_epochs={trainer.min_epochs}"
    _log.info(
        "%s is over at epoch %d, step %d, after %s: the fit %s",
        *(numbered(phases, len(phases) - 1), trainer.current_epoch, trainer.global_step, why),
        f"goes on to {least}" if goes_on else "ends",
    )


def fit_ends(trainer: Trainer, phases: Sequence[Phase], progress: Progress) -> None:
    """Say so if the fit ends before its last phase."""
    never = listed(repr(phase.label) for phase in phases[progress.index + 1 :])
    if not never:
        return
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        _log.info("fast_dev_run has not tried: %s. fast_dev_run=%d tries every phase.", never, len(phases))
        return
    _log.warning(
        "the fit ended at epoch %d, step %d in %s; never began: %s.",
        *(trainer.current_epoch, trainer.global_step, numbered(phases, progress.index), never),
    )


def another_schedule(trainer: Trainer, phases: Sequence[Phase], saved: Mapping[str, Any], index: int) -> None:
    """Warn if a checkpoint was written under another schedule."""
    then, now = saved["schedule"], describe(phases)
    if then == now:
        return
    was = saved["history"][-1][2]
    _log.warning(
        "The checkpoint was written under another schedule. It was in phase %d/%d %r; this schedule is, at epoch %d, "
        "step %d, in phase %d/%d %r.\nThe schedule was: %s\nThe schedule is:  %s",
        *(was + 1, len(then), then[was]["name"] or then[was]["train"], trainer.current_epoch, trainer.global_step),
        *(index + 1, len(phases), phases[index].label, _line(then), _line(now)),
    )


def _ends_too_early(trainer: Trainer, schedule: Callback, phases: Sequence[Phase]) -> Iterator[tuple[int, str]]:
    """Yield the numbers of phases that never begin, or cannot end as they say, and why."""
    limits = {"epochs": trainer.max_epochs, "steps": trainer.max_steps}
    limits = {unit: most for unit, most in limits.items() if most is not None and most > 0}
    epoch, step = ((limits.get(unit) or math.inf) - 1 for unit in ("epochs", "steps"))
    # What nobody can foresee counts as reached at once.
    last = walk(phases, epoch, step, steps_per_epoch(trainer), lambda begin: (begin[1], begin[0], ""))[-1][2]
    end = " or ".join(f"max_{unit}={most}" for unit, most in limits.items())
    for number in range(last + 2, len(phases) + 1):
        yield number, f"never begins: the fit ends before, at {end}."
    looks = max(1.0, trainer.num_training_batches / (trainer.val_check_batch or 1))
    callbacks = callbacks_of(trainer)
    for number, phase in enumerate(phases, 1):
        until = phase.plateau
        if until is None:
            continue
        if phase.epochs is not None and until.threshold is None and until.patience >= looks * phase.epochs:
            ends = f"epochs={phase.epochs} ends it before patience={until.patience} is over"
            yield number, f"cannot end by its plateau: {ends}."
        elif phase.epochs is not None and until.min_epochs >= phase.epochs:
            ends = f"epochs={phase.epochs} ends it before min_epochs={until.min_epochs}"
            yield number, f"cannot end by its plateau: {ends}."
        for stopper in stoppers(trainer, until.monitor) if number < len(phases) else []:
            # At the same look the schedule makes way for the next phase, if it comes first.
            first = callbacks.index(schedule) < callbacks.index(stopper)
            if stopper.patience < until.patience + (not first):
                yield (
                    number,
                    f"waits for a plateau of {until.monitor!r} with patience={until.patience}, at which "
                    f"EarlyStopping(patience={stopper.patience}) ends the fit: later phases never begin. Give "
                    "EarlyStopping more patience, list it after FreezeSchedule, which then has it count anew in each "
                    "phase, or leave it out and end the last phase by a Plateau.",
                )


def _line(schedule: Sequence[Mapping[str, Any]]) -> str:
    given = [[f"{key}={value}" for key, value in one.items() if value and key != "train"] for one in schedule]
    return listed((" ".join([one["train"], *more]) for one, more in zip(schedule, given, strict=True)), " -> ", most=20)
