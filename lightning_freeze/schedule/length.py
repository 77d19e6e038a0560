"""How long a fit and its phases are, in optimizer steps, and that the fit is as long on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_freeze._lightning import GradientAccumulationScheduler, MisconfigurationException, Trainer, callbacks_of
from lightning_freeze.ranks import refuse_differences
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.progress import counted_ends
from lightning_freeze.schedule.rates import Length, Ramp


def planned_length(
    phase: Phase, begin: Sequence[int], *, epoch: float | None = None, total: int | None = None
) -> Length:
    """Return how long a phase without a fraction lasts at most, if it begins at ``begin = (epoch, optimizer step)``.

    ``epoch`` and ``total`` are the optimizer steps of an epoch and of the fit, None if unknown.
    """
    if epoch and epoch == int(epoch):  # earlier epochs may have had another length
        begin = int(begin[1] // epoch), begin[1]
    steps = [end - begin[1] for end, *_ in counted_ends(phase, begin, epoch) if end > begin[1]]
    if total is not None and (steps or phase.epochs is None):
        steps.append(total - begin[1])
    return Length(max(1, min(steps)) if steps else None, epoch)


def phase_length(trainer: Trainer, phase: Phase, begin: Sequence[int]) -> Length:
    """Return how long a phase lasts at most in a Trainer's fit, the same before and after a resume."""
    return planned_length(phase, begin, epoch=steps_of_each_epoch(trainer), total=steps_in_all(trainer))


def steps_of_each_epoch(trainer: Trainer) -> int | None:
    """Return the optimizer steps of every epoch, None where they differ or only training will tell."""
    batches = trainer.num_training_batches
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer))
    if changes or not trainer.lightning_module.automatic_optimization or not 0 < batches < math.inf:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def steps_per_epoch(trainer: Trainer) -> float | None:
    """Return the optimizer steps of an epoch, where they are unknown the mean so far; None if there is none."""
    if (steps := steps_of_each_epoch(trainer)) is not None:
        return steps
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


def steps_at_most(trainer: Trainer) -> float:
    """Return the steps that the fit takes or, where the user steps, one for each batch and optimizer; else infinity."""
    if (steps := steps_in_all(trainer)) is not None:
        return steps
    batches = trainer.estimated_stepping_batches
    return batches * len(trainer.optimizers) if batches >= 0 else math.inf


def refuse_unknown(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Raise a MisconfigurationException for what lasts a share of a fit, or of a phase, of unknown length."""
    for phase in phases:
        if phase.fraction is not None:  # else it has become a number of steps
            raise MisconfigurationException(
                f"Phase {phase.label!r} lasts fraction={phase.fraction:g} of the fit, and how many optimizer steps "
                "that takes is unknown: without max_epochs, with data that has no length, and where you step "
                "optimizers yourself. Give the Trainer max_steps, or the phase epochs=… or steps=…."
            )
        length = phase_length(trainer, phase, (trainer.current_epoch, trainer.global_step))
        ramps = [scale for scale in phase.scales.values() if isinstance(scale, Ramp) and length.of(scale) is None]
        unknown = [f"lr_scale={ramp!r}" for ramp in ramps]
        if length.phase is None and phase.lr_scheduler not in (None, "restart"):
            unknown.append(f"lr_scheduler={phase.lr_scheduler!r}")
        if unknown:
            raise MisconfigurationException(
                f"Phase {phase.label!r} has {unknown[0]}, and how many optimizer steps that lasts cannot be known (the "
                "loader has no length, you step optimizers yourself, or accumulation changes): say steps=, here or of "
                "the phase."
            )


def refuse_uneven_ranks(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Refuse ranks of which some would run out of batches before others: no phase would end for all at once."""
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
