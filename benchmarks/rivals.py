"""What goes wrong today, reproduced: the alternatives beside FreezeSchedule, each row run here and now, on one device.

The same network, data and wish for all: the head for one epoch, then everything, the backbone at a tenth of the
learning rate. Ends with status 1 if ours fails a row; what an alternative passes is said to hold there too.
BackboneFinetuning unfreezes once; where a row needs more, its base class BaseFinetuning does it as documented there.
finetuning-scheduler takes part if it is installed (``pip install 'lightning-freeze[benchmarks]'``).

Run it with ``python benchmarks/rivals.py``.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeSchedule, Phase

UNFREEZE_AT = 1


class Net(LightningModule):
    def __init__(self, scheduler: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.scheduler = scheduler

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        # BackboneFinetuning's documentation asks for the filter.
        optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


class BlockByBlock(BaseFinetuning):
    """Unfreeze blocks of the backbone, each at its epoch and learning rate, as BaseFinetuning's documentation shows."""

    def __init__(self, *plan: tuple[int, int, float]) -> None:
        super().__init__()
        self.plan = plan

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        for begin, block, lr in self.plan:
            if epoch == begin:
                self.unfreeze_and_add_param_group(pl_module.backbone[block], optimizer, lr)


@dataclass(frozen=True)
class Contestant:
    """Callbacks for the wish above; for the last, then the first layers, in two steps; for two norms at two rates."""

    name: str
    wish: Callable[[], list[Callback]]
    two_steps: Callable[[], list[Callback]]
    two_norms: Callable[[], list[Callback]]


def ours() -> Contestant:
    def schedule(*then: Phase) -> list[Callback]:
        return [FreezeSchedule([Phase("head", epochs=UNFREEZE_AT), *then], verbose=False)]

    return Contestant(
        "FreezeSchedule",
        lambda: schedule(Phase("*", lr_scale={"backbone": 0.1})),
        lambda: schedule(Phase(["head", "backbone.3"], epochs=1), Phase("*", lr_scale={"backbone": 0.1})),
        lambda: schedule(Phase(["head", "type:LayerNorm"], lr_scale={"backbone.4": 0.2, "backbone.1": 0.1})),
    )


def lightnings() -> Contestant:
    return Contestant(
        "BackboneFinetuning",
        lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=UNFREEZE_AT, backbone_initial_ratio_lr=0.1)],
        lambda: [BlockByBlock((1, 3, 0.005), (2, 1, 0.005), (2, 0, 0.005))],
        lambda: [BlockByBlock((1, 4, 0.01), (1, 1, 0.005))],
    )


def finetuning_scheduler() -> Contestant:
    from finetuning_scheduler import FinetuningScheduler, FTSEarlyStopping

    def schedule(*then: list[str]) -> list[Callback]:
        phases: dict[int, dict[str, Any]] = {0: {"params": ["head.*"]}}
        for number, params in enumerate(then, 1):
            phases[number - 1]["max_transition_epoch"] = number
            phases[number] = {"params": params, "lr": 0.005}
        never = FTSEarlyStopping(monitor="val_loss", patience=1000)  # the epoch alone shall end the first phase
        return [FinetuningScheduler(ft_schedule=phases, restore_best=False, logging_level=logging.ERROR), never]

    return Contestant(
        "finetuning-scheduler",
        lambda: schedule(["backbone.*"]),
        lambda: schedule(["backbone.3.*"], ["backbone.0.*", "backbone.1.*"]),
        lambda: schedule(["backbone.4.*", "backbone.1.*"]),
    )


