"""An optimizer under a schedule on plain parameters, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_freeze.freezing.optimizers import PhasedOptimizer
from lightning_freeze.freezing.steps import Steps


class Phased(PhasedOptimizer):
    """Shows its scales in steps by itself."""

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.steps = Steps(optimizer)
        self.steps.before.append(self.view.show)
        self.steps.after.append(self.view.hide)

    def release(self) -> None:
        self.steps.close()
        super().release()

    def train(self, module: nn.Module, parameters: Iterable[nn.Parameter], phase: int = 0) -> None:
        """Freeze all but some parameters, as the ledger does."""
        trains = set(map(id, parameters))
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trains)
            if id(parameter) not in trains:
                parameter.grad = None
        self.apply(phase, trains)


@contextmanager
def rates_in_steps(module: nn.Module) -> Iterator[list[dict[str, float]]]:
    """A list that gets, from each step of any optimizer, the rate of each parameter that the optimizer has."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rates: list[dict[str, float]] = []

    def note(optimizer: Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        rates.append({names[id(p)]: float(group["lr"]) for group in groups for p in group["params"]})

    # An optimizer's own post hooks run before global ones, and so inside of the schedule's view.
    seen: list[Optimizer] = []

    def add(optimizer: Optimizer, *_: Any) -> None:
        is_new = not any(one is optimizer for one in seen)
        if is_new and all(id(p) in names for group in optimizer.param_groups for p in group["params"]):
            seen.append(optimizer)
            optimizer.register_step_post_hook(note)

    handle = register_optimizer_step_pre_hook(add)
    try:
        yield rates
    finally:
        handle.remove()
