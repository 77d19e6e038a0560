"""What goes wrong today on several devices, reproduced: BackboneFinetuning, finetuning-scheduler and FreezeSchedule.

All three unfreeze a frozen network block by block under DDP on two processes of this machine, and resume from the
checkpoints that they wrote. Each is used as its documentation says: finetuning-scheduler with an explicit schedule,
with ``find_unused_parameters`` both off, as in its own examples, and on, and resumed through ``trainer.ckpt_path``;
resuming through ``fit(ckpt_path=...)``, as Lightning's documentation has it, is a row of its own. Prints a table and
ends with status 1 if ours fails a row. Run it with ``python benchmarks/rivals_ddp.py``.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from processes import WORLD, on_two_processes, print_table, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeSchedule, Phase

OURS = "FreezeSchedule"
RIVALS = ("BackboneFinetuning", "finetuning-scheduler")
LR, EPOCHS = 0.05, 6
FIRST, SECOND = 1, 3  # the epochs in which the backbone's blocks are unfrozen


class Net(LightningModule):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.way = way

    def step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        # The rivals' documentation asks for the filter.
        parameters = self.parameters() if self.way == OURS else filter(lambda p: p.requires_grad, self.parameters())
        return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def callbacks(way: str, folder: str) -> list[Callback]:
    """The way's callback and one that writes a checkpoint after every epoch."""
    if way == "BackboneFinetuning":
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=FIRST, backbone_initial_ratio_lr=0.1)
        return [finetuning, ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)]
    if way == "finetuning-scheduler":
        schedule = {
            0: {"params": ["head.weight", "head.bias"], "max_transition_epoch": FIRST},
            1: {"params": ["backbone.2.weight", "backbone.2.bias"], "max_transition_epoch": SECOND},
            2: {"params": ["backbone.0.weight", "backbone.0.bias"], "max_transition_epoch": EPOCHS},
        }
        finetuning = FinetuningScheduler(schedule, base_max_lr=LR, epoch_transitions_only=True, log_dir=folder)
        return [finetuning, FTSCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=-1)]
    phases = [Phase("head", epochs=FIRST), Phase(["head", "backbone.2"], epochs=SECOND - FIRST), Phase("*")]
    return [
        FreezeSchedule(phases, verbose=False),
        ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]


def fit(
    way: str, folder: str, processes: int, unused: bool, resume: str | None = None, as_argument: bool = False
) -> dict[str, Tensor]:
    """Train and give the weights; called in each of the processes."""
    torch.manual_seed(0)
    net = Net(way)
    data = TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    fitting = trainer(
        max_epochs=EPOCHS,
        devices=processes,
        strategy=f"ddp_find_unused_parameters_{str(unused).lower()}" if processes > 1 else "auto",
        callbacks=callbacks(way, folder),
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    if not as_argument:
        fitting.ckpt_path = resume
    argument = {"ckpt_path": resume} if as_argument else {}
    fitting.fit(net, DataLoader(data, 8), DataLoader(data, 8), **argument, weights_only=False)
    return dict(net.state_dict())


def run(way: str, folder: str, processes: int, *args: Any) -> list[dict[str, Tensor]]:
    """Return every process's weights."""
    if processes == 1:
        return [fit(way, folder, processes, *args)]
    return on_two_processes(fit, way, folder, processes, *args)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def replicas_agree(way: str, unused: bool) -> str:
    """Train through all unfreezes on two processes: how far are the replicas apart?"""
    with tempfile.TemporaryDirectory() as folder:
        apart = distance(*run(way, folder, WORLD, unused))
    return "" if apart == 0 else f"differ by {apart:.2g}"


def resumes(way: str, processes: int, unfreezes: int, as_argument: bool = False) -> str:
    """Resume from each checkpoint written after so many unfreezes: how far from the uninterrupted run is the worst?"""
    if way == "BackboneFinetuning" and unfreezes > 1:
        return "has one only"
    epochs = {1: range(FIRST, SECOND), 2: range(SECOND, EPOCHS - 1)}[unfreezes]
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder:
        whole = run(way, folder, processes, False)
        for epoch in epochs:
            with tempfile.TemporaryDirectory() as other:
                resumed = run(way, other, processes, False, f"{folder}/epoch={epoch}.ckpt", as_argument)
            apart = max(apart, distance(whole[0], resumed[0]))  # of rank zero: how replicas differ is another row
    return "" if apart == 0 else f"off by {apart:.2g}"


ROWS: dict[str, tuple[Callable[..., str], tuple[Any, ...]]] = {
    "replicas after the unfreezes, find_unused_parameters off": (replicas_agree, (False,)),
    "replicas after the unfreezes, find_unused_parameters on": (replicas_agree, (True,)),
    "resume after one unfreeze, one process": (resumes, (1, 1)),
    "resume after two unfreezes, one process": (resumes, (1, 2)),
    "the same through fit(ckpt_path=...), after one": (resumes, (1, 1, True)),
    "the same through fit(ckpt_path=...), after two": (resumes, (1, 2, True)),
    "resume after one unfreeze, two processes": (resumes, (WORLD, 1)),
    "resume after two unfreezes, two processes": (resumes, (WORLD, 2)),
}


def attempt(row: Callable[..., str], way: str, args: tuple[Any, ...]) -> str:
    try:
        return row(way, *args) or "holds"
    except Exception as error:
        # What another process raises comes as text, whose last line is the error.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"[:60]


def main() -> None:
    ways = (*RIVALS, OURS)
    heading = ("", "BackboneFinetuning", f"finetuning-scheduler {version('finetuning-scheduler')}", OURS)
    results = [(name, *(attempt(row, way, args) for way in ways)) for name, (row, args) in ROWS.items()]
    print_table([heading, *results])
    sys.exit(any(ours != "holds" for *_, ours in results))


# Also in the processes that are started.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")

if __name__ == "__main__":
    main()
