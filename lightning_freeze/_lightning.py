"""The one door to Lightning: its classes, and the few private names of it that the package needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.core import optimizer as _core
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
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, ones
from torch.optim import Optimizer

__all__ = [
    "LIGHTNING_FILE",
    "BaseFinetuning",
    "Callback",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "EarlyStopping",
    "FSDPStrategy",
    "GradientAccumulationScheduler",
    "LRSchedulerConfig",
    "LightningModule",
    "MisconfigurationException",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "StochasticWeightAveraging",
    "Strategy",
    "Trainer",
    "WeightAveraging",
    "XLAStrategy",
    "averages_models",
    "callbacks_of",
    "epoch_names",
    "evaluation_dataloaders",
    "logged_step",
    "loss_scale",
    "optimizers_of",
    "scheduler_configs",
    "unscales_gradients",
    "without_fit",
]

#: The file of the installed Lightning's package: what lies beside it is no code of the user's.
LIGHTNING_FILE = str(lightning.__file__)

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
    # Lightning puts a mock there.
    return [optimizer for optimizer in trainer.optimizers if not isinstance(optimizer, _core._MockOptimizer)]


def scheduler_configs(module: LightningModule, schedulers: list[dict[str, Any]]) -> list[LRSchedulerConfig]:
    """Return what Lightning makes of the schedulers that ``configure_optimizers`` returns, which it checks."""
    # Public is only the way through `configure_optimizers`.
    automatic = module.automatic_optimization
    configs: list[LRSchedulerConfig] = (
        _core._configure_schedulers_automatic_opt(schedulers, None)
        if automatic
        else _core._configure_schedulers_manual_opt(schedulers)
    )
    _core._validate_scheduler_api(configs, module)
    return configs


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


def epoch_names(trainer: Trainer) -> dict[str, str]:
    """Return the names that ``self.log`` has logged for the current epoch, each with the hook that logged it."""
    # The public `logged_metrics` keeps the names of earlier epochs and stages, and has those of this epoch only later.
    results = trainer._results
    logged = results.result_metrics if results is not None else []
    of_epoch = [result for result in logged if result.meta.on_epoch and not result.has_reset]
    return {results._forked_name(one, on_step=False)[0]: one.meta.fx.partition(".")[0] for one in of_epoch}  # type: ignore[union-attr]


def evaluation_dataloaders(trainer: Trainer) -> int:
    """Return how many dataloaders validation or test tells apart; a CombinedLoader that mixes them counts as one."""
    loop = trainer._evaluation_loop  # which of the loops is running, no public name says
    return loop.num_dataloaders if loop._is_sequential else 1


def loss_scale(trainer: Trainer) -> Tensor | None:
    """Return what AMP multiplies the loss by, without waiting for the device; None without a scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # `get_scale` would wait.
    return scaler.scale(ones((), device=trainer.strategy.root_device)) if scaler is not None else None


def unscales_gradients(optimizer: Optimizer) -> bool:
    """Return whether an optimizer divides gradients by the loss scale itself, as fused ones do, within its step."""
    return bool(_optimizer_handles_unscaling(optimizer))  # the flag that it reads is private to torch, and may move
