"""Learning rate schedulers: all of torch's, timm's, and two that people write themselves."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch.optim import lr_scheduler as lrs

from tests.laws.test_law3_schedulers import SCHEDULERS as OF_TORCH

Make = Callable[[Any], Any]


class ByHand:
    """What people write without torch's base class: keeps the rates it began with and writes into groups."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def step(self, metric: Any = None) -> None:
        self.steps += 1
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak / (1 + 0.1 * self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "peaks": self.peaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.peaks = state["steps"], state["peaks"]


class TimmCosine:
    """timm's scheduler, stepped once an update as timm's documentation has it."""

    def __init__(self, optimizer: Any) -> None:
        timm = importlib.import_module("timm.scheduler")
        self.optimizer, self.updates = optimizer, 0
        self.inner = timm.CosineLRScheduler(optimizer, t_initial=20, warmup_t=3, t_in_epochs=False)

    def step(self, metric: Any = None) -> None:
        self.updates += 1
        self.inner.step_update(self.updates)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.inner.load_state_dict(state["inner"])


def can_cycle_momentum(optimizer: Any) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


NAMES = {"Custom": "a user's own, of LRScheduler", "nested": "ChainedScheduler of SequentialLR"}
SCHEDULERS: dict[str, Make | None] = {
    "none": None,
    **{NAMES.get(name, name): make for name, make in OF_TORCH.items()},
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-2, step_size_up=4, cycle_momentum=can_cycle_momentum(o)),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 1e-1, total_steps=40, cycle_momentum=can_cycle_momentum(o)),
    "a user's own, of no class": ByHand,
    "timm's CosineLRScheduler": TimmCosine,
}
