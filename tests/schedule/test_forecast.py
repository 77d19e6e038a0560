"""The learning rates that a picture shows are those that a fit has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_freeze import FreezeSchedule, Phase, Ramp
from lightning_freeze.schedule.forecast import forecast_rates
from lightning_freeze.schedule.plan import Plan
from tests.nets import Net, loader, trainer

EPOCHS, STEPS = 6, 6  # of an epoch


class Scheduled(Net):
    """Notes the rate before each step."""

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any] | None) -> None:
        super().__init__()
        self.make, self.rates = make, list[float]()

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.01)
        return [optimizer] if self.make is None else ([optimizer], [self.make(optimizer)])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


SCHEDULERS: dict[str, Any] = {
    "none": None,
    "StepLR": lambda one: StepLR(one, 2, 0.5),
    "every other epoch": lambda one: {"scheduler": ExponentialLR(one, 0.5), "frequency": 2},
    "OneCycleLR": lambda one: {"scheduler": OneCycleLR(one, 0.1, total_steps=EPOCHS * STEPS), "interval": "step"},
    "warm restarts": lambda one: {"scheduler": CosineAnnealingWarmRestarts(one, 5), "interval": "step"},
    "warm-up": lambda one: SequentialLR(one, [LinearLR(one, 0.1, total_iters=2), ExponentialLR(one, 0.8)], [2]),
    "ReduceLROnPlateau": lambda one: {"scheduler": ReduceLROnPlateau(one), "monitor": "val_loss"},
}
OWN: Any = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.2}}
PHASES: dict[str, list[Phase]] = {
    "plain": [Phase("head", epochs=1), Phase("*", lr_scale={"backbone": Ramp(0.1)})],
    "own": [Phase("head", epochs=2, lr_scheduler=OWN), Phase("neck", steps=8), Phase("*", lr_scheduler=OWN)],
    "own by the epoch": [
        Phase("head", steps=7),
        Phase("*", epochs=3, lr_scheduler=lambda one, steps: {"scheduler": StepLR(one, 1), "interval": "epoch"}),
        Phase("neck"),
    ],
    "restart": [Phase("head", steps=10), Phase("neck", epochs=1, lr_scheduler="restart"), Phase("*")],
}


# Without a scheduler there is none to begin anew.
@pytest.mark.parametrize(("name", "phases"), sorted({*product(SCHEDULERS, PHASES)} - {("none", "restart")}))
def test_rates_are_foreseen_as_the_fit_has_them(name: str, phases: str) -> None:
    net = Scheduled(SCHEDULERS[name])
    schedule = FreezeSchedule(PHASES[phases], verbose=False)
    forecast = forecast_rates(Plan.of(schedule, net, EPOCHS, steps_per_epoch=STEPS))
    assert forecast is not None
    trainer(max_epochs=EPOCHS, callbacks=[schedule]).fit(net, loader(), loader())
    assert len(net.rates) == EPOCHS * STEPS
    assert forecast.rates == net.rates
    assert [forecast.at(step) for step in range(EPOCHS * STEPS)] == net.rates


@pytest.mark.parametrize("per_epoch", [None, STEPS])
def test_rates_by_the_epoch_need_no_steps_and_others_do(per_epoch: int | None) -> None:
    by_epoch = Plan.of(FreezeSchedule([Phase("*")]), Scheduled(SCHEDULERS["StepLR"]), 4, steps_per_epoch=per_epoch)
    forecast = forecast_rates(by_epoch)
    assert forecast is not None
    assert [forecast.at(epoch * by_epoch.length.per_epoch) for epoch in range(4)] == [0.01, 0.01, 0.005, 0.005]
    by_step = Plan.of(FreezeSchedule([Phase("*")]), Scheduled(SCHEDULERS["OneCycleLR"]), 4, steps_per_epoch=per_epoch)
    assert (forecast_rates(by_step) is None) == (per_epoch is None)


class Apart(Net):
    def configure_optimizers(self) -> Any:
        return AdamW([{"params": self.backbone.parameters(), "lr": 0.1}, {"params": self.head.parameters()}])


class ByHand(Scheduled):
    def __init__(self) -> None:
        super().__init__(SCHEDULERS["StepLR"])
        self.automatic_optimization = False


class NeedsFit(Net):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [OneCycleLR(optimizer, 0.1, total_steps=int(steps))]


@pytest.mark.parametrize("make", [Apart, ByHand, NeedsFit, lambda: torch.nn.Linear(1, 1)])
def test_rates_that_nobody_knows_are_not_guessed(make: Callable[[], Any]) -> None:
    assert forecast_rates(Plan.of(FreezeSchedule([Phase("*")]), make(), 4)) is None
