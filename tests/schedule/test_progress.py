"""Which phase holds, as pure data."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_freeze import Phase, Plateau
from lightning_freeze.schedule.progress import Begin, PlateauWatch, Progress, begin_or_go_on, planned, walk

PER_EPOCH = 6
ENDS = st.tuples(st.none() | st.integers(1, 3), st.none() | st.integers(1, 14)).filter(any)
UNKNOWN: Any = lambda *_: None  # noqa: E731


def built(ends: Any) -> list[Phase]:
    return [Phase(f"layer{index}", epochs=e, steps=s) for index, (e, s) in enumerate(ends)]


def move(progress: Progress, epoch: int, step: int, asked: str = "") -> None:
    """What a fit does before a step."""
    why = progress.over(epoch, step, asked)
    if why and progress.is_last:
        progress.ended = progress.ended or why
    elif why:
        progress.begin_next(epoch, step, why)


def look(progress: Progress, value: float, epoch: int) -> None:
    """What a fit does with a value of an epoch."""
    until = progress.phase.plateau
    assert until is not None
    progress.plateau.look(until, value, early=epoch - progress.history[-1][0] < until.min_epochs)


def followed(progress: Progress, epochs: int, begin: int = 0) -> list[int]:
    """Return the phase of each step from ``begin`` on."""
    found = []
    for step in range(begin, epochs * PER_EPOCH):
        move(progress, step // PER_EPOCH, step)
        found.append(progress.index)
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(ENDS, min_size=1, max_size=5), st.integers(1, 8))
def test_a_fit_walks_where_the_schedule_says(ends: Any, epochs: int) -> None:
    """Step by step, and at once, come to the same phases, for the same reasons."""
    phases = built(ends)
    progress = Progress(phases=phases)
    found = followed(progress, epochs)
    assert found == sorted(found)
    walked = walk(phases, epochs - 1, epochs * PER_EPOCH - 1, PER_EPOCH)
    assert [(begin, begin.why) for begin in progress.history] == [(begin, begin.why) for begin in walked]
    for begin, end in zip(progress.history, progress.history[1:], strict=False):
        phase = phases[begin[2]]
        by_epochs = phase.epochs is not None and end[0] - begin[0] == phase.epochs and end[1] % PER_EPOCH == 0
        by_steps = phase.steps is not None and end[1] - begin[1] == phase.steps
        assert by_epochs or by_steps
        assert end.why.split()[1].startswith("epoch" if by_epochs else "step")


# All options: what ends a phase, and the values of its metric, one an epoch.

PLATEAUS = st.builds(
    Plateau,
    st.just("x"),
    patience=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0.0, 1.0]),
    min_epochs=st.integers(0, 3),
    threshold=st.none() | st.sampled_from([1.0, 2.0]),
    restore_best=st.booleans(),
)
PHASES = st.lists(
    st.builds(
        Phase,
        st.just("*"),
        epochs=st.none() | st.integers(1, 3),
        steps=st.none() | st.integers(1, 14),
        fraction=st.none() | st.sampled_from([0.1, 1 / 6, 0.2]),
        until=st.none() | PLATEAUS | st.just(UNKNOWN),
    ).filter(lambda phase: phase.has_end),
    min_size=1,
    max_size=5,
)
VALUES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, float("nan"), float("inf")]), min_size=8, max_size=8)
STEPS = 8 * PER_EPOCH


def model(phases: list[Phase], values: list[float], says: set[int]) -> tuple[list[int], list[float | None], int]:
    """Return the phase of each step, the best value at it, and the step at which the fit ends; straightforwardly."""
    index, begin, since = 0, 0, list[float]()
    found, bests = list[int](), list[float | None]()
    shares = [phase.fraction or 0.0 for phase in phases]
    for step in range(STEPS):
        epoch, first = step // PER_EPOCH, begin // PER_EPOCH
        phase = phases[index]
        until = phase.plateau
        if step and step % PER_EPOCH == 0 and until is not None:
            since.append(values[epoch - 1])
        over = phase.epochs is not None and epoch - first >= phase.epochs
        over |= phase.steps is not None and step - begin >= phase.steps
        if phase.fraction is not None:
            border = [round(sum(shares[:n]) * STEPS) for n in (index, index + 1)]
            over |= step - begin >= max(1, border[1] - border[0])
        if until is not None:
            over |= reached(until, since, first) and epoch - first >= until.min_epochs
        elif phase.until is not None:
            over |= step > begin and step in says
        if over and index + 1 == len(phases):
            return found, bests, step
        if over:
            index, begin, since = index + 1, step, []
        found.append(index)
        bests.append(best_of(phases[index].plateau, since))
    return found, bests, STEPS


def finite(values: list[float]) -> list[float]:
    return [value for value in values if value - value == 0]


def best_of(until: Plateau | None, since: list[float]) -> float | None:
    best = None
    for value in finite(since) if until is not None else []:
        sign = 1 if until is not None and until.mode == "min" else -1
        if best is None or sign * (best - value) > (until.min_delta if until is not None else 0):
            best = value
    return best


def reached(until: Plateau, since: list[float], first: int) -> bool:
    """Whether the plateau is reached after any of the values that count: the last early one, and all after it."""
    for count in range(max(1, until.min_epochs), len(since) + 1):
        taken = since[:count]
        better = [n for n in range(count) if best_of(until, taken[: n + 1]) != best_of(until, taken[:n])]
        bad = count - (better[-1] + 1 if better else 0)
        sign = 1 if until.mode == "min" else -1
        good = until.threshold is not None and bool(finite(taken[-1:])) and sign * (until.threshold - taken[-1]) >= 0
        if bad >= until.patience or good:
            return True
    return False


def simulated(
    progress: Progress, values: list[float], says: set[int], begin: int = 0, end: int = STEPS
) -> tuple[list[int], list[float | None], int]:
    """Return the same as ``model`` of a progress that is moved as a fit moves it."""
    found, bests = list[int](), list[float | None]()
    for step in range(begin, end):
        epoch = step // PER_EPOCH
        until = progress.phase.plateau
        if step and step % PER_EPOCH == 0 and until is not None:
            look(progress, values[epoch - 1], epoch - 1)
        asks = progress.phase.until is UNKNOWN and step > progress.history[-1][1] and step in says
        move(progress, epoch, step, "says" if asks else "")
        if progress.ended:
            return found, bests, step
        found.append(progress.index)
        bests.append(progress.plateau.best)
    return found, bests, end


@settings(max_examples=250, deadline=None)
@given(PHASES, VALUES, st.sets(st.integers(0, STEPS)), st.integers(0, STEPS - 1))
def test_a_fit_with_all_options_goes_where_a_plain_model_goes_and_resumes(
    phases: list[Phase], values: list[float], says: set[int], stop: int
) -> None:
    def begin(state: Any) -> Progress:
        at = (0, 0) if state is None else (stop // PER_EPOCH, stop)
        # Another max_epochs does not move what was resolved.
        return begin_or_go_on(phases, None, state, at, PER_EPOCH, STEPS if state is None else 3 * STEPS)

    whole = begin(None)
    found = simulated(whole, values, says)
    assert found == model(phases, values, says)
    half = begin(None)
    first = simulated(half, values, says, 0, stop)
    state = json.loads(json.dumps(half.state_dict(phases)))
    again = begin(state)
    assert again == half
    if not half.ended:
        second = simulated(again, values, says, stop)
        assert (first[0] + second[0], first[1] + second[1], second[2]) == found
        assert again == whole
        assert [begin.why for begin in again.history] == [begin.why for begin in whole.history]


@settings(max_examples=100, deadline=None)
@given(st.lists(ENDS, min_size=1, max_size=5), st.integers(1, 6), st.data())
def test_resumed_at_any_step(ends: Any, epochs: int, data: Any) -> None:
    """From its own state, from that of version 0.1.0, and from none where only epochs and steps end phases."""
    phases, last = built(ends), epochs * PER_EPOCH
    stop = data.draw(st.integers(1, last - 1))
    whole, half = Progress(phases=phases), Progress(phases=phases)
    found = followed(whole, epochs)
    for step in range(stop):
        move(half, step // PER_EPOCH, step)
    saved = half.state_dict(phases)
    old = {**saved, "plateau": {"best": None, "bad": 0, "ended_at": None}}
    at = (stop // PER_EPOCH, stop)
    for state in (saved, {key: old[key] for key in ("history", "plateau", "schedule")}, None):
        resumed = begin_or_go_on(phases, None, state, at, PER_EPOCH)
        assert followed(resumed, epochs, stop) == found[stop:]
        assert resumed.history == whole.history


def test_a_plateau_of_version_0_1_0_that_was_reached_ends_its_phase() -> None:
    phases = [Phase("a", until=Plateau("x")), Phase("b")]
    old = {"history": [[0, 0, 0]], "plateau": {"best": 0.5, "bad": 3, "ended_at": 9}, "unlooked": None}
    progress = Progress.from_state(old)
    progress.phases = phases
    assert progress.over(3, 18) == "its plateau"
    assert progress.told  # its phase had begun


def test_begins_are_tuples_that_say_why(tmp_path: Path) -> None:
    begin = Begin(2, 20, 1, "2 epochs")
    assert begin == (2, 20, 1)
    assert repr(begin) == "(2, 20, 1)"
    assert {begin: 1}[2, 20, 1] == 1
    torch.save(begin, tmp_path / "begin.pt")
    loaded = torch.load(tmp_path / "begin.pt", weights_only=True)
    for one in (copy.deepcopy(begin), copy.copy(begin), pickle.loads(pickle.dumps(begin)), loaded):
        assert one == begin
        assert one.why == "2 epochs"


@pytest.mark.parametrize(
    ("values", "options", "end", "why"),
    [
        ([1.0, 0.9, 0.8], {"patience": 1}, None, ""),
        ([1.0, 1.0], {"patience": 1}, 1, "x had no better value than 1 for 1 look"),
        ([1.0, 0.9, 0.95, 0.85, 0.9, 0.9], {"patience": 2}, 5, "x had no better value than 0.85 for 2 looks"),
        ([0.1, 0.2, 0.2, 0.3], {"patience": 2, "mode": "max"}, None, ""),
        ([0.1, 0.2, 0.2, 0.2], {"patience": 2, "mode": "max"}, 3, "x had no better value than 0.2 for 2 looks"),
        ([1.0, 0.95, 0.91], {"patience": 2, "min_delta": 0.1}, 2, "x had no better value than 1 for 2 looks"),
        ([float("nan"), float("nan")], {"patience": 2}, 1, "x had no finite value for 2 looks"),
        ([1.0, float("-inf"), 0.5], {"patience": 2}, None, ""),
        ([1.0, float("-inf"), 0.5], {"patience": 2, "threshold": 0.7}, 2, "x reached 0.5"),
        ([1.0, 1.0, 0.5, 0.5], {"patience": 1}, 1, "x had no better value than 1 for 1 look"),  # it stays so
        ([0.5, 0.9], {"threshold": 0.9, "mode": "max"}, 1, "x reached 0.9"),
    ],
)
def test_plateaus(values: list[float], options: Any, end: int | None, why: str) -> None:
    watch, ended = PlateauWatch(), None
    for number, value in enumerate(values):
        watch.look(Plateau("x", **options), value)
        ended = number if watch.why and ended is None else ended
    assert (ended, watch.why) == (end, why)


def test_min_epochs_lets_a_later_value_take_a_plateau_back() -> None:
    until = Plateau("x", patience=1, min_epochs=3)
    progress = Progress(phases=[Phase("a", until=until), Phase("b")])
    for epoch, value in enumerate((1.0, 1.0)):
        look(progress, value, epoch)
    assert progress.plateau.why
    assert not progress.over(2, 12)
    look(progress, 0.5, 2)
    assert not progress.over(3, 18)
    look(progress, 0.5, 3)
    assert progress.over(4, 24) == "x had no better value than 0.5 for 1 look"


def test_a_value_not_yet_looked_at_is_saved_and_belongs_to_its_phase() -> None:
    phases = [Phase("a", until=Plateau("x")), Phase("b")]
    kept = {"weight": torch.ones(2)}
    progress = Progress(plateau=PlateauWatch(kept=kept), unlooked=0.25, uncounted=3, asked=True, told=True)
    again = Progress.from_state(progress.state_dict(phases))
    assert again == progress
    assert again.plateau.kept == kept
    again.begin_next(1, 6, "why")
    assert (again.unlooked, again.uncounted, again.asked, again.told) == (None, 3, False, False)
    assert again.plateau == PlateauWatch()
    assert not again.plateau.kept


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 2000))
def test_fractions_that_are_the_whole_fit_are_all_of_its_steps(parts: list[int], total: int) -> None:
    """Whatever rounding does; in a fit too short for that each phase has a step."""
    phases = [Phase("*", fraction=part / sum(parts)) for part in parts]
    steps = [phase.steps or 0 for phase in planned(phases, total)]
    assert min(steps) >= 1
    exact = [total * part / sum(parts) for part in parts]
    if min(exact) >= 1:
        assert sum(steps) == total
        assert all(abs(one - wanted) <= 1 for one, wanted in zip(steps, exact, strict=True))


def test_a_dry_run_lasts_a_step_a_phase_and_does_not_end_the_fit() -> None:
    phases = [Phase("a", epochs=3, until=Plateau("x")), Phase("b", fraction=0.5, lr_scale=0.1), Phase("c", steps=7)]
    assert planned(phases, None, dry_run=True) == (
        Phase("a", steps=1),
        Phase("b", steps=1, lr_scale=0.1),
        Phase("c"),
    )


def test_where_a_fit_goes_on() -> None:
    phases, other = [Phase("a", epochs=2), Phase("b")], [Phase("a", epochs=1), Phase("b")]
    before = Progress([Begin(0, 0, 0), Begin(1, 4, 1)])
    # The same schedule's own state comes first, then the fit before, then what epochs and steps say.
    state = Progress([Begin(0, 0, 0)]).state_dict(phases)
    assert begin_or_go_on(phases, before, state, (1, 6), None).history == [(0, 0, 0)]
    assert begin_or_go_on(other, before, state, (1, 6), None) is before
    assert begin_or_go_on(other, None, state, (1, 6), PER_EPOCH).history == [(0, 0, 0), (1, 6, 1)]
    assert begin_or_go_on(phases, before, None, (0, 3), PER_EPOCH).history == [(0, 0, 0)]  # went back
    # What only a plateau ends counts as over where a checkpoint of another schedule was past it.
    waits = [Phase("a", until=Plateau("x")), Phase("b", until=Plateau("x")), Phase("c")]
    past = Progress([Begin(0, 0, 0), Begin(3, 18, 1)]).state_dict(phases)
    assert begin_or_go_on(waits, None, past, (4, 24), PER_EPOCH).index == 1
