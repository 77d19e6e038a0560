from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze import Phase, Ramp
from lightning_freeze.schedule.length import planned_length
from lightning_freeze.schedule.rates import Length, planned_factor

FACTORS = st.floats(1e-4, 1e3)


@given(start=FACTORS, end=FACTORS, shape=st.sampled_from(["linear", "exponential", "cosine"]), steps=st.integers(1, 50))
def test_a_ramp_goes_one_way_from_its_start_to_its_end(start: float, end: float, shape: Any, steps: int) -> None:
    ramp = Ramp(start, end, shape=shape, steps=steps)
    seen = [planned_factor(ramp, step, Length()) for step in range(steps + 3)]
    assert seen[0] == ramp.start
    assert seen[steps:] == [ramp.end] * 3
    rounding = 1e-12 * max(start, end)
    for one, other in pairwise(seen):
        assert (other - one) * (1 if end >= start else -1) >= -rounding
    if shape == "exponential":
        ratio = (end / start) ** (1 / steps)
        assert seen[1 : steps + 1] == pytest.approx([one * ratio for one in seen[:steps]])


@pytest.mark.parametrize(
    ("phase", "limits", "expected"),
    [
        (Phase("*", epochs=2), {"epoch": 10}, 17),  # what is left of its first epoch, and another
        (Phase("*", epochs=2), {"epoch": 10, "total": 20}, 7),
        (Phase("*", epochs=2), {"total": 50}, None),
        (Phase("*", steps=5, epochs=2), {"epoch": 10, "total": 90}, 5),
        (Phase("*", steps=5, epochs=2), {"total": 90}, 5),
        (Phase("*", steps=5), {}, 5),
        (Phase("*"), {"epoch": 10, "total": 30}, 17),
        (Phase("*"), {"epoch": 10}, None),
    ],
)
def test_a_phase_lasts_until_the_first_of_its_ends(phase: Phase, limits: Any, expected: int | None) -> None:
    assert planned_length(phase, (1, 13), **limits).phase == expected


def test_earlier_epochs_of_another_length_do_not_count() -> None:
    """It begins with the third epoch; the two before it had four steps each, and those from here on eight."""
    assert planned_length(Phase("*", epochs=2), (2, 8), epoch=8).phase == 16
