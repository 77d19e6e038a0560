"""What DDP sends: bytes all-reduced a step with 95 % of the parameters frozen, and what a rebuild of the wrapper costs.

The bytes are counted in a communication hook, which sees every bucket that DDP reduces. Beside each other in one run:
the wrapper that FreezeSchedule rebuilds, a wrapper around everything with ``find_unused_parameters=True`` whose
parameters are frozen and unfrozen later, and a wrapper that was built once while the 95 % were frozen. The goal is the
bytes of what trains, exactly: fewer means that gradients are not averaged and replicas drift apart, more is sent for
nothing.

Runs two processes on this machine. Ends with status 1 if ours misses the goal in a phase. Run it with
``python benchmarks/communication.py``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import on_two_processes, print_table, trainer
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeSchedule, Phase, freeze, unfreeze
from lightning_freeze.freezing.ddp import follow_trainable_set

LAYERS, WIDTH = 20, 256
FROZEN, FREEZE_AT, UNFREEZE_AT, EPOCHS = "body", 1, 2, 3
WAYS = {
    "FreezeSchedule": "ours, rebuilt where the trainable set changes",
    "find_unused_parameters": "everything wrapped, find_unused_parameters=True",
    "built once": "built once, while 95 % are frozen",
}


class Net(LightningModule):
    """Twenty equal layers; the head is one of them, so that the body is 95 % of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS - 1)))
        self.head = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FreezeByHand(Callback):
    """What people do: flip the flags where an epoch begins."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        change = freeze if trainer.current_epoch == FREEZE_AT else unfreeze
        change(pl_module, FROZEN)


class BuiltWhileFrozen(FreezeByHand):
    """The same; the wrapper is built while what is frozen later is frozen."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        freeze(pl_module, FROZEN)


class HooksOnCpu(DDPStrategy):
    """Lightning registers communication hooks on GPUs only; gloo takes them too."""

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, self._ddp_comm_hook)


class Count(Callback):
    """Writes down for each epoch the bytes reduced a step, the bytes that train, and how far the replicas are apart."""

    def __init__(self) -> None:
        self.bytes = 0
        self.epochs: list[tuple[int, int, float]] = []

    def hook(self, state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bytes = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trains = sum(p.nbytes for p in pl_module.parameters() if p.requires_grad)
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        replicas = [torch.empty_like(weights) for _ in range(trainer.world_size)]
        dist.all_gather(replicas, weights)
        apart = max(float((weights - replica).abs().max()) for replica in replicas)
        self.epochs.append((self.bytes // int(trainer.num_training_batches), trains, apart))


def train(way: str) -> list[tuple[int, int, float]]:
    """Train everything, then 5 %, then everything, an epoch each."""
    torch.manual_seed(0)
    net, count = Net(), Count()
    phases = [Phase("*", epochs=FREEZE_AT), Phase("head", epochs=UNFREEZE_AT - FREEZE_AT), Phase("*")]
    callback: Callback = {
        "FreezeSchedule": FreezeSchedule(phases, verbose=False),
        "find_unused_parameters": FreezeByHand(),
        "built once": BuiltWhileFrozen(),
    }[way]
    strategy = HooksOnCpu(ddp_comm_hook=count.hook, find_unused_parameters=way == "find_unused_parameters")
    data = TensorDataset(torch.randn(128, WIDTH), torch.randint(WIDTH, (128,)))
    trainer(max_epochs=EPOCHS, callbacks=[callback, count], strategy=strategy).fit(net, DataLoader(data, 16))
    return count.epochs


def rebuild_seconds(tensors: int, width: int, repetitions: int) -> list[float]:
    """Time how long the wrapper's rebuild takes with so many trainable tensors, both processes starting together."""

    class Tensors(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.ParameterList(torch.randn(width, width) for _ in range(tensors))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return torch.stack([(batch[0].sum() * p).sum() for p in self.all]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Rebuild(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for _ in range(repetitions + 1):
                dist.barrier()
                start = time.perf_counter()
                follow_trainable_set(trainer.strategy)
                seconds.append(time.perf_counter() - start)

    seconds: list[float] = []
    fitting = trainer(max_epochs=1, limit_train_batches=1, callbacks=[Rebuild()], strategy="ddp")
    fitting.fit(Tensors(), DataLoader(TensorDataset(torch.ones(4, 1))))
    return seconds[1:]  # the first one warms up


def bytes_a_step() -> bool:
    """Print what each way sends, and give whether ours sends what trains and nothing else."""
    rows = [("bytes all-reduced a step", "everything", "5 % trains", "everything again", "replicas end apart by")]
    held = True
    for way, label in WAYS.items():
        ranks = on_two_processes(train, way)
        epochs = ranks[0]
        if way == "FreezeSchedule":
            rows.append(("goal: what trains", *(f"{trains:,}" for _, trains, _ in epochs), "0"))
            held = all(sent == trains and apart == 0 for rank in ranks for sent, trains, apart in rank)
        sent = [f"{sent:,} ({sent / trains:.0%})" for sent, trains, _ in epochs]
        rows.append((label, *sent, f"{epochs[-1][2]:.2g}"))
    print_table(rows)
    return held


def rebuilds(width: int, repetitions: int) -> None:
    rows = [("rebuild of the wrapper", "parameters", "min", "median", "max")]
    for tensors in (10, 100, 1000):
        # The slower process is the one that training waits for.
        ranks = on_two_processes(rebuild_seconds, tensors, width, repetitions)
        slower = [1e3 * max(both) for both in zip(*ranks, strict=True)]
        times = (f"{pick(slower):.2f} ms" for pick in (min, statistics.median, max))
        rows.append((f"{tensors:,} tensors of {width}x{width}", f"{tensors * width * width:,}", *times))
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="the rebuilt tensors' height and width")
    parser.add_argument("--repetitions", type=int, default=31)
    options = parser.parse_args()
    held = bytes_a_step()
    print()
    rebuilds(options.width, options.repetitions)
    sys.exit(not held)


# Also in the processes that are started.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

if __name__ == "__main__":
    main()
