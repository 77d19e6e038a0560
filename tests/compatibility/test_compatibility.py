"""A sample of docs/compatibility.md: pairwise in every run, all rows in the sweep."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tests.compatibility.check import Case, check
from tests.compatibility.columns import optimizer_row, scheduler_row
from tests.compatibility.models import TIMM, check_model, timm_model, torchvision_model, torchvision_names
from tests.compatibility.optimizers import PACKAGES, names, of
from tests.compatibility.pairs import all_pairs
from tests.compatibility.schedulers import SCHEDULERS

pytestmark = pytest.mark.filterwarnings("ignore")

FACTORS = {
    "optimizer": ["torch: AdamW", "torch: SGD", "torch: Muon", "torch: AdamW(fused=True)"],
    "scheduler": [
        *("none", "OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "SequentialLR", "ChainedScheduler"),
        *("ReduceLROnPlateau", "LambdaLR", "a user's own, of LRScheduler", "a user's own, of no class"),
    ],
    "precision": ["32-true", "bf16-mixed", "bf16-true"],
    "accumulate": [1, 2],
    "clip": ["none", "norm", "value"],
    "manual": [False, True],
    "schedule": ["plain", "scaled", "adopted"],
}
EVERYTHING = {**FACTORS, "optimizer": names("torch"), "scheduler": list(SCHEDULERS)}
# What is refused at fit start, and what cannot work; docs/compatibility.md has the sentences.
REFUSED = {"torch: LBFGS"}
FAILS = {
    *("timm: adahessian", "sgd-sai: SGD_sai"),
    *(f"pytorch-optimizer: {name}" for name in ("ASGD", "LoRARite", "Magma", "TRAC")),
    *(f"schedulefree: {name}ScheduleFreeClosure" for name in ("AdamW", "RAdam", "SGD")),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def cases(factors: dict[str, list[object]]) -> list[Case]:
    return [Case(**row) for row in all_pairs(factors)]


@pytest.mark.parametrize("case", cases(FACTORS), ids=str)
def test_every_pair_of_options_works_together(case: Case) -> None:
    outcome = check(case)
    assert outcome.status in ("works", "itself"), outcome.reason


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(EVERYTHING), ids=str)
def test_sweep_of_pairs(case: Case) -> None:
    outcome = check(case)
    allowed = {"works", "itself"} | ({"refused"} if case.optimizer in REFUSED else set())
    assert outcome.status in allowed, outcome.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_sweep_of_optimizers(name: str) -> None:
    for column, outcome in optimizer_row(name).items():
        assert outcome.status != "fails" or name in FAILS, (column, outcome.reason)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_sweep_of_packages(package: str) -> None:
    if of(package) is None:
        pytest.skip("not installed here")
    assert names(package)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_sweep_of_schedulers(name: str) -> None:
    """With ReduceLROnPlateau a resumed run differs without the schedule, too."""
    allowed = ["works", "itself"] if name == "ReduceLROnPlateau" else ["works"]
    assert {outcome.status for outcome in scheduler_row(name).values()} <= set(allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision_names())
def test_sweep_of_torchvision(name: str) -> None:
    outcome = check_model(partial(torchvision_model, name))
    assert outcome.status in ("works", "selected"), outcome.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_sweep_of_timm(name: str) -> None:
    outcome = check_model(partial(timm_model, name))
    assert outcome.status in ("works", "selected"), outcome.reason


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1"])
def test_a_network_of_torchvision(name: str) -> None:
    assert check_model(partial(torchvision_model, name)).status == "works"


def test_pairs_are_all_there() -> None:
    rows = all_pairs(FACTORS)
    assert len(rows) < 1.3 * len(FACTORS["optimizer"]) * len(FACTORS["scheduler"])
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(FACTORS[a], FACTORS[b]))


class _Drifts(torch.optim.SGD):
    """Moves what has no gradient, too late to be seen at fit start."""

    steps = 0

    def step(self, closure: object = None) -> object:  # type: ignore[override]
        result = super().step(closure)  # type: ignore[arg-type]
        self.steps += 1
        for group in self.param_groups if self.steps > 3 else ():
            for p in group["params"]:
                p.data.add_(0.001)
        return result


def test_an_optimizer_that_moves_what_is_frozen_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(of("torch"), "Drifts", _Drifts)  # type: ignore[arg-type]
    outcome = check(Case("torch: Drifts"))
    assert outcome.status == "fails"
    assert outcome.reason.startswith("moves although frozen in phase 3: net.backbone")


class _Forgets(torch.optim.SGD):
    """Counts in an attribute, which no state_dict has, and steps by that."""

    steps = 0

    def step(self, closure: object = None) -> object:  # type: ignore[override]
        self.steps += 1
        self.param_groups[0]["lr"] = 0.01 / self.steps
        return super().step(closure)  # type: ignore[arg-type]


def test_one_that_forgets_is_said_to_do_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(of("torch"), "Forgets", _Forgets)  # type: ignore[arg-type]
    outcome = check(Case("torch: Forgets"))
    assert (outcome.status, outcome.reason) == ("itself", "a resumed run differs without the schedule, too")
