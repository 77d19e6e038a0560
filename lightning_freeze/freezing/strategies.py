"""Strategies and optimizers with which callbacks can work exactly."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_freeze import _lightning as pl

_SUPPORTED = (pl.SingleDeviceStrategy, pl.DDPStrategy, pl.FSDPStrategy, pl.ModelParallelStrategy)
_UNSUPPORTED = (pl.DeepSpeedStrategy, pl.XLAStrategy, pl.SingleDeviceXLAStrategy)


def check_strategy(strategy: pl.Strategy, *, manual: bool = False) -> None:
    """Refuse a strategy under which the trainable set cannot change exactly; ``manual`` is how the module optimizes."""
    name = type(strategy).__name__
    if not isinstance(strategy, pl.Strategy):
        package = type(strategy).__module__.partition(".")[0]
        raise pl.MisconfigurationException(
            f"{name} comes from {package}, in a version before {pl.OLDEST}. Upgrade it: pip install --upgrade {package}"
        )
    if not isinstance(strategy, _SUPPORTED) or isinstance(strategy, _UNSUPPORTED):
        raise pl.MisconfigurationException(
            f"Parameters cannot freeze during a fit with {name} and stay exact. Use one device, strategy='ddp', "
            "ModelParallelStrategy (FSDP2) or FSDPStrategy; a strategy of your own that is a subclass of one of them "
            "works too."
        )
    if isinstance(strategy, pl.FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        raise pl.MisconfigurationException(
            f"{name}(use_orig_params=False) makes one flat parameter of all in a unit, which cannot freeze in part. "
            f"Use {name}(use_orig_params=True)."
        )
    static = getattr(strategy, "_ddp_kwargs", {}).get("static_graph")
    # Lightning 2.6 flushes the first reduction by hand, and has this attribute for it.
    if manual and static and not hasattr(strategy, "_pl_static_graph_delay_done"):
        raise pl.MisconfigurationException(
            f"{name}(static_graph=True) loses gradients in manual optimization before Lightning 2.6, so replicas drift "
            "apart. Leave static_graph out, or upgrade Lightning."
        )


def refuse_shards(who: str, strategy: pl.Strategy, *, fsdp2: bool = False) -> None:
    """Refuse a strategy under which a process holds a part of the parameters only, FSDP2's unless that works."""
    if isinstance(strategy, pl.SHARDED) and not (fsdp2 and isinstance(strategy, pl.ModelParallelStrategy)):
        others = ", ModelParallelStrategy (FSDP2)" if fsdp2 else ""
        raise pl.MisconfigurationException(
            f"{who} does not work with {type(strategy).__name__}: between steps a process has only a part of the "
            f"parameters. Use one device{others} or strategy='ddp'."
        )


def refuse_without_hooks(who: str, trainer: pl.Trainer) -> None:
    """Refuse an optimizer that is none of torch's, and so has no hooks."""
    if kinds := [type(one).__name__ for one in trainer.optimizers if not isinstance(one, Optimizer)]:
        raise pl.MisconfigurationException(
            f"{who} works in the hooks of optimizers, and {kinds[0]} is not a torch.optim.Optimizer, which has them. "
            "Derive it from that class."
        )
