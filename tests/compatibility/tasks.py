"""Rows of all tables as tasks, each in its time, with results in a file of JSON lines that a later run goes on with."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.compatibility.check import Outcome
from tests.compatibility.columns import optimizer_row, scheduler_row
from tests.compatibility.models import TIMM, check_model, timm_model, torchvision_model, torchvision_names
from tests.compatibility.optimizers import PACKAGES, names
from tests.compatibility.schedulers import SCHEDULERS

SECONDS = float(os.environ.get("LF_SECONDS", "300"))  # of the processor's time for a row

Results = dict[str, dict[str, Outcome]]


class OutOfTime(BaseException):
    """A row takes too long."""


def tasks() -> list[str]:
    """``kind|name`` of all rows."""
    found = [f"scheduler|{name}" for name in SCHEDULERS]
    small_first = sorted(PACKAGES, key=lambda package: len(names(package)))
    found += [f"optimizer|{name}" for package in small_first for name in names(package)]
    found += [f"model|timm: {name}" for name in TIMM]
    return [*found, *(f"model|torchvision: {name}" for name in torchvision_names())]


def run(task: str) -> dict[str, Outcome]:
    """Run one row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kind, _, name = task.partition("|")

    def stop(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        if kind == "scheduler":
            return scheduler_row(name)
        if kind == "optimizer":
            return optimizer_row(name)
        package, _, model = name.partition(": ")
        return {"": check_model(partial(timm_model if package == "timm" else torchvision_model, model))}
    except OutOfTime:
        return {"": Outcome("too slow", f"a few small steps took more than {SECONDS:.0f} s of a CPU")}
    except Exception as error:  # a fault of the checks themselves
        return {"": Outcome("fails", f"{type(error).__name__}: {error}")}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def load(path: Path) -> Results:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {task: {column: Outcome(*outcome) for column, outcome in row.items()} for task, row in rows}


def run_all(path: Path, jobs: int, only: str = "") -> Results:
    """Run the rows that are not in the file yet, and return all."""
    known = load(path)
    todo = [task for task in tasks() if task not in known and only in task]
    with ProcessPoolExecutor(jobs, max_tasks_per_child=None) as pool, path.open("a", encoding="utf-8") as file:
        futures = {pool.submit(run, task): task for task in todo}
        for number, future in enumerate(as_completed(futures), 1):
            task, row = futures[future], future.result()
            known[task] = row
            file.write(json.dumps([task, {column: [o.status, o.reason] for column, o in row.items()}]) + "\n")
            file.flush()
            print(
                f"{number}/{len(todo)} {task}: {', '.join(sorted({o.status for o in row.values()}))}", file=sys.stderr
            )
    return known
