from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_freeze import Phase, Plateau
from lightning_freeze.schedule.phases import as_phases, describe
from lightning_freeze.schedule.progress import walk

ends = st.tuples(st.none() | st.integers(1, 4), st.none() | st.integers(1, 17)).filter(any)


@settings(max_examples=200, deadline=None)
@given(st.lists(ends, min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 8))
def test_walk_is_exact_in_one_unit_without_steps_per_epoch(lengths: Any, each: int, epochs: int) -> None:
    """It is exact in the first epoch, the only one in which nothing is known, and where all phases end in one unit."""
    phases = [Phase("*", epochs=e, steps=s) for e, s in lengths]
    one_unit = all(phase.steps is None for phase in phases) or all(phase.epochs is None for phase in phases)
    for step in range(epochs * each):
        if step < each or one_unit:
            assert walk(phases, step // each, step, None)[-1][2] == walk(phases, step // each, step, each)[-1][2]


@given(st.integers(0, 3))
def test_walk_passes_only_plateaus_that_were_passed(passed: int) -> None:
    phases = [Phase("*", until=Plateau("x")) for _ in range(4)]
    guess = lambda begin: (begin[1], begin[0], "") if begin[2] < passed else None  # noqa: E731
    assert walk(phases, 5, 50, 10, guess)[-1][2] == passed
    mixed = [Phase("*", until=Plateau("x"), epochs=3), Phase("*")]
    assert walk(mixed, 2, 20, 10, lambda begin: (begin[1], begin[0], ""))[-1][2] == 0
    assert walk(mixed, 3, 30, 10)[-1] == (3, 30, 1)


phase_options = st.fixed_dictionaries(
    {"train": st.sampled_from(["head", ["head", "!x"], "*"])},
    optional={
        "name": st.sampled_from(["first", None]),
        "epochs": st.integers(1, 5),
        "steps": st.integers(1, 5),
        "until": st.sampled_from([Plateau("x"), {"monitor": "x", "mode": "max"}]),
        "lr_scale": st.sampled_from([0.1, 2, {"head": 0.5}, None]),
    },
)


@given(st.lists(phase_options, min_size=1, max_size=4))
def test_phases_from_dicts_equal_phases_and_survive_json(options: list[dict[str, Any]]) -> None:
    for one in options[:-1]:
        one.setdefault("epochs", 1)
    phases = as_phases(options)
    built = [
        Phase(**{**one, "until": Plateau(**one["until"]) if isinstance(one.get("until"), dict) else one.get("until")})
        for one in options
    ]
    assert phases == tuple(built) == as_phases(built)
    described = describe(phases)
    assert json.loads(json.dumps(described)) == described == describe(pickle.loads(pickle.dumps(phases)))
    assert [phase.has_end for phase in phases[:-1]] == [True] * (len(phases) - 1)


def test_numpy_numbers_in_phases_load_with_weights_only(tmp_path: Path) -> None:
    """A checkpoint holds them, and loads with `weights_only=True`."""
    until = Plateau("x", patience=np.int64(2), min_delta=np.float64(0.5))
    phases = [Phase("a", epochs=np.int64(3), steps=np.uint8(4), until=until, lr_scale=np.float32(0.5))]
    assert [type(v) for v in (phases[0].epochs, phases[0].steps, until.patience, until.min_delta)] == [int] * 3 + [
        float
    ]
    torch.save(describe(phases), tmp_path / "phases.pt")
    assert torch.load(tmp_path / "phases.pt", weights_only=True) == describe(phases)
    with pytest.raises(TypeError, match="epochs is a whole number"):
        Phase("a", epochs=np.float64(2))


def test_phase_is_immutable_and_takes_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Phase("head").epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Phase("head", 3)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: Phase("head", 2),
            r"Phase\('head', 2\): only train can be positional\. Write other options by name: ",
        ),
        (
            lambda: Phase("head", lr=0.1),
            r"Phase has no option 'lr'\. The learning rate stays your optimizer's; lr_scale",
        ),
        (lambda: Phase("head", epoch=2), r"Phase has no option 'epoch'\. Did you mean 'epochs'\?"),
        (lambda: Plateau("loss", patiance=2), r"Plateau has no option 'patiance'\. Did you mean 'patience'\?"),
    ],
)
def test_slips_in_arguments_are_errors_with_the_right_name(build: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        build()


def test_lr_scale_as_number_or_mapping() -> None:
    assert Phase("*").scales == {}
    assert Phase("*", lr_scale=0.1).scales == {"*": 0.1}
    assert Phase("*", lr_scale={"head": 2}).scales == {"head": 2}


def test_describe_and_repr_show_a_function_by_its_name() -> None:
    assert describe([Phase(lambda n, p: True)])[0]["train"].endswith("<lambda>")
    assert repr(Phase("*", until=is_over)) == "Phase(train='*', until=is_over)"


def is_over(trainer: Any, pl_module: Any) -> bool:
    return True