def fit(
    callbacks: list[Callback],
    epochs: int,
    *,
    net: Net | None = None,
    resume: Path | None = None,
    save: Path | None = None,
) -> tuple[Net, Net]:
    """Return the network as it was before and after."""
    torch.manual_seed(0)
    net = net or Net()
    before = copy.deepcopy(net)
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(32, 4), torch.randint(3, (32,)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=CSVLogger(folder),
            default_root_dir=folder,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(net, DataLoader(data, 8), DataLoader(data, 8), ckpt_path=resume, weights_only=False)
        if save:
            trainer.save_checkpoint(save)
    return before, net


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def after_one(one: Contestant) -> str:
    """Stop one epoch after the unfreeze, resume: how far are the weights from the uninterrupted run's?"""
    return resumed_apart(one.wish, stop=2)


def after_two(one: Contestant) -> str:
    """The same, one epoch after the second of two unfreezes."""
    return resumed_apart(one.two_steps, stop=3)


def resumed_apart(callbacks: Callable[[], list[Callback]], stop: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stop.ckpt"
        fit(callbacks(), stop, save=path)
        _, resumed = fit(callbacks(), stop + 2, resume=path)
    _, whole = fit(callbacks(), stop + 2)
    apart = distance(whole, resumed)
    return "" if apart == 0 else f"weights off by {apart:.2g}"


def checkpoint_resumes_without_the_callback(one: Contestant) -> str:
    """Stop after the unfreeze, resume without any callback."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stop.ckpt"
        fit(one.wish(), 2, save=path)
        fit([], 3, resume=path)
    return ""


def frozen_batchnorm_learns_nothing(one: Contestant) -> str:
    """Train the head only: do the frozen backbone's BatchNorm statistics and weights move?"""
    before, after = fit(one.wish(), UNFREEZE_AT)
    moved = {
        "statistics": not torch.equal(before.backbone[1].running_mean, after.backbone[1].running_mean),
        "weights": not torch.equal(before.backbone[1].weight, after.backbone[1].weight),
    }
    return f"trained: {', '.join(name for name, does in moved.items() if does)}" if any(moved.values()) else ""


def schedulers_survive(one: Contestant) -> str:
    """Unfreeze under each of these schedulers, stepped every batch: which fits end in an error?"""
    crashed = []
    for name, scheduler in {
        "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
        "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=20),
        "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5),
        "StepLR": lambda o: lrs.StepLR(o, 5),
        "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 12),
        "SequentialLR": lambda o: lrs.SequentialLR(
            o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.CosineAnnealingLR(o, 10)], milestones=[2]
        ),
    }.items():
        try:
            fit(one.wish(), 3, net=Net(scheduler))
        except (Exception, SystemExit):
            crashed.append(name)
    return f"the fit ends in an error: {', '.join(crashed)}" if crashed else ""


def equal_parameters_both_train(one: Contestant) -> str:
    """Unfreeze two LayerNorms, equal as LayerNorms are at the start, in one epoch: do both train?"""
    net = Net()
    net.backbone = nn.Sequential(
        *(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
    )
    before, after = fit(one.two_norms(), 3, net=net)
    stuck = [
        name
        for name, p in after.backbone.named_parameters()
        if name.split(".")[0] in "14" and torch.equal(p, before.backbone.get_parameter(name))
    ]
    return f"never trained: {', '.join(stuck)}" if stuck else ""


ROWS: dict[str, Callable[[Contestant], str]] = {
    "resume after the unfreeze": after_one,
    "resume after two unfreezes": after_two,
    "resume without the callback": checkpoint_resumes_without_the_callback,
    "BatchNorm of the frozen backbone": frozen_batchnorm_learns_nothing,
    "LR schedulers at the unfreeze": schedulers_survive,
    "parameters with equal values": equal_parameters_both_train,
}


def attempt(row: Callable[[Contestant], str], one: Contestant) -> str:
    try:
        return row(one) or "holds"
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {str(error) or 'no message'}".splitlines()[0][:100]


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    contestants = [lightnings()]
    if importlib.util.find_spec("finetuning_scheduler"):
        contestants.append(finetuning_scheduler())
    contestants.append(ours())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning")]
    if len(contestants) > 2:
        versions.append(f"finetuning-scheduler {importlib.metadata.version('finetuning-scheduler')}")
    print(", ".join(versions))
    failed = False
    for title, row in ROWS.items():
        print(f"\n{title}")
        for one in contestants:
            result = attempt(row, one)
            print(f"  {one.name:<21} {result}", flush=True)
            failed |= one.name == "FreezeSchedule" and result != "holds"
    sys.exit(failed)


if __name__ == "__main__":
    main()
