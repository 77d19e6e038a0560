from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_freeze import Phase, Plateau
from lightning_freeze.schedule.progress import PlateauWatch, walk

ends = st.tuples(st.none() | st.integers(1, 4), st.none() | st.integers(1, 17)).filter(any)


def simulate(
    phases: list[Phase], epochs: int, steps_per_epoch: int
) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """Where each phase had begun at every epoch and step of a fit; changes come before a step, as the callback's do."""
    history = [(0, 0, 0)]
    seen: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for epoch in range(epochs):
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            at_start = step == epoch * steps_per_epoch
            while history[-1][2] + 1 < len(phases):
                phase, (begin_epoch, begin_step, index) = phases[history[-1][2]], history[-1]
                by_epochs = phase.epochs is not None and at_start and epoch - begin_epoch >= phase.epochs
                by_steps = phase.steps is not None and step - begin_step >= phase.steps
                if not (by_epochs or by_steps):
                    break
                history.append((epoch, step, index + 1))
            seen[epoch, step] = list(history)
    return seen


@settings(max_examples=400, deadline=None)
@given(st.lists(ends, min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 8))
def test_walk_begins_phases_where_a_fit_does(lengths: Any, steps_per_epoch: int, epochs: int) -> None:
    phases = [Phase("*", epochs=e, steps=s) for e, s in lengths]
    for (epoch, step), history in simulate(phases, epochs, steps_per_epoch).items():
        assert walk(phases, epoch, step, steps_per_epoch) == history


@settings(max_examples=200, deadline=None)
@given(st.lists(ends, min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 8))
def test_walk_is_exact_in_one_unit_without_steps_per_epoch(lengths: Any, each: int, epochs: int) -> None:
    """It is exact in the first epoch, the only one in which nothing is known, and where all phases end in one unit."""
    phases = [Phase("*", epochs=e, steps=s) for e, s in lengths]
    for (epoch, step), history in simulate(phases, epochs, each).items():
        one_unit = all(phase.steps is None for phase in phases) or all(phase.epochs is None for phase in phases)
        if epoch == 0 or one_unit:
            assert walk(phases, epoch, step, None)[-1][2] == history[-1][2]


@given(st.integers(0, 3))
def test_walk_passes_only_plateaus_that_were_passed(passed: int) -> None:
    phases = [Phase("*", until=Plateau("x")) for _ in range(4)]
    assert walk(phases, 5, 50, 10, passed=passed)[-1][2] == passed
    mixed = [Phase("*", until=Plateau("x"), epochs=3), Phase("*")]
    assert walk(mixed, 2, 20, 10, passed=1)[-1][2] == 0
    assert walk(mixed, 3, 30, 10, passed=0)[-1] == (3, 30, 1)


metrics = st.lists(st.sampled_from([0.0, 1.0, 1.05, 2.0, 3.0, math.nan, math.inf, -math.inf]), max_size=20)


@settings(max_examples=300)
@given(metrics, st.integers(1, 4), st.sampled_from(["min", "max"]), st.sampled_from([0.0, 0.1, 5.0]))
def test_plateau_ends_after_patience_values_without_a_better_one(
    values: Any, patience: int, mode: Any, delta: float
) -> None:
    until, watch = Plateau("x", patience=patience, mode=mode, min_delta=delta), PlateauWatch()
    best, since, end = None, 0, None
    sign = 1 if mode == "min" else -1
    for step, value in enumerate(values):
        watch.look(until, value, step)
        if math.isfinite(value) and (best is None or sign * (best - value) > delta):
            best, since = value, 0
        else:
            since += 1
        end = step if end is None and since >= patience else end
        assert watch == PlateauWatch(best, since, end)
        assert watch.ended == (end is not None)
    assert PlateauWatch(**json.loads(json.dumps(dataclasses.asdict(watch)))) == watch
