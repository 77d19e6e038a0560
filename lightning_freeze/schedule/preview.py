"""A schedule as a table, without training, and as the code that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.optim import Optimizer

from lightning_freeze.freezing.holder import ledger_of
from lightning_freeze.freezing.optimizers import OptimizerState
from lightning_freeze.freezing.trial import state_bytes
from lightning_freeze.functional import scalars, topmost
from lightning_freeze.names import runs
from lightning_freeze.schedule.forecast import made_optimizers
from lightning_freeze.schedule.phases import Plateau, function_name
from lightning_freeze.schedule.plan import Factor, Plan, running_statistics, trainer_of
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
    phases = list(map(repr, schedule.phases)) if schedule.phases else []
    defaults = {"frozen_mode": "batchnorm", "optimizer_state": "keep", "verbose": True}
    given = {name: getattr(schedule, name) for name in defaults}
    options = "".join(f", {name}={value!r}" for name, value in given.items() if value != defaults[name])
    text = (f"[{', '.join(phases)}]" if phases else repr(schedule.phases)) + options  # a preset may have none yet
    if phases and len(text) > _WIDTH:
        text = "[\n" + "".join(f"    {phase},\n" for phase in phases) + f"]{options}"
    return f"{type(schedule).__name__}({text})"


def preview_table(plan: Plan, policy: OptimizerState = "keep", optimizer: OptimizerLike | None = None) -> Table:
    """Return a row for each phase: what trains, when, how much that is, at which rates, and the memory it takes.

    Without ``optimizer`` it is that of the module, and none if the module does not say.
    """
    layers, total = set(running_statistics(plan.model)), sum(map(scalars, plan.parameters.values()))
    counts = [sum(scalars(plan.parameters[name]) for name in factors) for factors in plan.factors]
    columns = {
        "phase": [f"{number} {phase.name or ''}".rstrip() for number, phase in enumerate(plan.phases, 1)],
        "trains": [selected_text(phase.train) for phase in plan.phases],
        f"{_unit(plan)}s": [_when(plan, index) for index in range(len(plan.phases))],
        "parameters": [f"{count:,}" for count in counts],
        "share": [percent(count, total) for count in counts],
        "lr scale": [scales_text(factors.values()) for factors in plan.factors],
    }
    if layers:
        columns["frozen BN"] = [f"{len(stay & layers)}/{len(layers)}" for stay in plan.in_eval]
    size = {name: scalars(parameter) * parameter.dtype.itemsize for name, parameter in plan.parameters.items()}
    columns["gradients"] = [in_bytes(sum(map(size.__getitem__, factors))) for factors in plan.factors]
    if (states := _state_bytes(plan, optimizers_of(plan, optimizer))) is not None:
        columns["optimizer"] = list(map(in_bytes, _kept(plan, policy, states)))
    return Table(tuple(columns), list(zip(*columns.values(), strict=True)), tuple(_notes(plan)), _WIDTH)


def scales_text(factors: Iterable[Factor]) -> str:
    """Return learning rate scales in a few characters.

    Example:
        >>> scales_text([Ramp(0.1)]), scales_text([0.125, 0.25, 0.5, 1.0])
        ('0.1→1', '0.12 … 1')
    """
    different = sorted({(one.end, one.start) if isinstance(one, Ramp) else (one, one) for one in factors})
    if len(different) <= 2:
        return ", ".join(f"{end:.3g}" if start == end else f"{start:.3g}→{end:.3g}" for end, start in different)
    values = list(chain.from_iterable(different))
    return f"{min(values):.2g} … {max(values):.2g}"


def selected_text(select: Any) -> str:
    """Return a selector as text, names that count up as one."""
    is_names = isinstance(select, list | tuple) and all(isinstance(one, str) for one in select)
    return ", ".join(runs(select)) if is_names else selector_text(select)


def optimizers_of(plan: Plan, optimizer: OptimizerLike | None = None) -> list[Optimizer]:
    """Return the optimizers of a module: those of its Trainer, else what ``configure_optimizers`` makes."""
    if optimizer is not None:
        return [optimizer if isinstance(optimizer, Optimizer) else optimizer(list(plan.parameters.values()))]
    trainer = trainer_of(plan.model)
    return list(trainer.optimizers) if trainer is not None and trainer.optimizers else made_optimizers(plan)[0]


def _state_bytes(plan: Plan, optimizers: list[Optimizer]) -> dict[str, tuple[int, int]] | None:
    """Return the bytes of optimizer state for each parameter, before and after it is stepped; None if unknown."""
    groups = {id(p): (one, group) for one in optimizers for group in one.param_groups for p in group["params"]}
    trained = {name for factors in plan.factors for name in factors}
    asked: dict[Any, tuple[int, int] | None] = {}
    found: dict[str, tuple[int, int]] = {}
    trainer = trainer_of(plan.model)
    ledger = ledger_of(trainer) if trainer is not None else None
    with ledger.steps.paused() if ledger is not None else nullcontext():  # throw-away optimizers step
        for name, parameter in plan.parameters.items() if optimizers else ():
            if not scalars(parameter) or (name not in trained and id(parameter) not in groups):
                continue
            # What no optimizer was given goes into the first group.
            one, group = groups.get(id(parameter), (optimizers[0], optimizers[0].param_groups[0]))
            key = (id(group), parameter.shape, parameter.dtype)
            if key not in asked:
                asked[key] = state_bytes(one, group, parameter)
            if (answer := asked[key]) is None:
                return None
            found[name] = answer
    return found if optimizers else None


def _kept(plan: Plan, policy: OptimizerState, states: Mapping[str, tuple[int, int]]) -> Iterator[int]:
    """Yield the bytes of optimizer state on the device in each phase."""
    so_far: set[str] = set()
    for factors in plan.factors:
        so_far |= factors.keys()
        if policy == "keep":
            yield sum(stepped if name in so_far else built for name, (built, stepped) in states.items())
        else:
            yield sum(states[name][1] for name in factors if name in states)


def _unit(plan: Plan) -> str:
    """Return the unit in which no two phases look alike: steps, if several begin in one epoch."""
    begins = [int(begin) for begin, _ in plan.reached.values()]
    return plan.length.unit if len(set(begins)) == len(begins) or not plan.length.knows("step") else "step"


def _when(plan: Plan, index: int) -> str:
    """Return the epochs, or the steps, of a phase as text."""
    if index not in plan.reached:
        return "never"
    in_unit = 1 if _unit(plan) == plan.length.unit else plan.length.size
    begin, end = (round(float(place * in_unit), 6) for place in plan.reached[index])
    first, last = int(begin), max(int(begin), -int(-end // 1) - 1)
    text = f"{first}-{last}" if last > first else f"{first}"
    return f"{text} or until" if plan.phases[index].until is not None else text


def _notes(plan: Plan) -> Iterator[str]:
    """Yield what no row says."""
    for index in plan.reached:
        if (until := (phase := plan.phases[index]).until) is not None:
            what = f"{until.monitor} plateaus" if isinstance(until, Plateau) else f"{function_name(until)}() is true"
            is_guess = index + 1 < len(plan.phases) and not (phase.epochs or phase.steps or phase.fraction)
            sure = "how long that takes is a guess" if is_guess else "at most as long as shown"
            yield f"Phase {index + 1} lasts until {what}: {sure}."
    if never := [number for number in range(1, len(plan.phases) + 1) if number - 1 not in plan.reached]:
        yield f"The fit ends before phase {never[0]}{f' to {never[-1]}' * (len(never) > 1)} would begin."
    if plan.end < (total := plan.length.total / plan.length.size):
        yield f"The fit ends with the last phase, after {plan.end:g} of {total:g} {plan.length.unit}s."
    trains = {name for index in plan.reached for name in plan.factors[index]}
    if frozen := {name: p for name, p in plan.parameters.items() if name not in trains}:
        names = runs(topmost(plan.model, set(map(id, frozen.values()))))
        yield f"Never trains: {listed(names, most=8)} ({sum(map(scalars, frozen.values())):,} parameters)."
