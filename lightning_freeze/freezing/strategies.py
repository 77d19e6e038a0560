"""Strategies and optimizers with which callbacks can work exactly."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_freeze._lightning import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    Trainer,
    XLAStrategy,
)

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
_UNSUPPORTED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which the trainable set cannot change exactly, or of the package pytorch_lightning."""
    name = type(strategy).__name__
    if any(base.__module__.startswith("pytorch_lightning.") for base in type(strategy).__mro__):
        raise MisconfigurationException(
            f"{name} comes from the package pytorch_lightning, whose classes are not those of lightning.pytorch. "
            "Import Trainer and LightningModule from lightning.pytorch."
        )
    if not isinstance(strategy, _SUPPORTED) or isinstance(strategy, _UNSUPPORTED):
        raise MisconfigurationException(
            f"Parameters cannot freeze during a fit with {name} and stay exact. Use one device, strategy='ddp', "
            "ModelParallelStrategy (FSDP2) or FSDPStrategy; a strategy of your own that is a subclass of one of them "
            "works too."
        )
    if isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        raise MisconfigurationException(
            f"{name}(use_orig_params=False) makes one flat parameter of all in a unit, which cannot freeze in part. "
            f"Use {name}(use_orig_params=True)."
        )


def refuse_shards(who: str, strategy: Strategy, *, fsdp2: bool = False) -> None:
    """Refuse a strategy under which a process holds a part of the parameters only, FSDP2's unless that works."""
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy) or (
        isinstance(strategy, ModelParallelStrategy) and not fsdp2
    ):
        others = ", ModelParallelStrategy (FSDP2)" if fsdp2 else ""
        raise MisconfigurationException(
            f"{who} does not work with {type(strategy).__name__}: between steps a process has only a part of the "
            f"parameters. Use one device{others} or strategy='ddp'."
        )


def refuse_without_hooks(who: str, trainer: Trainer) -> None:
    """Refuse an optimizer that is none of torch's, and so has no hooks."""
    if kinds := [type(one).__name__ for one in trainer.optimizers if not isinstance(one, Optimizer)]:
        raise MisconfigurationException(
            f"{who} works in the hooks of optimizers, and {kinds[0]} is not a torch.optim.Optimizer, which has them. "
            "Derive it from that class."
        )
