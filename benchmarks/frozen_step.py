"""A training step in which only the head trains: beside a frozen loop written by hand, and BackboneFinetuning.

A torchvision ResNet-18 at 64 px with a linear head, callbacks with their default settings. Timed is what the Trainer
does between a batch's first and last hook: forward, backward and optimizer step. The step by hand has no Trainer; it
runs the backbone in eval mode under ``no_grad``, and is taken on the same batch right after each of the Trainer's
steps, so that whatever else the machine does hits both. Fits of the two callbacks alternate. Ratios are to the step by
hand, of each fit's median: minimum / median / maximum over the fits.

Run it with ``python benchmarks/frozen_step.py``, on a GPU with ``--device cuda``: both wait for it after each step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
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


class ByHand:
    """A training step with a frozen backbone as people write it."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.net = Classifier().to(device)
        self.net.backbone.eval()
        self.optimizer = torch.optim.AdamW(self.net.head.parameters(), lr=1e-3)

    def step(self, images: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            features = self.net.backbone(images)
        loss = nn.functional.cross_entropy(self.net.head(features), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Clock(Callback):
    """Last in the Trainer: times each of its steps, and the same step by hand after it."""

    def __init__(self, device: str) -> None:
        self.hand, self.device = ByHand(device), device
        self.pairs: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.began = now(self.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ended = now(self.device)
        self.hand.step(*batch)
        self.pairs.append((ended - self.began, now(self.device) - ended))


def now(device: str) -> float:
    """Return the time at which the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fit(callback: Callback, steps: int, device: str) -> list[tuple[float, float]]:
    clock = Clock(device)
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        logger=False,
        callbacks=[callback, clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), data(steps))
    return clock.pairs[WARM_UP:]


def data(steps: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH * steps, 3, SIZE, SIZE, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=22, help="in a fit")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}; ResNet-18, batch {BATCH} at {SIZE} px")
    cases: dict[str, Callable[[], Callback]] = {
        "FreezeSchedule": lambda: FreezeSchedule([Phase("head")], verbose=False),
        "BackboneFinetuning": BackboneFinetuning,
    }
    fits: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in cases}
    for _ in range(options.repetitions):
        for name, make in cases.items():
            fits[name].append(fit(make(), options.steps, options.device))
    print(f"{'':<20}{'ms a step':>10}{'by hand':>10}   ratio: minimum / median / maximum of fits")
    for name, pairs in fits.items():
        ratios = [statistics.median(ours / hand for ours, hand in one) for one in pairs]
        ours, hand = (1e3 * statistics.median(pair[side] for one in pairs for pair in one) for side in (0, 1))
        spread = f"{min(ratios):.3f} / {statistics.median(ratios):.3f} / {max(ratios):.3f}"
        print(f"{name:<20}{ours:>10.1f}{hand:>10.1f}   {spread}")


if __name__ == "__main__":
    main()
