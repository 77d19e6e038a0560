"""Strategies under which the set of trainable parameters can change exactly."""

from __future__ import annotations

from lightning_freeze._lightning import (
    OLDEST,
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


def check_strategy(strategy: Strategy, *, manual: bool = False) -> None:
    """Refuse a strategy under which the trainable set cannot change exactly.

    Args:
        strategy: Any strategy.
        manual: Whether the LightningModule optimizes by hand.

    Raises:
        MisconfigurationException: If the strategy is not for one device, DDP, FSDP or FSDP2, nor a subclass of those;
            if it is FSDP with ``use_orig_params=False``, or DDP with ``static_graph=True`` in manual optimization on
            Lightning before 2.6; or if the Lightning that it comes from is too old.
    """
    name = type(strategy).__name__
    if not isinstance(strategy, Strategy):
        package = type(strategy).__module__.partition(".")[0]
        raise MisconfigurationException(
            f"{name} comes from {package}, in a version before {OLDEST}. Upgrade it: pip install --upgrade {package}"
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
    static = getattr(strategy, "_ddp_kwargs", {}).get("static_graph")
    # Lightning 2.6 flushes the first reduction by hand, and has this attribute for it.
    if manual and static and not hasattr(strategy, "_pl_static_graph_delay_done"):
        raise MisconfigurationException(
            f"{name}(static_graph=True) loses gradients in manual optimization before Lightning 2.6, so replicas drift "
            "apart. Leave static_graph out, or upgrade Lightning."
        )
