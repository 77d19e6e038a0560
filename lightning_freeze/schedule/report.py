"""What a schedule says in logs and errors while a fit runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_freeze._lightning import Callback, MisconfigurationException, Trainer, callbacks_of
from lightning_freeze.freezing.batchnorm import has_running_statistics
from lightning_freeze.freezing.eval_mode import is_held
from lightning_freeze.functional import scalars
from lightning_freeze.logs import get_logger
from lightning_freeze.schedule.fit import Fit
from lightning_freeze.schedule.meaning import what_came_frozen
from lightning_freeze.schedule.monitor import missing_metric
from lightning_freeze.schedule.neighbours import stoppers
from lightning_freeze.schedule.phases import Phase, describe
from lightning_freeze.schedule.plateau import Plateau
from lightning_freeze.schedule.preset import Preset
from lightning_freeze.schedule.progress import Progress, walk
from lightning_freeze.words import listed, percent

_log = get_logger(__name__)


def fit_begins(
    trainer: Trainer, schedule: Callback, progress: Progress, fit: Fit, steps_per_epoch: float | None
) -> None:
    """Warn, before the first batch, of what the user may not expect."""
    phases, pl_module = progress.phases, trainer.lightning_module
    if isinstance(fit.phases, Preset) and fit.phases.said:
        _log.info("%s", fit.phases.said)
    if said := what_came_frozen(pl_module, phases, fit.resolved.came_frozen, fit.resolved.held):
        _log.warning("%s", said)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        for number, why in _ends_too_early(trainer, schedule, phases, steps_per_epoch):
            _log.warning("%s %s", _numbered(phases, number - 1), why)


def phase_begins(phases: Sequence[Phase], progress: Progress, fit: Fit) -> None:
    """Log the line of a phase that begins."""
    begin = progress.history[-1]
    total, trainable = sum(map(scalars, fit.ledger.parameters.values())), fit.trainable()
    line = (
        f"{_numbered(phases, progress.index)} from epoch {begin[0]}, step {begin[1]}"
        f"{f', after {begin.why}' if begin.why else ''}: "
        f"trains {trainable:,} of {total:,} parameters ({percent(trainable, total)})"
    )
    if layers := [layer for layer in fit.ledger.module.modules() if has_running_statistics(layer)]:
        line += f", {sum(map(is_held, layers))} of {len(layers)} BatchNorm frozen"
    _log.info("%s", line)


def last_phase_is_over(trainer: Trainer, phases: Sequence[Phase], why: str, *, goes_on: bool) -> None:
    """Log that the last phase is over, and that the fit ends or why it goes on."""
    late = trainer.min_steps is not None and trainer.global_step < trainer.min_steps
    least = f"min_steps={trainer.min_steps}" if late else f"min_epochs={trainer.min_epochs}"
    _log.info(
        "%s is over at epoch %d, step %d, after %s: the fit %s",
        *(_numbered(phases, len(phases) - 1), trainer.current_epoch, trainer.global_step, why),
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
        *(trainer.current_epoch, trainer.global_step, _numbered(phases, progress.index), never),
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


def metric_is_missing(trainer: Trainer, phases: Sequence[Phase], index: int, *, is_current: bool) -> None:
    """Raise for the current phase, warn for a later one, that a plateau's metric is not logged."""
    phase = phases[index]
    assert phase.plateau is not None
    missing = missing_metric(phase.plateau, trainer.callback_metrics)
    if is_current:
        raise MisconfigurationException(f"Phase {phase.label!r} {missing}")
    _log.warning(
        "%s %s If it is not logged in that phase either, the fit ends there with an error.",
        *(_numbered(phases, index), missing),
    )


def metric_is_not_finite(trainer: Trainer, progress: Progress, value: float) -> None:
    """Warn that a plateau's metric has a value that is no improvement on any other."""
    until = progress.phase.plateau
    _log.warning(
        "%s waits for a plateau of %r, which is %s at epoch %d, step %d: no improvement on any value.",
        *(_numbered(progress.phases, progress.index), until.monitor if until else "", value),
        *(trainer.current_epoch, trainer.global_step),
    )


def optimizers_exchanged() -> None:
    """Log that optimizers have been exchanged."""
    _log.info("the Trainer's optimizers have been exchanged; the schedule goes on with the new ones")


def steps_uncounted() -> None:
    """Warn of steps that ``trainer.global_step`` misses."""
    _log.warning(
        "the optimizer is stepped past Lightning, as SAM's first_step() and second_step() do: trainer.global_step does "
        "not count these steps. The schedule counts them itself; limits such as max_steps do not."
    )


def _ends_too_early(
    trainer: Trainer, schedule: Callback, phases: Sequence[Phase], steps_per_epoch: float | None
) -> Iterator[tuple[int, str]]:
    """Yield the numbers of phases that never begin, or cannot end as they say, and why."""
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    steps = trainer.max_steps if trainer.max_steps > 0 else None
    last = walk(
        phases,
        sys.maxsize if epochs is None else epochs - 1,
        sys.maxsize if steps is None else steps - 1,
        steps_per_epoch,
        passed=len(phases),
    )[-1][2]
    limits = [f"max_{unit}={most}" for unit, most in (("epochs", epochs), ("steps", steps)) if most is not None]
    for number in range(last + 2, len(phases) + 1):
        yield number, f"never begins: the fit ends before, at {' or '.join(limits)}."
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
                yield number, _stopped_before(until, stopper.patience)


def _stopped_before(until: Plateau, patience: int) -> str:
    return (
        f"waits for a plateau of {until.monitor!r} with patience={until.patience}, at which "
        f"EarlyStopping(patience={patience}) ends the fit: later phases never begin. Give EarlyStopping more patience, "
        "list it after FreezeSchedule, which then has it count anew in each phase, or leave it out and end the last "
        "phase by a Plateau."
    )


def _numbered(phases: Sequence[Phase], index: int) -> str:
    return f"phase {index + 1}/{len(phases)} {phases[index].label!r}"


def _line(schedule: Sequence[Mapping[str, Any]]) -> str:
    return listed(
        (
            " ".join(
                [
                    str(phase["train"]),
                    *(f"{key}={phase[key]}" for key in ("epochs", "steps", "until", "lr_scale") if phase[key]),
                ]
            )
            for phase in schedule
        ),
        " -> ",
        most=20,
    )
