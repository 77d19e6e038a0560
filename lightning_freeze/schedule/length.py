"""How many optimizer steps a fit, an epoch and a phase take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_freeze._lightning import (
    GradientAccumulationScheduler,
    MisconfigurationException,
    Trainer,
    callbacks_of,
)
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.rates import Length, Ramp


def planned_length(
    phase: Phase,
    begin: tuple[int, int],
    *,
    epoch: int | None = None,
    max_epochs: int | None = None,
    max_steps: int | None = None,
) -> Length:
    """Return how long a phase lasts at most, if it begins at ``begin = (epoch, optimizer step)``.

    Args:
        phase: The phase.
        begin: Where it begins; an epoch in the middle of which that is counts as its first.
        epoch: Optimizer steps of an epoch, None if unknown.
        max_epochs: How many epochs the fit takes, None without a limit.
        max_steps: How many optimizer steps the fit takes, None without a limit.

    Example:
        >>> planned_length(Phase("*", epochs=2), (3, 32), epoch=10, max_epochs=9)
        Length(phase=18, epoch=10)
    """
    fit = [max_steps] if max_steps is not None else []
    ends = []
    if epoch is not None:
        fit += [max_epochs * epoch] if max_epochs is not None else []
        ends += [(begin[0] + phase.epochs) * epoch - begin[1]] if phase.epochs is not None else []
    ends += [phase.steps] if phase.steps is not None else []
    if fit:
        ends += [min(fit) - begin[1]]
        ends += [round(phase.fraction * min(fit))] if phase.fraction is not None else []
    return Length(max(1, min(ends)) if ends else None, epoch)


def phase_length(trainer: Trainer, phase: Phase, begin: tuple[int, int]) -> Length:
    """Return how long a phase lasts at most in a Trainer's fit, the same before and after a resume."""
    max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
    return planned_length(
        phase,
        begin,
        epoch=epoch_steps(trainer),
        max_epochs=max_epochs if max_epochs is not None and max_epochs >= 0 else None,
        max_steps=max_steps if max_steps >= 0 else None,
    )


def refuse_unknown_lengths(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Raise where a phase has something to spread over steps of which nobody knows how many they are."""
    for phase in phases:
        length = phase_length(trainer, phase, (trainer.current_epoch, trainer.global_step))
        unknown = [
            f"lr_scale={scale!r}"
            for scale in phase.scales.values()
            if isinstance(scale, Ramp) and length.of(scale) is None
        ]
        if length.phase is None and phase.lr_scheduler not in (None, "restart"):
            unknown.append(f"lr_scheduler={phase.lr_scheduler!r}")
        for what in unknown:
            raise MisconfigurationException(
                f"Phase {phase.label!r} has {what}, and how many optimizer steps that lasts cannot be known (the "
                "loader has no length, optimization is manual, or accumulation changes): say steps=, here or of the "
                "phase."
            )


def epoch_steps(trainer: Trainer) -> int | None:
    """Return how many optimizer steps Lightning takes in an epoch, None where only training will tell."""
    batches = trainer.num_training_batches
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer))
    if changes or not trainer.lightning_module.automatic_optimization or not 0 < batches < math.inf:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def steps_per_epoch(trainer: Trainer) -> float | None:
    """Return the optimizer steps of an epoch, where they are unknown the mean so far; None if there is none."""
    if (planned := epoch_steps(trainer)) is not None:
        return planned
    return trainer.global_step / trainer.current_epoch if trainer.current_epoch and trainer.global_step else None
