"""The door to Lightning: both packages at once, one alone, and versions that are too old."""

from __future__ import annotations

import logging
import os
import runpy
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torchmetrics
from lightning_utilities.core import rank_zero

from lightning_freeze import AuditError, FreezeSchedule, Phase, _lightning
from tests import main_job

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
both = pytest.mark.skipif(
    os.environ.get("NAMESPACE") == "pytorch_lightning"
    or not all(find_spec(name.partition(".")[0]) for name in PACKAGES),
    reason="One of the packages is not installed, or has the other's name.",
)


def door() -> dict[str, Any]:
    """What the door would be, were it imported now."""
    return runpy.run_path(_lightning.__file__, run_name="door")


@both
def test_both_packages_do_the_main_jobs_and_come_to_the_same_bits() -> None:
    ours, theirs = ({**main_job.run(name, quiet=True)[0]} for name in PACKAGES)
    assert len(ours) == len(theirs) == sum(not name.startswith("_") for name in vars(main_job.Jobs))
    assert {job for job in ours if main_job.differ(ours[job], theirs[job])} == set()
    assert sum(bool(weights) for weights in ours.values()) > 10


@both
@pytest.mark.parametrize("name", PACKAGES)
def test_what_is_checked_for_is_found_in_both_packages(name: str) -> None:
    pl = import_module(name)
    assert isinstance(FreezeSchedule([Phase("*")]), pl.Callback)
    assert issubclass(AuditError, import_module(f"{name}.utilities.exceptions").MisconfigurationException)
    for kind in ("DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy", "Strategy"):
        assert getattr(import_module(f"{name}.strategies"), kind) in vars(_lightning)[kind]
    for kind in ("BaseFinetuning", "EarlyStopping", "StochasticWeightAveraging"):
        assert getattr(import_module(f"{name}.callbacks"), kind) in vars(_lightning)[kind]


@both
@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_is_quiet_when_it_is_told_to_be(name: str) -> None:
    """They share one logger, which the last that is imported makes its own."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    levels = {package: logging.getLogger(package).level for package in PACKAGES}
    rank_zero.log.addHandler(handler)
    try:
        for package in PACKAGES:
            logging.getLogger(package).setLevel(logging.INFO)
        rank_zero.rank_zero_info("heard")
        logging.getLogger(name).setLevel(logging.ERROR)
        rank_zero.rank_zero_info("not heard")
    finally:
        rank_zero.log.removeHandler(handler)
        for package, level in levels.items():
            logging.getLogger(package).setLevel(level)
    assert lines == ["heard"]


@pytest.mark.parametrize("old", ["none", "2.5.2"])
@pytest.mark.parametrize("alone", ["lightning", "pytorch-lightning"])
def test_one_package_is_enough(monkeypatch: pytest.MonkeyPatch, alone: str, old: str) -> None:
    """The other one may be too old: ``lightning`` depends on any ``pytorch-lightning``."""

    def version(name: str) -> str:
        if name == alone:
            return "2.5.3"
        if old == "none":
            raise metadata.PackageNotFoundError(name)
        return old

    monkeypatch.setattr(metadata, "version", version)
    (base,) = door()["Callback"].__bases__
    assert base.__module__.startswith(alone.replace("-", "_"))


def test_a_lightning_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.5.2")
    with pytest.raises(ImportError, match=r"needs Lightning 2\.5\.3 or later: pip install 'lightning>=2\.5\.3'"):
        door()


@pytest.mark.parametrize(("module", "old", "needed"), [(torch, "2.5.1+cpu", "2.6"), (torchmetrics, "1.3.2", "1.4")])
def test_versions_that_are_too_old_are_refused(
    monkeypatch: pytest.MonkeyPatch, module: Any, old: str, needed: str
) -> None:
    monkeypatch.setattr(module, "__version__", old)
    with pytest.raises(ImportError, match=rf"needs {module.__name__} {needed} or later, not {old[:5]}"):
        door()
