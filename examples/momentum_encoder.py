"""Learn features of handwritten digits without labels, from a momentum encoder as BYOL has it.

Grill et al. 2020, "Bootstrap your own latent": the online network predicts, from one distorted view of an image, what a
slowly following target network says of another. The digits come with scikit-learn. Then a linear classifier on frozen
features, the same with the same labels and test images, tells what they are worth: those of the encoder as it was
initialised, and those it has learned.

Run it with ``python examples/momentum_encoder.py``; it ends with a table and a picture.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import TargetNetwork, frozen

WIDTH = 64


def encoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, outputs))


class BYOL(LightningModule):
    """The online network, its predictor, and a target. Nothing in here averages, freezes or detaches."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.online = nn.Sequential(encoder(), perceptron(WIDTH, 32))
        self.predictor = perceptron(32, 32)
        self.target = copy.deepcopy(self.online)
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = distorted(batch[0]), distorted(batch[0])
        loss = self.distance(one, other) + self.distance(other, one)
        self.log("loss", loss, prog_bar=True)
        return loss

    def distance(self, seen: Tensor, goal: Tensor) -> Tensor:
        return -nn.functional.cosine_similarity(self.predictor(self.online(seen)), self.target(goal)).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def distorted(images: Tensor) -> Tensor:
    """Turn, stretch, shift and blot each image at random."""
    count = len(images)

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape) * 2 - 1) * limit

    angle, stretch = uniform(math.radians(20)), 1 + uniform(0.25, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(count, 2, 2)
    maps = torch.cat([turn * stretch[:, None], uniform(0.25, 2, 1)], 2)
    grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    return (moved * (1 + uniform(0.4, 1, 1, 1)) + 0.1 * torch.randn_like(moved)).clamp(0, 1)


def features(network: nn.Module, images: Tensor) -> np.ndarray:
    network.eval()
    with frozen(network):
        return network(images).numpy()


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Return the accuracy on test images of a linear classifier that was fitted to features of training images."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
    return float(classifier.fit(train, labels).score(test, test_labels))


def picture(views: dict[str, np.ndarray], labels: np.ndarray, accuracies: dict[str, list[float]], few: int) -> Figure:
    """Draw the test images in the plane that shows most of each kind of features, and what a probe makes of them."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    *planes, bars = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    for axes, (name, view) in zip(planes, views.items(), strict=True):
        x, y = PCA(2).fit_transform(StandardScaler().fit_transform(view)).T
        dots = axes.scatter(x, y, c=labels, cmap="tab10", s=7, vmin=-0.5, vmax=9.5)
        for digit in range(10):
            own = labels == digit
            axes.annotate(
                str(digit),
                (np.median(x[own]), np.median(y[own])),
                ha="center",
                va="center",
                fontweight="bold",
                bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": dots.to_rgba(digit)},
            )
        axes.set(title=f"{name} features of test images", xticks=[], yticks=[])
        axes.spines[:].set_color("#cccccc")
    for offset, color, (name, values) in zip((-0.2, 0.2), ("#b8b8b8", "#2f6f9f"), accuracies.items(), strict=True):
        drawn = bars.bar(np.arange(2) + offset, [100 * value for value in values], 0.38, color=color, label=name)
        bars.bar_label(drawn, fmt="%.1f", padding=2)
    bars.set(title="linear probe, test accuracy (%)", ylim=(0, 118), xticks=[0, 1])
    bars.set_xticklabels([f"{few} labels a digit", "all labels"])
    bars.legend(frameon=False, loc="upper center", ncols=2)
    bars.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--tau", type=float, default=0.02, help="how fast the target follows")
    parser.add_argument("--few", type=int, default=5, help="labels of each digit in the probe that has only a few")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()

    seed_everything(args.seed, verbose=False)
    began = time.perf_counter()
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    train, test, labels, test_labels = train_test_split(
        images, digits.target, test_size=0.3, random_state=0, stratify=digits.target
    )
    model = BYOL()
    untrained = copy.deepcopy(model.online[0])
    target = TargetNetwork("online", "target", tau=args.tau)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[target],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(train), args.batch_size, shuffle=True, drop_last=True))

    networks = {"random": untrained, "learned": model.target[0]}
    random = np.random.default_rng(args.seed)
    draws = [
        np.concatenate([random.choice(np.flatnonzero(labels == digit), args.few, replace=False) for digit in range(10)])
        for _ in range(10)
    ]
    accuracies = {}
    for name, network in networks.items():
        known, unseen = features(network, train), features(network, test)
        few = [probe(known[draw], labels[draw], unseen, test_labels) for draw in draws]
        accuracies[name] = [float(np.mean(few)), probe(known, labels, unseen, test_labels)]
    table = Table(title=f"Linear probe on {len(test)} test digits")
    for column in ("features", f"{args.few} labels a digit", f"all {len(train):,} labels"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for name, values in accuracies.items():
        table.add_row(name, *(f"{value:.1%}" for value in values))
    Console().print(table)
    print(f"{target.steps:,} steps of the target, {time.perf_counter() - began:.0f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "momentum_encoder.png"
    views = {name.capitalize(): features(network, test) for name, network in networks.items()}
    picture(views, test_labels, accuracies, args.few).savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
