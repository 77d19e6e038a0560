"""A student with a target network, which the tests of averaging share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.nets import OptimizerFactory, adamw, data


def network() -> nn.Module:
    """Convolution, BatchNorm and dropout, so that mode, buffers and random numbers matter."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(36, 3)
    )


class Student(LightningModule):
    """Learns from labels and from what its target network says; gives its optimizer ``self.parameters()``."""

    def __init__(self, optimizer: OptimizerFactory = adamw, scheduler: Any = None) -> None:
        super().__init__()
        self.online = network()
        self.target = network()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self.online(images)
        return nn.functional.cross_entropy(logits, labels) + nn.functional.mse_loss(logits, self.target(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # Lightning does not save the state of random generators, so dropout draws from the step's number.
        torch.default_generator.manual_seed(self.trainer.fit_loop.total_batch_idx)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


def by_hand(
    student: Student, tau: float | None, every_n_steps: int | None, *, epochs: int = 2, accumulate: int = 1
) -> dict[str, Tensor]:
    """Train a copy in a plain loop, and give the weights."""
    student = copy.deepcopy(student)
    optimizer = student.make_optimizer(student.online.parameters())
    student.target.load_state_dict(student.online.state_dict())
    student.target.requires_grad_(False)
    batches, steps = list(DataLoader(data(), 4)) * epochs, 0
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        (student.loss(batch) / accumulate).backward()
        if (number + 1) % accumulate:
            continue
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        sources, targets = student.online.state_dict(), student.target.state_dict()
        for name, target in targets.items():
            if tau is not None:
                target.copy_(sources[name] if name.endswith("tracked") else torch.lerp(target, sources[name], tau))
            elif every_n_steps is not None and steps % every_n_steps == 0:
                target.copy_(sources[name])
    return student.state_dict()
