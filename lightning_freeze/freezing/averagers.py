"""Callbacks that average weights, and whether frozen BatchNorm can be had beside them."""

from __future__ import annotations

from torch import nn

from lightning_freeze._lightning import Callback, MisconfigurationException, StochasticWeightAveraging, Trainer
from lightning_freeze.freezing.batchnorm import has_running_statistics


def refuse_new_statistics(trainer: Trainer, module: nn.Module, who: str) -> None:
    """Refuse a callback that computes the running statistics of every BatchNorm anew, the frozen ones too.

    In eval mode they would stay at what it resets them to, zero and one.

    Args:
        trainer: The Trainer whose callbacks are looked at.
        module: The module; without running statistics there is nothing to refuse.
        who: The callback that freezes, for the error.

    Raises:
        MisconfigurationException: If there is a StochasticWeightAveraging and a layer with running statistics.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks)
    if averages and any(map(has_running_statistics, module.modules())):
        raise MisconfigurationException(
            f"The Trainer has {who} and StochasticWeightAveraging, which resets the running statistics of every "
            "BatchNorm to compute them anew; those of a frozen layer would be lost. Use Lightning's WeightAveraging "
            "instead, or FreezeSchedule(frozen_mode='train')."
        )


def refuse_rates_by_group(trainer: Trainer) -> None:
    """Refuse a StochasticWeightAveraging with a rate for each of the user's groups, before groups are added.

    Raises:
        MisconfigurationException: If there is one.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging) and isinstance(callback._swa_lrs, list):
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_lrs={callback._swa_lrs}) has a rate for each group that the optimizer "
                "was given, and FreezeSchedule adds groups to them: for lr_scale, and for what a phase trains and the "
                "optimizer was not given. Give swa_lrs one number, or the optimizer all parameters and no lr_scale."
            )
