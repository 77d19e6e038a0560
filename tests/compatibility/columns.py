"""The columns of the tables: what is checked of each optimizer and of each scheduler."""

from __future__ import annotations

from dataclasses import replace

from tests.compatibility.check import Case, Outcome, check

# Columns that are run together; where a run does not work, each of its columns is run alone to see which one it is.
OPTIMIZER_RUNS: list[dict[str, dict[str, object]]] = [
    {
        "lr_scale": {"schedule": "scaled"},
        "accumulated": {"accumulate": 2},
        "clipped by norm": {"clip": "norm"},
    },
    {"not given": {"schedule": "adopted"}},
    {"bf16-mixed": {"precision": "bf16-mixed"}},
    {"bf16-true": {"precision": "bf16-true"}},
    {"manual": {"manual": True}, "clipped by value": {"clip": "value"}},
]
SCHEDULER_RUNS: list[dict[str, dict[str, object]]] = [
    {"AdamW": {"optimizer": "torch: AdamW"}},
    {"SGD": {"optimizer": "torch: SGD"}},
    {"lr_scale": {"schedule": "scaled"}, "accumulated": {"accumulate": 2}, "clipped": {"clip": "norm"}},
    {"not given": {"schedule": "adopted"}},
    {"bf16-mixed": {"precision": "bf16-mixed"}},
    {"manual": {"manual": True}},
]

Row = dict[str, Outcome]


def columns(runs: list[dict[str, dict[str, object]]]) -> list[str]:
    return [column for run in runs for column in run]


def row(case: Case, runs: list[dict[str, dict[str, object]]]) -> Row:
    """Run a row of a table."""
    found: Row = {}
    for run in runs:
        together: dict[str, object] = {}
        for options in run.values():
            together |= options
        outcome = check(replace(case, **together))  # type: ignore[arg-type]
        if outcome.status == "works" or len(run) == 1:
            found |= dict.fromkeys(run, outcome)
            continue
        alone = {column: check(replace(case, **options)) for column, options in run.items()}  # type: ignore[arg-type]
        if all(one.status == "works" for one in alone.values()):
            alone = dict.fromkeys(run, Outcome(outcome.status, f"only together: {outcome.reason}"))
        found |= alone
    return found


def optimizer_row(name: str) -> Row:
    return row(Case(optimizer=name), OPTIMIZER_RUNS)


def scheduler_row(name: str) -> Row:
    return row(Case(scheduler=name), SCHEDULER_RUNS)
