"""What a phase means for one module: what trains, at which learning rate scale, and which modules run in eval mode."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

from torch import nn

from lightning_freeze.batchnorm import frozen_running_statistics, wholly_frozen
from lightning_freeze.gradients import can_train
from lightning_freeze.optimizers import overlay
from lightning_freeze.phases import Phase
from lightning_freeze.selectors import named_unique_parameters, resolve

FrozenMode: TypeAlias = Literal["batchnorm", "eval", "train"]


def phase_trains(module: nn.Module, phase: Phase) -> dict[str, nn.Parameter]:
    """Give what a phase trains, by name.

    Raises:
        ValueError: If the phase's selector matches nothing, or nothing that can train.

    Example:
        >>> list(phase_trains(nn.Linear(2, 1), Phase("weight")))
        ['weight']
    """
    selected = resolve(module, phase.train, given="Phase(train={})")
    trains = {name: parameter for name, parameter in selected.items() if can_train(parameter)}
    if not trains:
        raise ValueError(f"Phase {phase.label!r} trains nothing: all it selects has a dtype without gradients.")
    return trains


def phase_scales(module: nn.Module, phase: Phase) -> dict[int, float]:
    """Give the learning rate scale of each parameter that has one in a phase, by identity.

    Raises:
        ValueError: If a selector of ``lr_scale`` matches nothing, or if later ones leave it nothing.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> phase_scales(net, Phase("*", lr_scale={"*": 0.5, "bias": 2.0})) == {id(net.weight): 0.5, id(net.bias): 2.0}
        True
    """
    parameters = named_unique_parameters(module)
    owner = overlay(module, list(phase.scales), given="Phase(lr_scale={{{}: …}})")
    return {id(parameters[name]): float(phase.scales[select]) for name, select in owner.items()}  # type: ignore[index]


def held_modules(module: nn.Module, trains: Collection[int], mode: FrozenMode) -> list[nn.Module]:
    """Give the modules that run in eval mode while only ``trains`` trains.

    Args:
        module: The module to look in.
        trains: The identity of each parameter that trains.
        mode: ``"batchnorm"``, ``"eval"`` or ``"train"``, as in :class:`FreezeSchedule`.
    """
    if mode == "batchnorm":
        return frozen_running_statistics(module, trains)
    return wholly_frozen(module, trains) if mode == "eval" else []
