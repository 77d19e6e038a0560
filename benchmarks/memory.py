"""Resident memory over 1,000 steps, with every callback that watches, follows or freezes.

Fits one network three times, each in a process of its own: plain, with everything on, and, for a fifth of the steps,
with a planted leak (`self.losses.append(loss)`) that has to show. Prints the series, and exits with 1 if memory with
everything on grows, or if the planted leak does not show.

Run it with `python benchmarks/memory.py`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torchmetrics.classification as tm
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_freeze
from lightning_freeze import FreezeBatchNorm, FreezeSchedule, MetricLogger, NormLogger, Phase, TargetNetwork

MIB = 2**20
SETTLED = 0.3  # of the steps: by then all phases have begun, and allocator and optimizer have what they need
ALLOWED = 3.0  # MiB, from there to the end


class Net(LightningModule):
    """A student with a target of its own, with BatchNorm and dropout."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.backbone, self.target, self.head = self.make(), self.make(), nn.Linear(256, 10)
        self.leaks, self.losses = leaks, []

    def make(self) -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.1)) for _ in range(4)]
        return nn.Sequential(*blocks)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        hidden = self.backbone(batch[0])
        preds = self.head(hidden)
        loss = nn.functional.cross_entropy(preds, batch[1]) + nn.functional.mse_loss(hidden, self.target(batch[0]))
        if self.leaks:
            self.losses.append(loss)
        return {"loss": loss, "preds": preds, "target": batch[1]}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        preds = self.head(self.backbone(batch[0]))
        return {"preds": preds, "target": batch[1]}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(Callback):
    """Writes down resident memory and the number of living tensors."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[tuple[int, float, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            gc.collect()
            tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
            self.rows.append((trainer.global_step, resident() / MIB, tensors))


def resident() -> int:
    """Return the bytes in memory now; where the system does not say, the most there have been."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def everything(steps: int) -> list[Callback]:
    phases = [Phase("head", steps=steps // 10), Phase(["head", "backbone.3"], steps=steps // 10), Phase("*")]
    callbacks: list[Callback] = [
        FreezeSchedule(phases, verbose=False),
        FreezeBatchNorm("backbone.0"),
        MetricLogger({"acc": tm.MulticlassAccuracy(10), "auroc": tm.MulticlassAUROC(10, thresholds=20)}),
        NormLogger(every_n_steps=1, per="parameter"),
        TargetNetwork("backbone", "target", tau=0.01, eval_mode=True),
    ]
    if "GradientAudit" in lightning_freeze.__all__:
        callbacks.append(lightning_freeze.GradientAudit())
    return callbacks


def fit(kind: str, steps: int, results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    watch = Watch(every=steps // 20)
    data = TensorDataset(torch.randn(640, 256), torch.randint(10, (640,)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps,
            callbacks=[*(everything(steps) if kind != "plain" else []), watch],
            accelerator="cpu",
            logger=CSVLogger(folder, flush_logs_every_n_steps=20),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            check_val_every_n_epoch=2,
        )
        trainer.fit(Net(kind == "leaking"), DataLoader(data, 32), DataLoader(data, 64))
    results.put(watch.rows)


def series(kind: str, steps: int) -> list[tuple[int, float, int]]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=fit, args=(kind, steps, results))
    process.start()
    rows: list[tuple[int, float, int]] = results.get(timeout=600)
    process.join()
    return rows


def growth(rows: list[tuple[int, float, int]]) -> tuple[float, int]:
    """Return how many MiB and tensors the last quarter has more than the quarter after all has settled."""
    settled = rows[int(SETTLED * len(rows)) :]
    quarter = max(1, len(settled) // 4)
    first, last = settled[:quarter], settled[-quarter:]
    memory = sum(row[1] for row in last) / quarter - sum(row[1] for row in first) / quarter
    return memory, last[-1][2] - first[0][2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000)
    options = parser.parse_args()
    print(f"torch {torch.__version__}; resident memory in MiB, sampled 20 times")
    grown = {}
    for kind in ("plain", "everything", "leaking"):
        rows = series(kind, options.steps // 5 if kind == "leaking" else options.steps)
        grown[kind] = growth(rows)
        print(f"{kind:<10}", " ".join(f"{memory:.1f}" for _, memory, _ in rows))
        print(f"{'':<10} after step {rows[int(SETTLED * len(rows))][0]}: {grown[kind][0]:+.2f} MiB, ", end="")
        print(f"{grown[kind][1]:+d} living tensors (of {rows[-1][2]})")
    flat = grown["everything"][0] < ALLOWED and grown["everything"][1] == 0
    shows = grown["leaking"][0] > ALLOWED and grown["leaking"][1] > 0
    print(f"flat with everything on (less than {ALLOWED} MiB): {'yes' if flat else 'NO'}")
    print(f"a planted leak shows: {'yes' if shows else 'NO'}")
    return 0 if flat and shows else 1


if __name__ == "__main__":
    sys.exit(main())
