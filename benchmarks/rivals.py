"""What goes wrong today, reproduced: Lightning's BackboneFinetuning beside FreezeSchedule, each row run here and now.

Prints a table and ends with status 1 if ours fails a row. Run it with ``python benchmarks/rivals.py``.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeSchedule, Phase

UNFREEZE_AT = 1


class Net(LightningModule):
    def __init__(self, scheduler: Callable[[Any], Any] | None = None, *, ours: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.scheduler, self.ours = scheduler, ours

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        # BackboneFinetuning's documentation asks for the filter.
        parameters = self.parameters() if self.ours else filter(lambda p: p.requires_grad, self.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


def callback(ours: bool, **options: Any) -> Callback:
    if ours:
        phases = [Phase("head", epochs=UNFREEZE_AT), Phase("*", lr_scale={"backbone": 0.1})]
        return FreezeSchedule(phases, verbose=False)
    return BackboneFinetuning(unfreeze_backbone_at_epoch=UNFREEZE_AT, backbone_initial_ratio_lr=0.1, **options)


def fit(
    ours: bool,
    epochs: int,
    *,
    scheduler: Any = None,
    resume: Path | None = None,
    save: Path | None = None,
    tweak: Callable[[Net], None] | None = None,
) -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net(scheduler, ours=ours)
    if tweak:
        tweak(net)
    before = copy.deepcopy(net)
    data = TensorDataset(torch.randn(32, 4), torch.randint(3, (32,)))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[callback(ours)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(data, 8), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return before, net


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(float((a.state_dict()[k].double() - b.state_dict()[k].double()).abs().max()) for k in a.state_dict())


def resumed_run_is_the_stopped_run(ours: bool) -> str:
    """Stop after the unfreeze, resume: how far are the weights from the uninterrupted run's?"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stop.ckpt"
        fit(ours, 2, save=path)
        _, resumed = fit(ours, 4, resume=path)
    _, whole = fit(ours, 4)
    apart = distance(whole, resumed)
    return "" if apart == 0 else f"weights off by {apart:.2g}"


def frozen_batchnorm_learns_nothing(ours: bool) -> str:
    """Train the head only: do the frozen backbone's running statistics move?"""
    before, after = fit(ours, UNFREEZE_AT)
    apart = distance(before.backbone[1], after.backbone[1])  # type: ignore[arg-type]
    return "" if apart == 0 else f"moved by {apart:.2g}"


def schedulers_survive(ours: bool) -> str:
    """Unfreeze under each of these schedulers: which ones crash?"""
    crashed = []
    for name, scheduler in {
        "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
        "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=20),
        "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5),
        "StepLR": lambda o: lrs.StepLR(o, 5),
        "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 12),
    }.items():
        try:
            fit(ours, 3, scheduler=scheduler)
        except Exception:
            crashed.append(name)
    return f"crash: {', '.join(crashed)}" if crashed else ""


def equal_parameters_both_train(ours: bool) -> str:
    """Start two backbone tensors from equal values: do both train after the unfreeze?"""

    def tweak(net: Net) -> None:
        net.backbone.append(nn.BatchNorm1d(8))  # its weight and bias equal the other BatchNorm's

    before, after = fit(ours, 3, tweak=tweak)
    stuck = [
        name
        for name, p in after.backbone.named_parameters()
        if p.ndim == 1 and name != "0.bias" and torch.equal(p, before.backbone.get_parameter(name))
    ]
    return f"never trained: {', '.join(stuck)}" if stuck else ""


ROWS = {
    "resume after the unfreeze": resumed_run_is_the_stopped_run,
    "BatchNorm of the frozen backbone": frozen_batchnorm_learns_nothing,
    "LR schedulers at the unfreeze": schedulers_survive,
    "parameters with equal values": equal_parameters_both_train,
}


def attempt(row: Callable[[bool], str], ours: bool) -> str:
    try:
        return row(ours) or "holds"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = [(name, attempt(row, False), attempt(row, True)) for name, row in ROWS.items()]
    wide = [max(len(line[column]) for line in results) for column in range(3)]
    heading = ("", "BackboneFinetuning", "FreezeSchedule")
    for line in (heading, *results):
        print(
            "  ".join(cell.ljust(max(width, len(head))) for cell, width, head in zip(line, wide, heading, strict=True))
        )
    sys.exit(any(ours != "holds" for _, _, ours in results))


if __name__ == "__main__":
    main()
