"""What a phase means for one module: what trains, at which learning rate scale, and which modules run in eval mode."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from lightning_freeze.freezing.batchnorm import learns_in_buffers
from lightning_freeze.freezing.eval_mode import wholly_frozen
from lightning_freeze.freezing.ledger import Hold
from lightning_freeze.functional import can_train, scalars, topmost
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.rates import Ramp
from lightning_freeze.selectors import Predicate, as_patterns, named_unique_parameters, overlay, resolve, selector_text
from lightning_freeze.words import listed, quoted

FrozenMode: TypeAlias = Literal["batchnorm", "eval", "train"]

_TRAIN = "Phase(train={})"


def asleep(module: nn.Module, phases: Sequence[Phase], came_frozen: Collection[int]) -> set[int]:
    """Return the identities of what came frozen and no phase names: ``"*"`` leaves it frozen."""
    named = (keys for phase in phases for _, keys in _named(module, phase))
    return set(came_frozen).difference(*named) if came_frozen else set()


def phase_trains(
    module: nn.Module, phase: Phase, asleep: Collection[int] = (), held: Mapping[int, str] | None = None
) -> dict[str, nn.Parameter]:
    """Return what a phase trains, by name.

    ``asleep`` has the identities of what ``"*"`` leaves frozen; ``held`` tells who keeps a parameter frozen in every
    phase. That ``"*"`` selects such parameters too is fine; to name only such ones is not.
    """
    held = held or {}
    awake = _awake(asleep)
    patterns = [awake if pattern == "*" else pattern for pattern in as_patterns(phase.train)]
    if awake in patterns and all(map(asleep.__contains__, map(id, module.parameters()))):
        raise ValueError(
            f"Phase {phase.label!r} trains nothing: all parameters came frozen, which '*' leaves alone. "
            "Name what shall train, for example Phase('head')."
        )
    selected = resolve(module, patterns, given=_TRAIN)
    _check_named(module, phase, held)
    trains = {name: parameter for name, parameter in selected.items() if can_train(parameter)}
    if not trains:
        raise ValueError(f"Phase {phase.label!r} trains nothing: all it selects has a dtype without gradients.")
    left = {name: parameter for name, parameter in trains.items() if id(parameter) not in held}
    if not left:
        raise ValueError(
            f"Phase {phase.label!r} trains nothing: all it selects is the affine part of frozen BatchNorm layers. "
            "Select more, or freeze these with train_affine=True."
        )
    return left


def eval_modules(module: nn.Module, trains: Collection[int], mode: FrozenMode) -> list[nn.Module]:
    """Return the modules that run in eval mode while only ``trains`` trains, see :class:`FreezeSchedule`."""
    frozen = wholly_frozen(module, trains) if mode != "train" else []
    return [child for child in frozen if mode == "eval" or learns_in_buffers(child)]


@dataclass(frozen=True)
class Resolved:
    """What each phase means for one module."""

    trains: list[dict[str, nn.Parameter]]  # for each phase, what trains, by name
    scales: list[dict[int, float | Ramp]]  # for each phase, the learning rate scales, by identity
    scaled: list[dict[str, nn.Parameter]]  # for each phase, the first that trains of each selector of its scales
    holds: list[Hold]  # for each phase, what the schedule asks the ledger for


def resolve_phases(
    module: nn.Module,
    phases: Sequence[Phase],
    *,
    came_frozen: set[int],
    held: Mapping[int, str],
    mode: FrozenMode,
    left_alone: Collection[nn.Module] = (),
) -> Resolved:
    """Return what each phase means for a module, so that every error comes before the first batch.

    ``held`` tells who keeps a parameter frozen in every phase; the modes of ``left_alone`` are other holders'.
    """
    sleeping, resolved = asleep(module, phases, came_frozen), Resolved([], [], [], [])
    parameters = named_unique_parameters(module)
    everything = frozenset(map(id, parameters.values()))
    for phase in phases:
        trains = phase_trains(module, phase, sleeping, held)
        active = frozenset(map(id, trains.values()))
        stay = [child for child in eval_modules(module, active, mode) if child not in left_alone]
        owner = overlay(module, list(phase.scales), given="Phase(lr_scale={{{}: …}})")
        owners = [(name, select) for name, select in owner.items() if name in trains]
        if phase.scales and not owners:
            named = listed(map(selector_text, phase.scales))
            raise ValueError(f"Phase {phase.label!r} trains nothing that its lr_scale names ({named}): train it, too.")
        factors = {select: one if isinstance(one, Ramp) else float(one) for select, one in phase.scales.items()}
        resolved.trains.append(trains)
        resolved.scales.append({id(parameters[name]): factors[select] for name, select in owner.items()})
        resolved.scaled.append({selector_text(select): trains[name] for name, select in reversed(owners)})
        resolved.holds.append(Hold(everything - active, tuple(stay), active))
    return resolved


def what_came_frozen(
    module: nn.Module, phases: Sequence[Phase], came_frozen: Collection[int], held: Collection[int]
) -> str | None:
    """Return what to say of parameters that came frozen, with the line that would say the other thing.

    Nothing is said of what a callback keeps frozen in every phase, ``held``.
    """
    sleeping = asleep(module, phases, came_frozen)
    stars = any("*" in as_patterns(phase.train) for phase in phases)
    sentences = []
    if stars and (names := topmost(module, sleeping - set(held))):
        sentences.append(
            f'"*" is what was trainable when the fit began, so these stay frozen: {_counted(module, names)}. To train '
            f'them too, name them: Phase(["*", {quoted(names)}]).'
        )
    if names := topmost(module, set(came_frozen) - sleeping - set(held)):
        sentences.append(
            f"these came frozen and train where a phase names them: {_counted(module, names)}. To leave them frozen, "
            f'take them away: Phase(["*", {quoted([f"!{name}" for name in names])}]).'
        )
    return " ".join(sentences) or None


def _named(module: nn.Module, phase: Phase) -> Iterator[tuple[str | Predicate, set[int]]]:
    """Yield each pattern that names something, as ``"*"`` and ``"!…"`` do not, and the identities of what it names."""
    for pattern in as_patterns(phase.train):
        if not isinstance(pattern, str) or not (pattern == "*" or pattern.startswith("!")):
            yield pattern, set(map(id, resolve(module, pattern, given=_TRAIN).values()))


def _awake(asleep: Collection[int]) -> Predicate:
    def everything(name: str, parameter: Any) -> bool:
        return id(parameter) not in asleep

    everything.__qualname__ = '"*"'  # how errors show it
    return everything


def _check_named(module: nn.Module, phase: Phase, held: Mapping[int, str]) -> None:
    for pattern, keys in _named(module, phase) if held else ():
        keepers = {held.get(key, "") for key in keys}
        if all(keeper.startswith("TargetNetwork") for keeper in keepers):
            raise ValueError(
                f"Phase {phase.label!r} would train what {keepers.pop().partition('{')[0]} keeps frozen: "
                f"{selector_text(pattern)!r} selects nothing else. Leave it out of `train`."
            )


def _counted(module: nn.Module, names: Sequence[str]) -> str:
    return listed(f"{name} ({sum(map(scalars, resolve(module, name).values())):,} parameters)" for name in names)
