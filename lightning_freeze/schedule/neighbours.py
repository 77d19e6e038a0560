"""What a schedule has to do with other callbacks, and with the module's own hooks."""

from __future__ import annotations

from typing import Literal

import torch

from lightning_freeze._lightning import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
)
from lightning_freeze.schedule.phases import Phase


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


def call_hooks(trainer: Trainer, hook: Literal["on_phase_start", "on_phase_end"], phase: Phase) -> None:
    """Call a hook of every callback that has it, and then of the module."""
    pl_module: LightningModule = trainer.lightning_module
    for owner in (*callbacks_of(trainer), pl_module):
        if callable(function := getattr(owner, hook, None)):
            function(trainer, pl_module, phase)


def stoppers(trainer: Trainer, monitor: str | None = None) -> list[EarlyStopping]:
    """Return the Trainer's EarlyStopping callbacks, those of one metric or all."""
    found = [callback for callback in callbacks_of(trainer) if isinstance(callback, EarlyStopping)]
    return [stopper for stopper in found if monitor in (None, stopper.monitor)]


def count_anew(trainer: Trainer, monitor: str | None = None) -> None:
    """Have EarlyStopping forget what earlier phases reached: a phase begins worse than the one before it ended."""
    for stopper in stoppers(trainer, monitor):
        stopper.wait_count = 0
        stopper.best_score = torch.tensor(torch.inf if stopper.mode == "min" else -torch.inf)
