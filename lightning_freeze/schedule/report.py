"""What a schedule says in logs and errors while a fit runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_freeze._lightning import (
    EarlyStopping,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
)
from lightning_freeze.freezing.eval_mode import is_held
from lightning_freeze.functional import scalars
from lightning_freeze.logs import get_logger
from lightning_freeze.schedule.fit import Fit
from lightning_freeze.schedule.meaning import what_came_frozen
from lightning_freeze.schedule.monitor import missing_metric
from lightning_freeze.schedule.phases import Phase, describe
from lightning_freeze.schedule.progress import Progress, walk
from lightning_freeze.words import listed, percent

_log = get_logger(__name__)


def fit_begins(
    trainer: Trainer, pl_module: LightningModule, phases: Sequence[Phase], fit: Fit, steps_per_epoch: float | None
) -> None:
    """Warn, before the first batch, of what the user may not expect."""
    if not trainer.is_global_zero:
        return
    if said := what_came_frozen(pl_module, phases, fit.resolved.came_frozen, fit.resolved.held):
        _log.warning("%s", said)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        for number, why in _ends_too_early(trainer, phases, steps_per_epoch):
            _log.warning("phase %d/%d %r %s", number, len(phases), phases[number - 1].label, why)


def phase_begins(pl_module: LightningModule, phases: Sequence[Phase], progress: Progress, fit: Fit) -> None:
    """Log the line of a phase that begins."""
    epoch, step, index = progress.history[-1]
    total, trainable = sum(map(scalars, fit.ledger.parameters.values())), fit.trainable()
    line = (
        f"phase {index + 1}/{len(phases)} {phases[index].label!r} from epoch {epoch}, step {step}: "
        f"trains {trainable:,} of {total:,} parameters ({percent(trainable, total)})"
    )
    if layers := fit.ledger.batchnorm:
        line += f", {sum(map(is_held, layers))} of {len(layers)} BatchNorm frozen"
    _log.info("%s", line)


def fit_ends(trainer: Trainer, phases: Sequence[Phase], progress: Progress) -> None:
    """Warn if the fit ends before its last phase."""
    never = phases[progress.index + 1 :]
    if never and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _log.warning(
            "the fit ended at epoch %d, step %d in phase %d/%d %r; never began: %s.",
            *(
                trainer.current_epoch,
                trainer.global_step,
                progress.index + 1,
                len(phases),
                phases[progress.index].label,
            ),
            listed(repr(phase.label) for phase in never),
        )


def another_schedule(trainer: Trainer, phases: Sequence[Phase], saved: Mapping[str, Any], index: int) -> None:
    """Warn if a checkpoint was written under another schedule."""
    then, now = saved["schedule"], describe(phases)
    if then == now or not trainer.is_global_zero:
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
    assert phase.until is not None
    missing = missing_metric(phase.until, trainer.callback_metrics)
    if is_current:
        raise MisconfigurationException(f"Phase {phase.label!r} {missing}")
    if trainer.is_global_zero:
        _log.warning(
            "phase %d/%d %r %s If it is not logged in that phase either, the fit ends there with an error.",
            *(index + 1, len(phases), phase.label, missing),
        )


def optimizers_exchanged(trainer: Trainer) -> None:
    """Log that optimizers have been exchanged."""
    if trainer.is_global_zero:
        _log.info("the Trainer's optimizers have been exchanged; the schedule goes on with the new ones")


def steps_uncounted(trainer: Trainer, *, first: bool) -> None:
    """Warn once of steps that ``trainer.global_step`` misses."""
    if first and trainer.is_global_zero:
        _log.warning(
            "the optimizer is stepped past Lightning, as SAM's first_step() and second_step() do: trainer.global_step "
            "does not count these steps. The schedule counts them itself; limits such as max_steps do not."
        )


def _ends_too_early(
    trainer: Trainer, phases: Sequence[Phase], steps_per_epoch: float | None
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
    stoppers = [callback for callback in callbacks_of(trainer) if isinstance(callback, EarlyStopping)]
    for number, phase in enumerate(phases[:-1], 1):
        until = phase.until
        if until is None:
            continue
        if phase.epochs is not None and until.patience >= looks * phase.epochs:
            yield (
                number,
                (f"cannot end by its plateau: epochs={phase.epochs} ends it before patience={until.patience} is over."),
            )
        for stopper in stoppers:
            if stopper.monitor == until.monitor and stopper.patience <= until.patience:
                yield (
                    number,
                    (
                        f"waits for a plateau of {until.monitor!r} with patience={until.patience}, at which "
                        f"EarlyStopping(patience={stopper.patience}) ends the fit: later phases never begin. Leave "
                        "EarlyStopping out and end the last phase, or give it more patience."
                    ),
                )


def _line(schedule: Sequence[Mapping[str, Any]]) -> str:
    return " -> ".join(
        " ".join(
            [
                str(phase["train"]),
                *(f"{key}={phase[key]}" for key in ("epochs", "steps", "until", "lr_scale") if phase[key]),
            ]
        )
        for phase in schedule
    )
