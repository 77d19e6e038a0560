"""Weights that are kept beside the module's own: a plateau's best, and those that a partial checkpoint leaves out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_freeze._lightning import SHARDED, LightningModule, MisconfigurationException, Strategy
from lightning_freeze.freezing.eval_mode import is_held
from lightning_freeze.freezing.ledger import Ledger
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.selectors import clean_name, named_unique_parameters


def refuse_sharded(strategy: Strategy, phases: Sequence[Phase]) -> None:
    """Refuse ``restore_best`` where a process has a part of each parameter only."""
    asks = next((phase for phase in phases if phase.plateau is not None and phase.plateau.restore_best), None)
    if asks is not None and isinstance(strategy, SHARDED):
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


def bring_back(kept: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Write tensors that were kept into those of the same names that are there."""
    with torch.no_grad():
        for name in kept.keys() & now.keys():
            now[name].copy_(kept[name])


def weights_to_keep(pl_module: LightningModule, strategy: Strategy, trained: Collection[str]) -> dict[str, Tensor]:
    """Return what phases so far have trained, for a module whose checkpoints need not hold everything.

    People keep only what requires grad while the file is written; an earlier phase's weights would be missing, and
    after the fit those that came frozen. They share their memory with the model's, so a file that has both does not
    grow.
    """
    if pl_module.strict_loading or isinstance(strategy, SHARDED):
        return {}
    return {name: p.detach() for name, p in named_unique_parameters(pl_module).items() if name in trained}


def restore(checkpoint: Mapping[str, Any], saved: Mapping[str, Any] | None, pl_module: LightningModule) -> None:
    """Put the weights that a checkpoint lacks, and the schedule has kept, into a module; refuse one of 0.1.0."""
    for state in checkpoint.get("optimizer_states", []):
        if any("adopted" in group for group in state.get("param_groups", [])):
            raise MisconfigurationException(
                "lightning-freeze 0.1.0 wrote this checkpoint, with a parameter group of its own for what the "
                "optimizer was not given. Later versions leave the groups alone and cannot resume it: end the "
                "fit with 0.1.0, or begin a new one from the weights, LightningModule.load_from_checkpoint(…)."
            )
    if saved is not None and "state_dict" in checkpoint:
        kept = saved.get("trained", {})
        lacking = {name: kept[name] for name in kept if name not in checkpoint["state_dict"]}
        bring_back(lacking, named_unique_parameters(pl_module))
