"""Weights and buffers of a plateau's best value: kept on the CPU, and brought back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_freeze._lightning import FSDPStrategy, MisconfigurationException, ModelParallelStrategy, Strategy
from lightning_freeze.freezing.eval_mode import is_held
from lightning_freeze.freezing.ledger import Ledger
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.selectors import clean_name


def refuse_sharded(strategy: Strategy, phases: Sequence[Phase]) -> None:
    """Refuse ``restore_best`` where a process has a part of each parameter only.

    Raises:
        MisconfigurationException: If a phase asks for it.
    """
    asks = next((phase for phase in phases if phase.plateau is not None and phase.plateau.restore_best), None)
    if asks is not None and isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"Phase {asks.label!r} ends by a Plateau(restore_best=True). Under {type(strategy).__name__} each "
            "process has a part of every parameter, which a callback's state cannot hold. Leave restore_best out, and "
            "take the best weights from a ModelCheckpoint."
        )


def movable(ledger: Ledger) -> dict[str, Tensor]:
    """Return what can move while a phase lasts, by name: what trains, and buffers of modules not held in eval mode."""
    trains: dict[str, Tensor] = {name: p for name, p in ledger.parameters.items() if id(p) in ledger.trains}
    return trains | {
        clean_name(f"{prefix}.{name}".lstrip(".")): buffer
        for prefix, module in ledger.module.named_modules()
        if not is_held(module)
        for name, buffer in module.named_buffers(recurse=False)
    }


def keep(ledger: Ledger) -> dict[str, Tensor]:
    """Return copies of what can move, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in movable(ledger).items()}


def bring_back(kept: Mapping[str, Tensor], ledger: Ledger) -> None:
    """Write what :func:`keep` returned into the module."""
    now = movable(ledger)
    with torch.no_grad():
        for name, tensor in kept.items():
            now[name].copy_(tensor)
