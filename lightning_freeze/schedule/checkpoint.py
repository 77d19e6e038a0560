"""Checkpoints that lack something: weights that a phase trained and a trainable-only file left out, version 0.1.0."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_freeze._lightning import (
    FSDPStrategy,
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    Strategy,
)
from lightning_freeze.schedule.fit import Fit
from lightning_freeze.selectors import named_unique_parameters


def trained_so_far(fit: Fit, history: Sequence[tuple[int, int, int]]) -> list[str]:
    """Return the names of all parameters that a phase so far has trained, in the module's order."""
    begun = {index for _, _, index in history}
    return [name for name in fit.ledger.parameters if any(name in fit.resolved.trains[index] for index in begun)]


def weights_to_keep(pl_module: LightningModule, strategy: Strategy, trained: Collection[str]) -> dict[str, Tensor]:
    """Return what phases so far have trained, for a module whose checkpoints need not hold everything.

    People keep only what requires grad while the file is written; an earlier phase's weights would be missing, and
    after the fit those that came frozen. They share their memory with the model's, so a file that has both does not
    grow.
    """
    if pl_module.strict_loading or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        return {}
    return {name: p.detach() for name, p in named_unique_parameters(pl_module).items() if name in trained}


def restore(checkpoint: Mapping[str, Any], saved: Mapping[str, Any] | None, pl_module: LightningModule) -> None:
    """Put the weights that a checkpoint lacks, and the schedule has kept, into a module.

    Raises:
        MisconfigurationException: If version 0.1.0 saved parameters in a group of its own.
    """
    for state in checkpoint.get("optimizer_states", []):
        if any("adopted" in group for group in state.get("param_groups", [])):
            raise MisconfigurationException(
                "lightning-freeze 0.1.0 wrote this checkpoint, with a parameter group of its own for what the "
                "optimizer was not given. Later versions leave the groups alone and cannot resume it: end the "
                "fit with 0.1.0, or begin a new one from the weights, LightningModule.load_from_checkpoint(…)."
            )
    if saved is None or "state_dict" not in checkpoint:
        return
    parameters, kept = named_unique_parameters(pl_module), saved.get("trained", {})
    lacking = [name for name in kept if name in parameters and name not in checkpoint["state_dict"]]
    with torch.no_grad():
        for name in lacking:
            parameters[name].copy_(kept[name])
