"""Modules among hyperparameters: a checkpoint written during the fit holds them as they are after it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_freeze._lightning import LightningModule
from lightning_freeze.freezing.batchnorm import give_back_copy


def give_back_modules(
    checkpoint: dict[str, Any],
    pl_module: LightningModule,
    flags: Iterable[tuple[nn.Parameter, bool]] = (),
) -> None:
    """Put copies in the place of the modules among a checkpoint's hyperparameters, given back as after the fit.

    ``save_hyperparameters()`` keeps a module that the LightningModule was built with, not a copy of it, so what a
    callback does to it for the time of the fit would be saved. The copies share the memory of all tensors.

    Args:
        checkpoint: What is about to be saved.
        pl_module: The LightningModule that it is of.
        flags: Which of the LightningModule's parameters require grad after the fit, as far as the callback knows.
    """
    after = {id(parameter): flag for parameter, flag in flags}
    saved = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    for key, module in saved.items():
        if not isinstance(module, nn.Module):
            continue
        memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
        memo |= {id(parameter): copy.copy(parameter) for parameter in module.parameters()}
        twin = copy.deepcopy(module, memo)
        live: nn.Module = pl_module.hparams[key]  # what is saved may be the copy that another callback has made already
        for parameter, copied in zip(live.parameters(), twin.parameters(), strict=True):
            copied.requires_grad = after.get(id(parameter), copied.requires_grad)
        give_back_copy(live, twin, root=pl_module)
        saved[key] = twin
