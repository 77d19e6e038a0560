"""Strategies under which the set of trainable parameters can change exactly."""

from __future__ import annotations

from lightning_freeze._lightning import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
_UNSUPPORTED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which the trainable set cannot change exactly.

    Raises:
        MisconfigurationException: If the strategy is not for one device, DDP, FSDP or FSDP2, nor a subclass of those;
            if it is FSDP with ``use_orig_params=False``; or if it is one of the package ``pytorch_lightning``.
    """
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
