"""Law 3: schedulers that people write themselves, step themselves or keep to themselves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeSchedule, Phase
from tests.nets import Net, loader, sgd, trainer
from tests.phased import rates_in_steps


class WarmUpThen(lrs.LRScheduler):
    """A scheduler kept as an attribute, which takes over after the warm-up."""

    def __init__(self, optimizer: Any) -> None:
        self.after = lrs.LambdaLR(optimizer, lambda step: 0.9**step)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < 5:
            return [base * (self.last_epoch + 1) / 5 for base in self.base_lrs]
        self.after.step()
        return self.after.get_last_lr()


class OwnStep:
    """Not of torch, without get_lr, with a list of an entry a group."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.base_values = [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        self.steps += 1
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.base_values[index] / (1 + self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def two_groups(params: Any) -> torch.optim.Optimizer:
    params = list(params)
    return torch.optim.SGD([{"params": params[:-2]}, {"params": params[-2:], "lr": 0.03}], lr=1e-2, momentum=0.9)


def head_only(params: Any) -> torch.optim.Optimizer:
    return sgd(list(params)[-2:])


class StepsItself(Net):
    """Keeps the scheduler to itself, out of sight, and steps it."""

    def configure_optimizers(self) -> Any:
        assert self.make_scheduler is not None
        self.automatic_optimization = False
        optimizer = self.make_optimizer(self.parameters())
        scheduler = self.make_scheduler(optimizer)
        self.advance = lambda: scheduler.step()
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.advance()
        return loss


def rates_of(net: Net, *callbacks: Callback) -> list[dict[str, float]]:
    """The learning rate of each parameter in each step."""
    with warnings.catch_warnings(), rates_in_steps(net) as rates:
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*", category=UserWarning)
        trainer(callbacks=list(callbacks)).fit(net, loader(), loader())
    return rates


class Returned(Net):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


either_way = pytest.mark.parametrize("kind", [Returned, StepsItself])
any_scheduler = pytest.mark.parametrize("make", [WarmUpThen, OwnStep])


@pytest.mark.parametrize("optimizer", [sgd, two_groups])
@either_way
@any_scheduler
def test_scaled_rates(make: Any, kind: type[Net], optimizer: Any) -> None:
    """Each parameter has the rate it has without the callback, times the phase's scale."""
    phases = [Phase("*", epochs=1), Phase("*", epochs=1, lr_scale={"neck": 3.0}), Phase("*", lr_scale={"neck": 0.5})]
    plain = rates_of(kind(optimizer, make, interval="step"))
    seen = rates_of(kind(optimizer, make, interval="step"), FreezeSchedule(phases))
    assert len(plain) == 24
    assert len({row["neck.weight"] for row in plain}) > 1
    for step, (row, expected) in enumerate(zip(seen, plain, strict=True)):
        scale = (1.0, 3.0, 0.5, 0.5)[step // 6]
        assert row == {key: rate * (scale if key[:4] == "neck" else 1.0) for key, rate in expected.items()}


@either_way
@any_scheduler
def test_adopted_rates(make: Any, kind: type[Net]) -> None:
    plain = rates_of(kind(head_only, make, interval="step"))
    net = kind(head_only, make, interval="step")
    seen = rates_of(net, FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.1})]))
    for row, expected in zip(seen[6:], plain[6:], strict=True):
        head = expected["head.weight"]
        assert row == {key: head * (0.1 if key.startswith("backbone") else 1.0) for key, _ in net.named_parameters()}


@pytest.mark.parametrize("optimizer", [sgd, two_groups])
def test_stochastic_weight_averaging(optimizer: Any) -> None:
    """It finds the user's groups, also with a rate for each of them."""

    def averaging(rates: Any) -> StochasticWeightAveraging:
        return StochasticWeightAveraging(rates, swa_epoch_start=1, annealing_epochs=2)

    count = 1 if optimizer is sgd else 2
    scaled = [Phase("*", epochs=1), Phase("*", lr_scale={"neck": 0.5})]
    for rates in (1e-3, [1e-3] * count):
        plain = rates_of(Net(optimizer), averaging(rates))
        seen = rates_of(Net(optimizer), FreezeSchedule(scaled, frozen_mode="train"), averaging(rates))
        assert seen[:6] == plain[:6]
        for row, expected in zip(seen[6:], plain[6:], strict=True):
            assert row == {key: rate * (0.5 if key[:4] == "neck" else 1.0) for key, rate in expected.items()}


def test_two_optimizers_of_which_one_has_a_scheduler_that_nobody_returned() -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            first = torch.optim.SGD(self.backbone.parameters(), lr=0.01)
            second = torch.optim.Adam([*self.neck.parameters(), *self.head.parameters()], lr=0.02)
            self.kept = OwnStep(second)
            return [first, second], [lrs.OneCycleLR(first, [0.1], total_steps=60)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.lr_schedulers().step()
            self.kept.step()
            return loss

    plain = rates_of(Two())
    phases = [Phase("*", epochs=1), Phase("*", lr_scale={"neck": 0.1, "backbone.0": 0.5})]
    seen = rates_of(Two(), FreezeSchedule(phases))
    assert len(seen) == len(plain) == 24 * 2
    for number, (row, expected) in enumerate(zip(seen, plain, strict=True)):
        scales = {"neck": 0.1, "backbone.0": 0.5} if number >= 12 else {}
        wanted = {name: rate * scales.get(name.rpartition(".")[0], 1.0) for name, rate in expected.items()}
        assert row == wanted
