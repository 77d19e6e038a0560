"""Law 9: a step without a transition costs the same, whatever the number of parameters."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import FreezeSchedule, Phase, Ramp
from tests.nets import Net, loader, trainer


class Wide(Net):
    def __init__(self, layers: int) -> None:
        super().__init__(lambda params: torch.optim.SGD(params, lr=0.1))
        self.extra = nn.ModuleList(nn.BatchNorm1d(1) for _ in range(layers))


def calls_in_a_step(layers: int, phases: list[Phase]) -> list[int]:
    """Count the Python and C calls made inside the callback's hooks in each step of an epoch."""
    counts: list[int] = []
    schedule = FreezeSchedule(phases, verbose=False)

    def counted(hook: Any) -> Any:
        def run(*args: Any) -> None:
            calls = 0

            def profile(frame: FrameType, event: str, arg: object) -> None:
                nonlocal calls
                calls += event in ("call", "c_call")

            sys.setprofile(profile)
            try:
                hook(*args)
            finally:
                sys.setprofile(None)
            counts.append(calls)

        return run

    schedule.on_train_batch_start = counted(schedule.on_train_batch_start)  # type: ignore[method-assign]
    schedule.on_train_batch_end = counted(schedule.on_train_batch_end)  # type: ignore[method-assign]
    trainer(callbacks=[schedule], max_epochs=1).fit(Wide(layers), loader(), loader())
    return counts


@pytest.mark.parametrize(
    "phases",
    [
        [Phase("head")],
        [Phase("head", steps=100), Phase("*")],
        [Phase("*", lr_scale={"backbone": 0.1})],
        [Phase("*", lr_scale={"backbone": Ramp(0.1)})],
    ],
    ids=["open", "steps", "scaled", "ramp"],
)
def test_calls_do_not_grow_with_parameters(phases: list[Phase]) -> None:
    few, many = calls_in_a_step(1, phases), calls_in_a_step(300, phases)
    assert few[1:] == many[1:]  # the first batch of an epoch looks at all flags again
    assert max(many[1:]) < 100
