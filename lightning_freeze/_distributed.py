"""What the package needs of ``torch.distributed``; a build of torch without it has no instance of its classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import distributed

if TYPE_CHECKING or distributed.is_available():
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.algorithms.model_averaging.utils import average_parameters
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, OptimStateKeyType
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor, Partial, Replicate
else:

    class _Absent:
        pass

    PowerSGDState = PeriodicModelAverager = average_parameters = FileSystemReader = StateDictOptions = _Absent
    set_optimizer_state_dict = FSDPModule = FullyShardedDataParallel = OptimStateKeyType = _Absent
    ZeroRedundancyOptimizer = DTensor = Partial = Replicate = _Absent
