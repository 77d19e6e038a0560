"""A schedule as a table, without training, and as the code that makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.optim import Optimizer

from lightning_freeze.freezing.batchnorm import has_running_statistics
from lightning_freeze.freezing.optimizers import OptimizerState
from lightning_freeze.freezing.trial import state_bytes
from lightning_freeze.functional import scalars, topmost
from lightning_freeze.names import runs
from lightning_freeze.schedule.forecast import made_optimizers
from lightning_freeze.schedule.phases import Plateau, function_name
from lightning_freeze.schedule.plan import Factor, Part, Plan
from lightning_freeze.schedule.rates import Ramp
from lightning_freeze.selectors import selector_text
from lightning_freeze.tables import Table, in_bytes
from lightning_freeze.words import listed, percent

if TYPE_CHECKING:
    from lightning_freeze.schedule.callback import FreezeSchedule

_WIDTH = 100

# An optimizer, or what makes one of parameters.
OptimizerLike: TypeAlias = Optimizer | Callable[[Any], Optimizer]


def schedule_text(schedule: FreezeSchedule) -> str:
    """Return the code that makes a schedule, on one line if that is short."""
    defaults = {"frozen_mode": "batchnorm", "optimizer_state": "keep", "verbose": True}
    given = {name: getattr(schedule, name) for name in defaults}
    options = "".join(f", {name}={value!r}" for name, value in given.items() if value != defaults[name])
    text = f"{schedule.phases!r}{options}"
    if schedule.phases and len(text) > _WIDTH:
        text = "[\n" + "".join(f"    {phase!r},\n" for phase in schedule.phases) + f"]{options}"
    return f"{type(schedule).__name__}({text})"


def preview_table(plan: Plan, policy: OptimizerState = "keep", optimizer: OptimizerLike | None = None) -> Table:
    """Return a row for each phase: what trains, when, how much that is, at which rates, and the memory it takes.

    Without ``optimizer`` it is that of the module, and none if the module does not say.
    """
    layers = {layer for layer in plan.model.modules() if has_running_statistics(layer)}
    counts = [sum(scalars(plan.parameters[name]) for name in part.factors) for part in plan.parts]
    total, unit = sum(map(scalars, plan.parameters.values())), _unit(plan)
    columns = {
        "phase": [f"{part.number} {part.phase.name or ''}".rstrip() for part in plan.parts],
        "trains": [selected_text(part.phase.train) for part in plan.parts],
        f"{unit}s": [_when(part, plan.length.per_epoch if unit == "epoch" else 1) for part in plan.parts],
        "parameters": [f"{count:,}" for count in counts],
        "share": [percent(count, total) for count in counts],
        "lr scale": [scales_text(part.factors.values()) for part in plan.parts],
    }
    if layers:
        columns["frozen BN"] = [f"{len(part.in_eval & layers)}/{len(layers)}" for part in plan.parts]
    size = {name: scalars(parameter) * parameter.dtype.itemsize for name, parameter in plan.parameters.items()}
    columns["gradients"] = [in_bytes(sum(map(size.__getitem__, part.factors))) for part in plan.parts]
    if (states := _state_bytes(plan, _optimizers(plan, optimizer))) is not None:
        columns["optimizer"] = list(map(in_bytes, _kept(plan, policy, states)))
    return Table(tuple(columns), list(zip(*columns.values(), strict=True)), tuple(_notes(plan)), _WIDTH)


def scales_text(factors: Iterable[Factor]) -> str:
    """Return learning rate scales in a few characters: ``0.1→1`` of a ramp, ``0.12 … 1`` of many."""
    different = sorted({(one.end, one.start) if isinstance(one, Ramp) else (one, one) for one in factors})
    if len(different) <= 2:
        return ", ".join(f"{end:.3g}" if start == end else f"{start:.3g}→{end:.3g}" for end, start in different)
    values = list(chain.from_iterable(different))
    return f"{min(values):.2g} … {max(values):.2g}"


def selected_text(select: Any) -> str:
    """Return a selector as text, names that count up as one."""
    is_names = isinstance(select, list | tuple) and all(isinstance(one, str) for one in select)
    return ", ".join(runs(select)) if is_names else selector_text(select)


def _optimizers(plan: Plan, optimizer: OptimizerLike | None) -> list[Optimizer]:
    """Return the optimizer that is given, else those of the Trainer, else what ``configure_optimizers`` makes."""
    if optimizer is not None:
        return [optimizer if isinstance(optimizer, Optimizer) else optimizer(list(plan.parameters.values()))]
    return (plan.trainer and plan.trainer.optimizers) or made_optimizers(plan)[0]


def _state_bytes(plan: Plan, optimizers: list[Optimizer]) -> dict[str, tuple[int, int]] | None:
    """Return the bytes of optimizer state for each parameter, before and after it is stepped; None if unknown."""
    if not optimizers:
        return None
    groups = {id(p): (one, group) for one in optimizers for group in one.param_groups for p in group["params"]}
    first = optimizers[0], optimizers[0].param_groups[0]  # takes what no optimizer was given
    trained = {name for part in plan.parts for name in part.factors}
    asked: dict[Any, tuple[int, int] | None] = {}
    found: dict[str, tuple[int, int]] = {}
    with plan.ledger.steps.paused() if plan.ledger is not None else nullcontext():  # throw-away optimizers step
        for name, parameter in plan.parameters.items():
            if not scalars(parameter) or (name not in trained and id(parameter) not in groups):
                continue
            one, group = groups.get(id(parameter), first)
            key = (id(group), parameter.shape, parameter.dtype)
            if key not in asked:
                asked[key] = state_bytes(one, group, parameter)
            if (answer := asked[key]) is None:
                return None
            found[name] = answer
    return found


def _kept(plan: Plan, policy: OptimizerState, states: Mapping[str, tuple[int, int]]) -> Iterator[int]:
    """Yield the bytes of optimizer state on the device in each phase."""
    so_far: set[str] = set()
    for part in plan.parts:
        so_far |= part.factors.keys()
        if policy == "keep":
            yield sum(stepped if name in so_far else built for name, (built, stepped) in states.items())
        else:
            yield sum(states[name][1] for name in part.factors if name in states)


def _unit(plan: Plan) -> str:
    """Return the unit in which no two phases look alike: steps, if several begin in one epoch."""
    begins = [int(part.begin / plan.length.size) for part in plan.reached]
    return plan.length.unit if len(set(begins)) == len(begins) or not plan.length.knows("step") else "step"


def _when(part: Part, size: float) -> str:
    """Return the epochs, or the steps, of a phase as text; ``size`` is how many steps one of the unit takes."""
    if part.begin == part.end:
        return "never"
    first, last = int(part.begin / size), math.ceil(part.end / size) - 1
    text = f"{first}-{last}" if last > first else f"{first}"
    return f"{text} or until" if part.phase.until is not None else text


def _notes(plan: Plan) -> Iterator[str]:
    """Yield what no row says."""
    for part in plan.reached:
        if (until := (phase := part.phase).until) is not None:
            what = f"{until.monitor} plateaus" if isinstance(until, Plateau) else f"{function_name(until)}() is true"
            is_guess = part is not plan.parts[-1] and not (phase.epochs or phase.steps or phase.fraction)
            sure = "how long that takes is a guess" if is_guess else "at most as long as shown"
            yield f"Phase {part.number} lasts until {what}: {sure}."
    if never := [part.number for part in plan.parts if part.begin == part.end]:
        yield f"The fit ends before phase {never[0]}{f' to {never[-1]}' * (len(never) > 1)} would begin."
    length = plan.length
    if plan.end < length.total:
        end, total = plan.end / length.size, length.total / length.size
        yield f"The fit ends with the last phase, after {end:g} of {total:g} {length.unit}s."
    trains = {name for part in plan.reached for name in part.factors}
    if frozen := {name: p for name, p in plan.parameters.items() if name not in trains}:
        names = runs(topmost(plan.model, set(map(id, frozen.values()))))
        yield f"Never trains: {listed(names, most=8)} ({sum(map(scalars, frozen.values())):,} parameters)."
