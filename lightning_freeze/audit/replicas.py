"""The check that DDP's processes hold the same values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_freeze._lightning import DDPStrategy, averages_models
from lightning_freeze.audit.checks import Check, Moment
from lightning_freeze.audit.findings import Finding
from lightning_freeze.audit.frozen_values import FrozenValues
from lightning_freeze.tensors import digest, has_values


class Replicas(Check):
    """Finds parameters, and buffers of frozen modules, whose values differ between processes.

    Buffers of a layer that trains differ rightly. ``late`` are the parameters that were frozen when DDP was set up.
    """

    moments = ("first steps end", "epoch end")

    def __init__(self, frozen: FrozenValues, late: Collection[str]) -> None:
        self._frozen, self._late = frozen, late

    def observe(self, now: Moment) -> dict[str, bytes]:
        """Return the digest of all that should be alike."""
        strategy = now.trainer.strategy
        if now.trainer.world_size == 1 or not isinstance(strategy, DDPStrategy):
            return {}
        model = strategy.model
        apart = set(model.parameters_to_ignore) if isinstance(model, DistributedDataParallel) else set()
        apart |= now.requires_grad if averages_models(strategy) else set()  # alike only when just averaged
        tensors: dict[str, Tensor] = now.parameters | {n: t for n, (_, t) in self._frozen.tensors(now).items()}
        return {n: digest(t) for n, t in tensors.items() if n not in apart | set(now.ignored) and has_values(t)}

    def decide(self, now: Moment, facts: Sequence[Mapping[str, bytes]]) -> list[Finding]:
        """Return a finding for each name under which not all have the same digest."""
        late = set() if now.schedules else now.requires_grad.intersection(self._late)
        names = dict.fromkeys(name for one in facts for name in one)
        differ = [name for name in names if len({one.get(name) for one in facts}) > 1]
        whys = [(name, _LATE if name in late else _ALONE) for name in differ]
        return [Finding("replicas_differ", name, cause, fix, now.step) for name, (cause, fix) in whys]


_LATE = (
    "It was frozen when DDP was set up and unfrozen later, and DDP never reduces the gradient of such a parameter, so "
    "each process trains its own.",
    "Unfreeze it with FreezeSchedule, which sets DDP up again.",
)
_ALONE = (
    "One process wrote to it alone: code that depends on the rank or on unequal random numbers, or a step under "
    "no_sync.",
    "Do the same on every process, or broadcast the result.",
)
