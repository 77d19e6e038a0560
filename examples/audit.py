"""Find four mistakes that train without an error, and show that the fixed module has none.

The network learns handwritten digits, which come with scikit-learn: nothing is downloaded. Each mistake is one that
people make: losses kept in a list, a ``detach`` too many, a part that the optimizer was not given, and a frozen
backbone whose BatchNorm goes on to learn. The training is no different with the audit; it only looks.

Run it with ``python examples/audit.py``; it ends with what was found, and with what is left after the fixes.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy

from lightning_freeze import FreezeSchedule, GradientAudit, Phase
from lightning_freeze.audit.findings import Report, alike


class Careless(LightningModule):
    """A classifier with four mistakes. It trains, and its loss falls."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        )
        self.gate = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)
        self.temperature = nn.Parameter(torch.ones(()))
        self.losses: list[Tensor] = []
        self.freeze_backbone()

    def freeze_backbone(self) -> None:
        self.backbone.requires_grad_(False)  # 1: its running statistics still move in every forward

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images).mean((2, 3))
        weights = torch.sigmoid(self.gate(features)).detach()  # 2: the gate never learns
        return self.head(features * weights) * self.temperature

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.losses.append(loss)  # 3: every step's graph stays in memory
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", accuracy(self(images), labels, "multiclass", num_classes=10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # 4: the temperature is in no optimizer
        return torch.optim.AdamW([*self.gate.parameters(), *self.head.parameters()], lr=1e-2)


class Fixed(Careless):
    """The same with the four fixes that the report names; FreezeSchedule freezes the backbone."""

    def freeze_backbone(self) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images).mean((2, 3))
        return self.head(features * torch.sigmoid(self.gate(features))) * self.temperature

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of 1,440 training and 357 validation digits, 8 × 8 pixels in 0 … 1."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels))
    train, val = torch.utils.data.random_split(data, [1440, len(data) - 1440])
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=len(val))


def audited(module: LightningModule, epochs: int, *others: Any) -> tuple[Report, float]:
    """Train with an audit; return what it found and the accuracy."""
    audit = GradientAudit()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*others, audit],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, *digits())
    return audit.report, float(trainer.callback_metrics["val_acc"])


def shown(report: Report) -> Table:
    """Return the findings as a table, those that are alike in one row."""
    table = Table(title=report.summary, show_lines=True)
    for column in ("where", "what is wrong", "likely cause", "fix"):
        table.add_column(column, overflow="fold")
    for findings in alike(report):
        first, names = findings[0], [finding.name for finding in findings]
        more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
        table.add_row("\n".join([*names[:3], *more]), first.title, first.cause, first.fix)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("lightning_freeze").setLevel(logging.ERROR)  # the tables show it all
    console = Console()

    seed_everything(args.seed, verbose=False)
    report, accuracy_before = audited(Careless(), args.epochs)
    console.print(shown(report))

    seed_everything(args.seed, verbose=False)
    schedule = FreezeSchedule([Phase(["*", "!backbone"], epochs=max(1, args.epochs // 2)), Phase("*")])
    fixed, accuracy_after = audited(Fixed(), args.epochs, schedule)
    console.print(f"\nAfter the fixes: {fixed.summary}")
    console.print(f"Validation accuracy: {accuracy_before:.1%} with the mistakes, {accuracy_after:.1%} without.")


if __name__ == "__main__":
    main()
