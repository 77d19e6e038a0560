"""When a plateau looks at its metric, without a Trainer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import tensor

from lightning_freeze import Plateau
from lightning_freeze.schedule.monitor import Monitor, missing_metric

UNTIL = Plateau("loss")


class Loops:
    """Calls a Monitor as the callback does, and keeps metrics as Lightning does: results replace old tensors by new."""

    def __init__(self) -> None:
        self.monitor, self.metrics, self.looks = Monitor(), dict[str, Any](), list[float]()

    def validate(self, value: float | None) -> None:
        self.monitor.begin_validation(UNTIL, self.metrics)
        if value is not None:
            self.metrics["loss"] = tensor(value)
        self.look(self.monitor.end_validation(UNTIL, self.metrics, 0))

    def end_epoch(self, value: float | None = None) -> None:
        if value is not None:
            self.metrics["loss"] = tensor(value)
        self.monitor.epoch_over = True

    def begin_epoch(self) -> None:
        self.look(self.monitor.epoch_value(UNTIL, self.metrics))
        self.monitor.begin_epoch()

    def look(self, value: float | None) -> None:
        if value is not None:
            self.looks.append(round(value, 3))


def test_each_validation_that_logs_it_is_one_look() -> None:
    loops = Loops()
    for values in ([0.5, 0.5], [0.4], [], [0.25, None]):
        loops.begin_epoch()
        for value in values:
            loops.validate(value)
        loops.end_epoch()
    loops.begin_epoch()
    assert loops.looks == [0.5, 0.5, 0.4, 0.25]


def test_each_epoch_of_a_training_metric_is_one_look() -> None:
    loops = Loops()
    for value in (1.0, 0.5, 0.75):
        loops.begin_epoch()
        loops.end_epoch(value)
    loops.begin_epoch()
    loops.begin_epoch()  # as where a fit goes on: no epoch has ended since
    assert loops.looks == [1.0, 0.5, 0.75]


def test_a_validation_that_does_not_log_it_leaves_it_to_training() -> None:
    loops = Loops()
    for value in (1.0, 0.5):
        loops.begin_epoch()
        loops.validate(None)
        loops.end_epoch(value)
    loops.begin_epoch()
    assert loops.looks == [1.0, 0.5]


def test_a_metric_of_validation_is_not_looked_at_twice_in_an_epoch() -> None:
    loops = Loops()
    loops.begin_epoch()
    loops.validate(0.5)
    loops.end_epoch()
    assert loops.monitor.epoch_value(UNTIL, loops.metrics) is None
    loops.monitor.by_validation = False  # the next phase may take its own from training
    assert loops.monitor.epoch_value(UNTIL, loops.metrics) == 0.5
    assert loops.monitor.epoch_value(None, loops.metrics) is None


@pytest.mark.parametrize(
    ("begun", "phase", "in_phase", "validates", "validated_in", "due"),
    [
        (0, 0, 0, True, None, []),  # before the first epoch
        (1, 0, 1, True, None, []),  # validation has not run yet
        (1, 0, 1, True, 0, [0, 1, 2]),
        (1, 0, 1, False, None, [0, 1, 2]),
        (3, 1, 0, True, 0, [2]),  # the phase has only begun
        (3, 1, 1, True, 0, [2]),  # no validation within it
        (3, 1, 1, True, 1, [1, 2]),
    ],
)
def test_when_a_missing_metric_is_found(
    begun: int, phase: int, in_phase: int, validates: bool, validated_in: int | None, due: list[int]
) -> None:
    monitor = Monitor(validated_in=validated_in, epochs=begun)
    assert monitor.checkable(phase, 3, in_phase, validates) == due
    later = monitor.checkable(phase, 3, in_phase, validates)
    assert later == [one for one in due if one == phase]  # later phases are looked at once


def test_what_is_said_of_a_missing_metric() -> None:
    metrics = {"val_loss": tensor(1.0), "freeze/phase": tensor(0.0)}
    assert missing_metric(Plateau("val_los"), metrics) == (
        "ends by Plateau(monitor='val_los'), but no metric of that name was logged. Did you mean 'val_loss'? Logged "
        "are: val_loss."
    )
    assert missing_metric(Plateau("x"), {}).endswith("Logged are: none.")
    several = dict.fromkeys(("train_loss", "val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"), tensor(1.0))
    assert "Did you mean 'val_loss/dataloader_idx_0'?" in missing_metric(Plateau("val_loss"), several)
