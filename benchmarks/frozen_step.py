"""A training step in which only the head trains: beside a frozen loop written by hand, and BackboneFinetuning.

A torchvision ResNet-18 at 64 px with a linear head, callbacks with their default settings. Timed is what the Trainer
does between two batches' hooks: forward, backward and optimizer step. The loop by hand has no Trainer; it runs the
backbone in eval mode under ``no_grad`` and is timed around the same three. The epochs of the three alternate in one
process, so that whatever else the machine does hits all of them. Ratios are to the loop by hand, epoch by epoch:
minimum / median / maximum.

Run it with ``python benchmarks/frozen_step.py``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_freeze import FreezeSchedule, Phase

BATCH, SIZE, WARM_UP = 32, 64, 2


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18(num_classes=10)
        self.backbone.fc = nn.Identity()
        self.head = nn.Linear(512, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-3)


class Clock(Callback):
    """Last in the Trainer: takes the time between a batch's first and last hook."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def in_a_trainer(callback: Callback, steps: int) -> float:
    clock = Clock()
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[callback, clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), data(steps))
    return statistics.median(clock.seconds[WARM_UP:])


def by_hand(steps: int) -> float:
    torch.manual_seed(0)
    net = Classifier()
    net.backbone.eval()
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1e-3)
    seconds = []
    for images, labels in data(steps):
        began = time.perf_counter()
        with torch.no_grad():
            features = net.backbone(images)
        loss = nn.functional.cross_entropy(net.head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def data(steps: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH * steps, 3, SIZE, SIZE, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), BATCH)


def epochs(repetitions: int, steps: int) -> Iterator[dict[str, float]]:
    for _ in range(repetitions):
        yield {
            "loop by hand": by_hand(steps),
            "FreezeSchedule": in_a_trainer(FreezeSchedule([Phase("head")], verbose=False), steps),
            "BackboneFinetuning": in_a_trainer(BackboneFinetuning(), steps),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="in an epoch")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch {BATCH} at {SIZE} px, ResNet-18")
    measured = list(epochs(options.repetitions, options.steps))
    print(f"{'':<20}{'ms a step':>12}   ratio to the loop by hand: minimum / median / maximum")
    for name in measured[0]:
        ratios = [one[name] / one["loop by hand"] for one in measured]
        milliseconds = 1e3 * statistics.median(one[name] for one in measured)
        print(
            f"{name:<20}{milliseconds:>12.1f}   {min(ratios):.3f} / {statistics.median(ratios):.3f} / {max(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
