"""The one door to Lightning: its classes, and the few private names of it that the package needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, StochasticWeightAveraging, WeightAveraging

# What Lightning puts in the place of an optimizer where ``configure_optimizers`` returns none.
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.optim import Optimizer

__all__ = [
    "BaseFinetuning",
    "Callback",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "EarlyStopping",
    "FSDPStrategy",
    "LightningModule",
    "LightningOptimizer",
    "MisconfigurationException",
    "ModelParallelStrategy",
    "Optimizer",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "StochasticWeightAveraging",
    "Strategy",
    "Trainer",
    "WeightAveraging",
    "XLAStrategy",
    "_MockOptimizer",
    "averages_models",
    "callbacks_of",
    "logged_step",
    "optimizers_of",
    "without_fit",
]

# Lightning lends every callback the model's log functions, and with them the model.
_LENT = frozenset({"log", "log_dict"})


def averages_models(strategy: Strategy) -> bool:
    """Return whether DDP's processes train apart and average their models now and then, as in post-local SGD."""
    return getattr(strategy, "_model_averager", None) is not None  # nothing public tells of it


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks, in the order in which their hooks run."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def optimizers_of(trainer: Trainer) -> list[Optimizer]:
    """Return the Trainer's optimizers; an empty list where ``configure_optimizers`` returned none."""
    return [optimizer for optimizer in trainer.optimizers if not isinstance(optimizer, _MockOptimizer)]


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning itself logs what the model logs."""
    # Loggers draw ours beside theirs; `global_step` counts every optimizer's steps, this counts batches.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def without_fit(attributes: Mapping[str, Any], **instead: Any) -> dict[str, Any]:
    """Return a callback's attributes without what belongs to one fit, for copies and pickles.

    Args:
        attributes: The callback's ``__dict__``.
        instead: Attributes to replace, as a callback that is in no fit has them.

    Example:
        >>> without_fit({"tau": 0.1, "log": print, "_fit": "a fit"}, _fit=None)
        {'tau': 0.1, '_fit': None}
    """
    return {name: value for name, value in attributes.items() if name not in _LENT} | instead
