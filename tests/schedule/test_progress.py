"""Which phase holds, as pure data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_freeze import Phase, Plateau
from lightning_freeze.schedule.progress import PlateauWatch, Progress, begin_or_go_on, walk

PER_EPOCH = 6
ENDS = st.tuples(st.none() | st.integers(1, 3), st.none() | st.integers(1, 14)).filter(any)


def built(ends: Any) -> list[Phase]:
    return [Phase(f"layer{index}", epochs=e, steps=s) for index, (e, s) in enumerate(ends)]


def followed(phases: list[Phase], epochs: int, progress: Progress, begin: int = 0) -> list[int]:
    """Advance as a fit does, before each step; return the phase of each step from ``begin`` on."""
    found = []
    for step in range(begin, epochs * PER_EPOCH):
        progress.advance(phases, step // PER_EPOCH, step)
        found.append(progress.index)
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(ENDS, min_size=1, max_size=5), st.integers(1, 8))
def test_a_fit_walks_where_the_schedule_says(ends: Any, epochs: int) -> None:
    """Step by step, and at once, come to the same phases."""
    phases, progress = built(ends), Progress()
    found = followed(phases, epochs, progress)
    assert found == sorted(found)
    assert progress.history == walk(phases, epochs - 1, epochs * PER_EPOCH - 1, PER_EPOCH)
    for begin, end in zip(progress.history, progress.history[1:], strict=False):
        phase = phases[begin[2]]
        by_epochs = phase.epochs is not None and end[0] - begin[0] == phase.epochs and end[1] % PER_EPOCH == 0
        by_steps = phase.steps is not None and end[1] - begin[1] == phase.steps
        assert by_epochs or by_steps


@settings(max_examples=100, deadline=None)
@given(st.lists(ENDS, min_size=1, max_size=5), st.integers(1, 6), st.data())
def test_resumed_at_any_step(ends: Any, epochs: int, data: Any) -> None:
    """From its own state, and from none where only epochs and steps end phases."""
    phases, last = built(ends), epochs * PER_EPOCH
    stop = data.draw(st.integers(1, last - 1))
    whole, half = Progress(), Progress()
    found = followed(phases, epochs, whole)
    for step in range(stop):
        half.advance(phases, step // PER_EPOCH, step)
    saved = half.state_dict(phases)
    at = (stop // PER_EPOCH, stop)
    for state in (saved, {key: saved[key] for key in ("history", "plateau", "schedule")}, None):
        resumed = begin_or_go_on(phases, None, state, at, lambda: PER_EPOCH)
        assert followed(phases, epochs, resumed, stop) == found[stop:]
        assert resumed.history == whole.history


def test_is_due_is_asked_before_advance() -> None:
    """The cheap question never misses a phase that steps or a plateau end."""
    phases = [Phase("a", steps=2), Phase("b", epochs=1), Phase("c", until=Plateau("x", patience=1)), Phase("d")]
    progress = Progress()
    assert [progress.is_due(phases, step) for step in range(4)] == [False, False, True, True]
    assert progress.advance(phases, 0, 2)
    assert not progress.is_due(phases, 90)  # epochs end where epochs begin
    assert progress.advance(phases, 1, 6)
    assert not progress.is_due(phases, 90)
    for value in (1.0, 2.0):
        progress.plateau.look(phases[2].until, value, 9)  # type: ignore[arg-type]
    assert progress.is_due(phases, 9)
    assert not progress.advance(phases, 1, 9, plateau=False)
    assert progress.advance(phases, 1, 9)
    assert progress.index == 3
    assert progress.plateau == PlateauWatch()


@pytest.mark.parametrize(
    ("values", "options", "ended"),
    [
        ([1.0, 0.9, 0.8], {"patience": 1}, None),
        ([1.0, 1.0], {"patience": 1}, 1),
        ([1.0, 0.9, 0.95, 0.85, 0.9, 0.9], {"patience": 2}, 5),
        ([0.1, 0.2, 0.2, 0.3], {"patience": 2, "mode": "max"}, None),
        ([0.1, 0.2, 0.2, 0.2], {"patience": 2, "mode": "max"}, 3),
        ([1.0, 0.95, 0.91], {"patience": 2, "min_delta": 0.1}, 2),
        ([float("nan"), float("nan")], {"patience": 2}, 1),
        ([1.0, float("-inf"), 0.5], {"patience": 2}, None),
        ([1.0, 1.0, 0.5, 0.5], {"patience": 1}, 1),  # once reached it stays so
    ],
)
def test_plateaus(values: list[float], options: Any, ended: int | None) -> None:
    watch = PlateauWatch()
    for step, value in enumerate(values):
        watch.look(Plateau("x", **options), value, step)
    assert watch.ended_at == ended
    assert watch.ended == (ended is not None)


def test_a_value_not_yet_looked_at_is_saved_and_belongs_to_its_phase() -> None:
    phases = [Phase("a", until=Plateau("x")), Phase("b")]
    progress = Progress(unlooked=0.25, uncounted=3)
    again = Progress.from_state(progress.state_dict(phases))
    assert again == progress
    again.plateau.ended_at = 1
    assert again.advance(phases, 1, 6)
    assert (again.unlooked, again.uncounted) == (None, 3)


def test_where_a_fit_goes_on() -> None:
    phases, other = [Phase("a", epochs=2), Phase("b")], [Phase("a", epochs=1), Phase("b")]
    before = Progress([(0, 0, 0), (1, 4, 1)])
    unknown: Any = lambda: None  # noqa: E731
    # The same schedule's own state comes first, then the fit before, then what epochs and steps say.
    state = Progress([(0, 0, 0)]).state_dict(phases)
    assert begin_or_go_on(phases, before, state, (1, 6), unknown).history == [(0, 0, 0)]
    assert begin_or_go_on(other, before, state, (1, 6), unknown) is before
    assert begin_or_go_on(other, None, state, (1, 6), lambda: PER_EPOCH).history == [(0, 0, 0), (1, 6, 1)]
    assert begin_or_go_on(phases, before, None, (0, 3), lambda: PER_EPOCH).history == [(0, 0, 0)]  # went back
    # What only a plateau ends counts as over where a checkpoint of another schedule was past it.
    waits = [Phase("a", until=Plateau("x")), Phase("b", until=Plateau("x")), Phase("c")]
    past = Progress([(0, 0, 0), (3, 18, 1)]).state_dict(phases)
    assert begin_or_go_on(waits, None, past, (4, 24), lambda: PER_EPOCH).index == 1
