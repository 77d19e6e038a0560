"""What the tests on several processes share: a net that trains the same on one, and a watch on what travels."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, Subset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_freeze import FreezeSchedule
from tests.nets import Net, data
from tests.replicas import WORLD

SAMPLES, BATCH = 48, 4


def share(*, stateful: bool = False) -> DataLoader[Any]:
    """This rank's share of the data, such that the ranks' batches together are those of ``whole``."""
    part = Subset(data(SAMPLES), range(dist.get_rank(), SAMPLES, WORLD))
    return (StatefulDataLoader if stateful else DataLoader)(part, batch_size=BATCH)


def whole() -> DataLoader[Any]:
    return DataLoader(data(SAMPLES), batch_size=BATCH * WORLD)


class Even(Net):
    """Without dropout, so that one process on the joined batch does the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class Watch(Callback):
    """After every transition and at the end: which names differ between ranks, and what has travelled in each step."""

    def __init__(self) -> None:
        self.differ: list[list[str]] = []
        self.trains: list[int] = []
        self.travelled: list[int] = []
        self._phase = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        schedules = [callback for callback in trainer.callbacks if isinstance(callback, FreezeSchedule)]
        phase = schedules[0].phase_index if schedules else 0
        if phase != self._phase:
            self._phase = phase
            self.differ.append(differing(dict(pl_module.state_dict())))
        self.travelled.append(0)
        self.trains.append(sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.differ.append(differing(dict(pl_module.named_parameters())))


def differing(tensors: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same, to the bit, on all ranks."""
    found = []
    for name, tensor in tensors.items():
        mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        if not all(torch.equal(other, everyone[0]) for other in everyone):
            found.append(name)
    return found


class Hooked(DDPStrategy):
    """Registers communication hooks on the CPU too, where Lightning does not, and counts bytes if there is none."""

    watch: Watch | None = None

    def _register_ddp_hooks(self) -> None:
        def counted(_: Any, bucket: dist.GradBucket) -> Any:
            if self.watch is not None and self.watch.travelled:
                self.watch.travelled[-1] += bucket.buffer().numel() * bucket.buffer().element_size()
            return allreduce_hook(None, bucket)

        # DDP looks at the annotation as an object, which it is not in this file.
        counted.__annotations__ = {"bucket": dist.GradBucket}
        hook = self._ddp_comm_hook or counted
        _register_ddp_comm_hook(self.model, self._ddp_comm_state, hook, self._ddp_comm_wrapper)
