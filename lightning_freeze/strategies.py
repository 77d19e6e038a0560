"""What a strategy needs when the set of trainable parameters changes."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.nn.parallel import DistributedDataParallel

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy)
_UNSUPPORTED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which the trainable set cannot change exactly.

    Raises:
        MisconfigurationException: If the strategy is neither for one device nor DDP, nor a subclass of those.
    """
    if not isinstance(strategy, _SUPPORTED) or isinstance(strategy, _UNSUPPORTED):
        raise MisconfigurationException(
            f"FreezeSchedule does not work with {type(strategy).__name__}: it cannot change there what trains and stay "
            "exact. Use one device or strategy='ddp'."
        )


def follow_trainable_set(strategy: Strategy) -> None:
    """Make the wrapper know what trains now. Under DDP every rank must call it at the same step.

    DDP's reducer only knows parameters that required grad when it was built; one that is unfrozen later would never be
    reduced and replicas would drift apart in silence. So the wrapper is built anew.
    """
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.model.module
        strategy.configure_ddp()
