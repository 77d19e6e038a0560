"""Law 3, the schedulers' part: every one in torch goes on as if the groups had been there from the start."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from lightning_freeze import FreezeSchedule, Phase
from tests.nets import Net, Probe, WarmUp, loader, sgd, trainer

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=9),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 20, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 12, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5, T_mult=2, eta_min=1e-3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-2, step_size_up=4, mode="triangular2"),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 1e-1, total_steps=40),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, threshold=10.0, min_lr=1e-4),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.CosineAnnealingLR(o, 20)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 4), lrs.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=4),
    # torch has no SequentialLR in a SequentialLR
    "nested": lambda o: lrs.ChainedScheduler(
        [
            lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.StepLR(o, 3)], milestones=[4]),
            lrs.LambdaLR(o, lambda step: 0.99**step),
        ]
    ),
}


class Custom(lrs.LRScheduler):
    """What people write themselves, with its own list for each group."""

    def __init__(self, optimizer: Any) -> None:
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [peak / (1 + self.last_epoch) + 1e-5 for peak in self.peak_lrs]


SCHEDULERS["Custom"] = Custom


def test_all_of_torch_is_here() -> None:
    public = {name for name in lrs.__all__ if name != "LRScheduler"}
    assert public <= SCHEDULERS.keys()


def trajectory(make: Callable[[Any], Any], schedule: FreezeSchedule | None, optimizer: Any = sgd) -> list[Any]:
    rates: list[Any] = []
    probe = Probe(lambda trainer, _: rates.append([dict(g, params=None) for g in trainer.optimizers[0].param_groups]))
    callbacks = [schedule, probe] if schedule else [probe]
    plateau = make is SCHEDULERS["ReduceLROnPlateau"]
    net = Net(optimizer, make, interval="epoch" if plateau else "step")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*", category=UserWarning)
        trainer(callbacks=callbacks, max_epochs=4).fit(net, loader(), loader())
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_user_s_group_is_driven_as_without_us(name: str) -> None:
    """The rates of the user's group are those of a run without the callback, to the bit, in every phase."""
    phases = [Phase("head", epochs=1), Phase("*", steps=8), Phase("neck")]
    # The loss differs when layers freeze, and with it what a plateau scheduler does: here it always reduces.
    assert trajectory(SCHEDULERS[name], FreezeSchedule(phases)) == trajectory(SCHEDULERS[name], None)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scaled_groups_keep_their_proportion(name: str) -> None:
    """At every step a scaled group has the user's rate times its factor, and all its other options."""
    phases = [
        Phase("head", epochs=1),
        Phase("*", epochs=1, lr_scale={"backbone": 0.1, "neck": 3.0}),
        Phase("*", steps=8, lr_scale={"backbone": 0.5}),
        Phase("backbone", lr_scale={"backbone": 0.5}),
    ]
    schedule = FreezeSchedule(phases)
    seen = trajectory(SCHEDULERS[name], schedule)
    plain = trajectory(SCHEDULERS[name], None)
    # Places of the groups: the user's, backbone, neck.
    factors = [
        (1.0, 0.1, 3.0) if 6 <= step < 12 else (1.0, 0.5, 1.0) if step >= 12 else (1.0, 1.0, 1.0) for step in range(24)
    ]
    rates = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
    for groups, (user,), by_group in zip(seen, plain, factors, strict=True):
        assert len(groups) == 3
        for group, factor in zip(groups, by_group, strict=True):
            assert group == {key: value * factor if key in rates else value for key, value in user.items()}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_adopted_parameters_go_on_like_the_first_group(name: str) -> None:
    def head_only(params: Any) -> torch.optim.Optimizer:
        return sgd(list(params)[-2:])

    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.1})])
    seen = trajectory(SCHEDULERS[name], schedule, head_only)
    for user, adopted, scaled in seen[6:]:
        assert adopted["lr"] == user["lr"]
        assert scaled["lr"] == user["lr"] * 0.1


class Stages(lrs.LRScheduler):
    """A list that is called like one with an entry a group, and has an entry a stage."""

    def __init__(self, optimizer: Any) -> None:
        self.stage_lrs = [0.1, 0.03, 0.01, 0.001]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [self.stage_lrs[min(self.last_epoch, 3)]] * len(self.optimizer.param_groups)


@pytest.mark.parametrize("scale", [None, {"neck": 0.1}])
def test_a_list_of_stages_stays(scale: Any) -> None:
    """In the fit, in the checkpoint and after it."""
    net = Net(sgd, Stages)
    states: list[dict[str, Any]] = []
    rates: list[float] = []

    def start(trainer: Trainer, _: LightningModule) -> None:
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        states.extend(trainer._checkpoint_connector.dump_checkpoint(weights_only=False)["lr_schedulers"])

    run = trainer(callbacks=[FreezeSchedule([Phase("*", lr_scale=scale)]), Probe(start)])
    run.fit(net, loader(), loader())
    assert rates == [rate for rate in (0.1, 0.03, 0.01, 0.001) for _ in range(6)]
    states.append(run.lr_scheduler_configs[0].scheduler.state_dict())
    assert all(len(state["stage_lrs"]) == 4 and len(state["base_lrs"]) == 1 for state in states)


def test_tensor_learning_rates() -> None:
    def tensor_lr(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=torch.tensor(1e-2))

    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.1})])
    rates: list[list[float]] = []

    def start(trainer: Trainer, _: LightningModule) -> None:
        rates.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])

    net = Net(tensor_lr, SCHEDULERS["CosineAnnealingLR"], interval="step")
    trainer(callbacks=[schedule, Probe(start)], max_epochs=3).fit(net, loader(), loader())
    assert all(scaled == pytest.approx(user * 0.1) for user, scaled in rates[6:])
    assert len({user for user, _ in rates}) > 10


def test_a_warm_up_that_the_user_writes_into_all_groups() -> None:
    """The pattern of Lightning's documentation: a rate set in optimizer_step holds for that very step, scaled."""
    net = WarmUp(sgd)
    schedule = FreezeSchedule([Phase("head", steps=3), Phase("*", lr_scale={"backbone": 0.1})])
    trainer(callbacks=[schedule], max_epochs=1).fit(net, loader(), loader())
    user = [0.01 * (step + 1) for step in range(6)]
    assert net.rates == [[rate, rate * (0.1 if step >= 3 else 1.0)] for step, rate in enumerate(user)]
