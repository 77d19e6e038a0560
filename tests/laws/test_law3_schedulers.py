"""Law 3, the schedulers' part: every one in torch goes on as if the groups had been there from the start."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from lightning_freeze import FreezeSchedule, Phase
from tests.nets import Net, Probe, WarmUp, loader, sgd, trainer
from tests.phased import rates_in_steps

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


def trajectory(make: Callable[[Any], Any], schedule: FreezeSchedule | None, optimizer: Any = sgd) -> Any:
    """The user's groups at each batch's start, the rates of each parameter in each step, the scheduler's last state."""
    groups: list[Any] = []
    plateau = make is SCHEDULERS["ReduceLROnPlateau"]
    net = Net(optimizer, make, interval="epoch" if plateau else "step")
    probe = Probe(
        lambda run, _: groups.append([dict(g, params=len(g["params"])) for g in run.optimizers[0].param_groups])
    )
    callbacks = [schedule, probe] if schedule else [probe]
    run = trainer(callbacks=callbacks, max_epochs=4)
    with warnings.catch_warnings(), rates_in_steps(net) as rates:
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*", category=UserWarning)
        run.fit(net, loader(), loader())
    return groups, rates, run.lr_scheduler_configs[0].scheduler.state_dict()


SCALED = [
    Phase("head", epochs=1),
    Phase("*", epochs=1, lr_scale={"backbone": 0.1, "neck": 3.0}),
    Phase("*", steps=8, lr_scale={"backbone": 0.5}),
    Phase("backbone", lr_scale={"backbone": 0.5}),
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_groups_and_scheduler_are_the_users_and_each_step_has_its_scale(name: str) -> None:
    """What the user can look at is that of a run without the callback, to the bit; a step has the rate times its scale.

    The loss differs when layers freeze, and with it what a plateau scheduler does: here it always reduces.
    """
    groups, rates, state = trajectory(SCHEDULERS[name], FreezeSchedule(SCALED))
    plain_groups, plain_rates, plain_state = trajectory(SCHEDULERS[name], None)
    assert groups == plain_groups
    assert str({**state, "best": None}) == str({**plain_state, "best": None})
    for step, (row, expected) in enumerate(zip(rates, plain_rates, strict=True)):
        factors = [{}, {"back": 0.1, "neck": 3.0}, {"back": 0.5}, {"back": 0.5}][min(step // 6, 3)]
        assert row == {key: rate * factors.get(key[:4], 1.0) for key, rate in expected.items()}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_adopted_parameters_go_on_like_the_first_group(name: str) -> None:
    def head_only(params: Any) -> torch.optim.Optimizer:
        return sgd(list(params)[-2:])

    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.1})])
    groups, rates, _ = trajectory(SCHEDULERS[name], schedule, head_only)
    for (group,), row in zip(groups[6:], rates[6:], strict=True):
        assert row == {key: group["lr"] * (0.1 if key.startswith("backbone") else 1.0) for key in row}
        assert len(row) == 12


def test_a_warm_up_that_the_user_writes_into_all_groups() -> None:
    """The pattern of Lightning's documentation: a rate set in optimizer_step holds for that very step, scaled."""
    net = WarmUp(sgd)
    schedule = FreezeSchedule([Phase("head", steps=3), Phase("*", lr_scale={"backbone": 0.1})])
    with rates_in_steps(net) as rates:
        trainer(callbacks=[schedule], max_epochs=1).fit(net, loader(), loader())
    user = [0.01 * (step + 1) for step in range(6)]
    assert net.rates == [[rate] for rate in user]
    assert [row["backbone.0.weight"] for row in rates] == [
        rate * (0.1 if step >= 3 else 1.0) for step, rate in enumerate(user)
    ]
