"""How long a fit is, in optimizer steps, and that it is as long on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_freeze._lightning import (
    GradientAccumulationScheduler,
    MisconfigurationException,
    Trainer,
    callbacks_of,
)
from lightning_freeze.ranks import refuse_differences
from lightning_freeze.schedule.phases import Phase


def steps_per_epoch(trainer: Trainer) -> float | None:
    """Return the optimizer steps of an epoch, None if that cannot be known."""
    batches = trainer.num_training_batches
    if trainer.lightning_module.automatic_optimization and 0 < batches < math.inf:
        return math.ceil(batches / trainer.accumulate_grad_batches)
    return trainer.global_step / trainer.current_epoch if trainer.current_epoch and trainer.global_step else None


def steps_in_all(trainer: Trainer) -> int | None:
    """Return the optimizer steps that the fit takes, as ``trainer.global_step`` counts them; None if unknown."""
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
    if trainer.lightning_module.automatic_optimization and 0 < batches < math.inf and epochs > 0:
        windows = [trainer.accumulate_grad_batches] * epochs
        for callback in callbacks_of(trainer):
            if isinstance(callback, GradientAccumulationScheduler):
                windows = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
        limits.append(sum(math.ceil(batches / window) for window in windows))
    return min(limits, default=None)


def window_is_closed(trainer: Trainer, *, stepped: bool) -> bool:
    """Return whether the batch that has run ended an accumulation window; where the user steps, ``stepped`` tells."""
    if not trainer.lightning_module.automatic_optimization:
        return stepped
    return (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def may_stop(trainer: Trainer) -> bool:
    """Return whether ``trainer.should_stop`` ends the fit, or the Trainer goes on to its min_epochs or min_steps."""
    epochs: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)


def refuse_unknown(phases: Sequence[Phase], total: int | None) -> None:
    """Refuse a share of a fit of which nobody knows how many steps it takes.

    Raises:
        MisconfigurationException: If a phase lasts such a share.
    """
    if total is None and (share := next((phase for phase in phases if phase.fraction is not None), None)):
        raise MisconfigurationException(
            f"Phase {share.label!r} lasts fraction={share.fraction:g} of the fit, and how many optimizer steps that "
            "takes is unknown: without max_epochs, with data that has no length, and where you step optimizers "
            "yourself. Give the Trainer max_steps, or the phase epochs=… or steps=…."
        )


def refuse_uneven_ranks(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Refuse ranks of which some would run out of batches before others: no phase would end for all at once.

    Raises:
        MisconfigurationException: If there are such ranks.
    """
    if not any(phase.has_end for phase in phases):
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
    if any(phase.plateau is not None for phase in phases):
        refuse_differences(
            trainer.strategy,
            "A rank has no validation batches, and those that have some would wait for it forever to agree on the "
            "Plateau's metric. Give every rank some.",
            validates=sum(trainer.num_val_batches) > 0,
        )
