"""The one door to Lightning: ``lightning.pytorch``, ``pytorch_lightning``, or both side by side.

Their classes are not each other's. So the bases of ours have those of both as bases, and a class that is only checked
against is a tuple of both; an older version than the package needs is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
import torchmetrics
from lightning_utilities.core import rank_zero
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import Optimizer

#: The oldest Lightning that is supported; each of the two packages counts for itself.
OLDEST = "2.5.3"


for _module, _needed in ((torch, "2.6"), (torchmetrics, "1.4")):
    if Version(_module.__version__) < Version(_needed):
        raise ImportError(f"lightning_freeze needs {_module.__name__} {_needed} or later, not {_module.__version__}.")
_HOMES: list[dict[str, str]] = []
for _distribution, _pytorch, _fabric in (
    ("lightning", "lightning.pytorch", "lightning.fabric"),
    ("pytorch-lightning", "pytorch_lightning", "lightning_fabric"),
):
    with suppress(PackageNotFoundError):
        if Version(version(_distribution)) >= Version(OLDEST):
            _HOMES.append({"pytorch": _pytorch, "fabric": _fabric})
if not _HOMES:
    raise ImportError(f"lightning_freeze needs Lightning {OLDEST} or later: pip install 'lightning>={OLDEST}'")

_logs = rank_zero.log
#: The files of the installed Lightnings: what lies beside them is no code of the user's.
LIGHTNING_FILES = tuple(str(import_module(name).__file__) for home in _HOMES for name in home.values())
# Both speak through one logger, which the last that is imported makes its own. It stays that of the one that the user
# has imported, and obeys the levels of both.
if _logs.name.startswith(tuple(home["pytorch"] for home in _HOMES)):
    rank_zero.log = _logs
rank_zero.log.addFilter(
    lambda record: all(logging.getLogger(home["pytorch"]).isEnabledFor(record.levelno) for home in _HOMES)
)


def _all(module: str, name: str) -> tuple[Any, ...]:
    """Return what each Lightning has under a name in a module, such as ``pytorch.callbacks``, if it is new enough."""
    package, _, rest = module.partition(".")
    modules = [import_module(f"{home[package]}.{rest}".rstrip(".")) for home in _HOMES]
    return tuple(vars(found)[name] for found in modules if name in vars(found))


if TYPE_CHECKING:
    from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import *
    from lightning.pytorch.core.optimizer import _MockOptimizer
    from lightning.pytorch.strategies import *
    from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
    from lightning.pytorch.strategies.xla import XLAStrategy
    from lightning.pytorch.utilities.types import LRSchedulerConfig
else:
    for _module, _names in {
        "pytorch": "LightningModule Trainer",
        "pytorch.callbacks": "BaseFinetuning EarlyStopping GradientAccumulationScheduler StochasticWeightAveraging "
        "WeightAveraging",
        # What Lightning puts in the place of an optimizer where ``configure_optimizers`` returns none.
        "pytorch.core.optimizer": "_MockOptimizer",
        "pytorch.strategies": "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy ParallelStrategy "
        "SingleDeviceStrategy Strategy",
        "pytorch.strategies.single_xla": "SingleDeviceXLAStrategy",
        "pytorch.strategies.xla": "XLAStrategy",
        "pytorch.utilities.types": "LRSchedulerConfig",
    }.items():
        globals().update({name: _all(_module, name) for name in _names.split()})
    _here = {"__module__": __name__}
    Callback = type(
        "Callback", _all("pytorch", "Callback"), {**_here, "__getstate__": lambda callback: without_fit(callback)}
    )
    MisconfigurationException = type(
        "MisconfigurationException", _all("fabric.utilities.exceptions", "MisconfigurationException"), _here
    )
    _optimizer_handles_unscaling, *_ = _all("fabric.plugins.precision.amp", "_optimizer_handles_unscaling")

#: The strategies under which a process holds a part of the parameters only.
SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


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


def _core_of(module: nn.Module) -> Any:
    """Return what reads ``configure_optimizers`` in the Lightning of a module: public is only the way through a fit."""
    homes = (home["pytorch"] for home in _HOMES)
    return import_module(
        next(f"{home}.core.optimizer" for home in homes if isinstance(module, import_module(home).LightningModule))
    )


def configured(module: LightningModule) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Return the optimizers and schedulers that ``configure_optimizers`` makes, without a fit."""
    optimizers, schedulers, monitor = _core_of(module)._configure_optimizers(module.configure_optimizers())
    return optimizers, scheduler_configs(module, schedulers, monitor)


def scheduler_configs(
    module: nn.Module, schedulers: list[dict[str, Any]], monitor: str | None = None
) -> list[LRSchedulerConfig]:
    """Return what Lightning makes of the schedulers that ``configure_optimizers`` returns, which it checks."""
    core = _core_of(module)
    configs: list[LRSchedulerConfig] = (
        core._configure_schedulers_automatic_opt(schedulers, monitor)
        if module.automatic_optimization
        else core._configure_schedulers_manual_opt(schedulers)
    )
    core._validate_scheduler_api(configs, module)
    return configs


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning itself logs what the model logs."""
    # Loggers draw ours beside theirs; `global_step` counts every optimizer's steps, this counts batches.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_values(trainer: Trainer, values: Mapping[str, float], *, monitored: bool = True) -> None:
    """Log values under the step at which Lightning logs the model's; ``monitored``, callbacks find them too."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=logged_step(trainer))
    tensors = {name: torch.tensor(value) for name, value in values.items() if monitored}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)


def without_fit(callback: Callback, **instead: Any) -> dict[str, Any]:
    """Return a callback's attributes for copies and pickles; what its class has as None belongs to one fit."""
    ours = [vars(cls) for cls in type(callback).__mro__ if cls.__module__.startswith("lightning_freeze.")]
    # Lightning lends every callback the model's log functions, and with them the model.
    left_out = {"log", "log_dict"}.union(name for own in ours for name, value in own.items() if value is None)
    return {name: value for name, value in vars(callback).items() if name not in left_out} | instead


def resume_with_epoch(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Have a checkpoint that was written in ``on_train_epoch_start`` resume with the epoch that began.

    Lightning would take the batches of the epoch before for those of this one, and go on with the next.
    """
    now = trainer.fit_loop.epoch_progress.current
    if now.ready > now.started:  # type: ignore[attr-defined]  # a tuner restores what it has saved in the same hook
        return
    for count in checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).values():
        if count["ready"] > count["started"] > 0:  # as it was when the epoch before had ended
            count.update(ready=count["started"], completed=count["started"] - 1)


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
    return scaler.scale(torch.ones((), device=trainer.strategy.root_device)) if scaler is not None else None


def unscales_gradients(optimizer: Optimizer) -> bool:
    """Return whether an optimizer divides gradients by the loss scale itself, as fused ones do, within its step."""
    return bool(_optimizer_handles_unscaling(optimizer))  # the flag that it reads is private to torch, and may move
