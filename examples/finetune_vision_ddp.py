r"""Fine-tune EfficientNet-Lite0 on handwritten digits as in ``finetune_vision.py``, on several processes.

The network, the schedule and the LightningModule are those of ``finetune_vision.py``: nothing changes for DDP, and no
``find_unused_parameters`` is needed. On GPUs the processes talk through NCCL, on a CPU through gloo. The example ends
with a table and a proof: after every phase all replicas' bits were gathered and compared.

Two processes on one machine::

    torchrun --nproc-per-node=2 examples/finetune_vision_ddp.py

Two nodes with one process each; run the line on both, with ``--node-rank=0`` and ``--node-rank=1``::

    torchrun --nnodes=2 --nproc-per-node=1 --node-rank=0 --master-addr=127.0.0.1 --master-port=29501 \
        examples/finetune_vision_ddp.py
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from finetune_vision import PHASES, Record, digits, report
from finetune_vision import Classifier as SingleDeviceClassifier
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from torch import Tensor
from torchmetrics.functional import accuracy

from lightning_freeze import FeatureCache, FreezeSchedule


class Classifier(SingleDeviceClassifier):
    """The same; its accuracy is the mean over the processes, which have equally many digits."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        value = accuracy(self(images), labels, "multiclass", num_classes=10)
        self.log("val_acc", value, prog_bar=True, sync_dist=True)


class CompareReplicas(Callback):
    """Gathers the bits of all parameters and buffers from all processes after every epoch and compares them."""

    def __init__(self, schedule: FreezeSchedule) -> None:
        self.schedule = schedule
        self.bytes = 0
        self.identical: dict[str, bool] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = torch.cat([tensor.detach().flatten().view(torch.uint8) for tensor in pl_module.state_dict().values()])
        replicas = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(replicas, own)
        phase = self.schedule.phase.label
        identical = all(torch.equal(own, replica) for replica in replicas)
        self.identical[phase] = identical and self.identical.get(phase, True)
        self.bytes = own.numel()

    def outcome(self, processes: int) -> str:
        """Say for each phase whether all replicas were bit-identical after every epoch of it."""
        found = ", ".join(f"{phase} {'yes' if same else 'NO'}" for phase, same in self.identical.items())
        return f"Replicas bit-identical ({processes} x {self.bytes:,} bytes gathered after every epoch): {found}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, help="train and validate on so many digits only")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # What torchrun says about itself; without it Lightning starts the second process.
    per_node, nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 2)), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    seed_everything(args.seed, verbose=False)
    train, val = digits(args.size, args.batch_size // (per_node * nodes), args.samples)
    model = Classifier()
    schedule = FreezeSchedule(PHASES, frozen_mode="eval")
    cache = FeatureCache("backbone")
    record, replicas = Record(schedule, cache), CompareReplicas(schedule)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[schedule, cache, record, replicas],
        accelerator="auto",
        devices=per_node,
        num_nodes=nodes,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    if trainer.is_global_zero:
        print(schedule.preview(model, args.epochs), end="\n\n")
    trainer.fit(model, train, val)

    if trainer.is_global_zero:
        Console().print(report(record, schedule.phases))
        print(replicas.outcome(trainer.world_size))
    sys.exit(not all(replicas.identical.values()))


if __name__ == "__main__":
    main()
