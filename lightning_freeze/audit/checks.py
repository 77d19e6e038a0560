"""What a check is: what it can see of a fit, and the four verbs by which the callback runs it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.optim import Optimizer

from lightning_freeze._lightning import LightningModule, Trainer, callbacks_of
from lightning_freeze.audit.findings import Finding, merged
from lightning_freeze.selectors import named_unique_parameters
from lightning_freeze.tensors import has_values

#: A skipped epoch is one that is not audited; the first steps are the first audited ones of a phase.
At: TypeAlias = (
    Literal["phase start", "epoch start", "epoch skipped", "step", "step end", "first steps end", "epoch end"]
    | Literal["train end", "exception"]
)


@dataclass(frozen=True)
class Moment:
    """A point of a fit: ``batch`` is the one that begins there, ``error`` what has ended the fit."""

    trainer: Trainer
    module: LightningModule
    ignored: Collection[str]
    at: At = "phase start"
    batch: Any = None
    error: BaseException | None = None

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of the module by name, tied ones once."""
        return named_unique_parameters(self.module)

    @property
    def requires_grad(self) -> set[str]:
        """The names of all that requires grad now."""
        return {name for name, parameter in self.parameters.items() if parameter.requires_grad}

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What requires grad now, has values and is not ignored."""
        names = self.requires_grad.difference(self.ignored)
        return {name: p for name, p in self.parameters.items() if name in names and has_values(p)}

    @property
    def schedules(self) -> list[Any]:
        """The callbacks that freeze in phases: FreezeSchedule, by its attributes ``frozen_mode`` and ``history``."""
        return [callback for callback in callbacks_of(self.trainer) if hasattr(callback, "frozen_mode")]

    @property
    def step(self) -> int:
        """How many batches the fit has trained, also before it was resumed."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)


class Check:
    """One thing that can be wrong: at its moments it observes facts in each process, and decides from those of all."""

    moments: tuple[At, ...]

    def begin(self, now: Moment, undo: ExitStack) -> None:
        """Prepare for an audited batch; ``undo`` ends with it."""

    def note(self, now: Moment, optimizer: Optimizer | None) -> None:
        """Note what shows during an audited batch: before a backward, or after an optimizer has stepped."""

    def observe(self, now: Moment) -> Any:
        """Return what this process knows, as data that pickles: findings, unless the check decides otherwise."""

    def decide(self, now: Moment, facts: Sequence[Any]) -> list[Finding]:
        """Return findings from what each process has observed."""
        return merged(facts)
