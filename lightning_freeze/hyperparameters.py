"""Modules among hyperparameters: a checkpoint written during the fit holds them as they are after it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_freeze.batchnorm import release_eval


def give_back_modules(
    checkpoint: dict[str, Any],
    pl_module: LightningModule,
    holder: str,
    flags: Iterable[tuple[nn.Parameter, bool]] = (),
) -> None:
    """Put copies in the place of the modules among a checkpoint's hyperparameters, given back as after the fit.

    ``save_hyperparameters()`` keeps a module that the LightningModule was built with, not a copy of it, so what a
    callback does to it for the time of the fit would be saved. The copies share the memory of all tensors.

    Args:
        checkpoint: What is about to be saved.
        pl_module: The LightningModule that it is of.
        holder: Whose holds on modes and affine parameters are released.
        flags: Which of the LightningModule's parameters require grad after the fit, as far as ``holder`` says.
    """
    after = {id(parameter): flag for parameter, flag in flags}
    saved = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    for key, module in saved.items():
        if not isinstance(module, nn.Module):
            continue
        memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
        memo |= {id(parameter): copy.copy(parameter) for parameter in module.parameters()}
        twin = copy.deepcopy(module, memo)
        # What is saved may be the copy that another callback has made already.
        for live, parameter in zip(pl_module.hparams[key].parameters(), twin.parameters(), strict=True):
            parameter.requires_grad = after.get(id(live), parameter.requires_grad)
        release_eval(twin, holder, root=pl_module)
        saved[key] = twin
