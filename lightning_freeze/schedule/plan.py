"""What a phase means for one module: what trains, at which learning rate scale, and which modules run in eval mode."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from torch import nn

from lightning_freeze.freezing.batchnorm import frozen_running_statistics, wholly_frozen
from lightning_freeze.freezing.optimizers import overlay
from lightning_freeze.functional import can_train
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.selectors import as_patterns, named_unique_parameters, resolve, selector_text

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

FrozenMode: TypeAlias = Literal["batchnorm", "eval", "train"]


@runtime_checkable
class KeepsFrozen(Protocol):
    """A callback with modules that never train, whatever a phase selects: a target network."""

    def kept_frozen(self, module: nn.Module) -> list[nn.Module]:
        """Give these modules."""


@runtime_checkable
class HoldsBatchNorm(Protocol):
    """A callback with BatchNorm layers that stay frozen in every phase."""

    def hold(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze them for the fit that begins; a second call does nothing."""


def phase_trains(module: nn.Module, phase: Phase, kept: Mapping[int, str] | None = None) -> dict[str, nn.Parameter]:
    """Give what a phase trains, by name.

    Args:
        module: The module to look in.
        phase: The phase. That ``"*"`` selects what never trains too is fine; to name only such parameters is not.
        kept: The parameters that never train, by identity, and who keeps them frozen.

    Raises:
        ValueError: If the phase's selector matches nothing, nothing that can train, or names what never trains.

    Example:
        >>> list(phase_trains(nn.Linear(2, 1), Phase("weight")))
        ['weight']
    """
    selected = resolve(module, phase.train, given="Phase(train={})")
    if kept:
        _check_kept(module, phase, kept)
        selected = {name: parameter for name, parameter in selected.items() if id(parameter) not in kept}
    trains = {name: parameter for name, parameter in selected.items() if can_train(parameter)}
    if not trains:
        raise ValueError(f"Phase {phase.label!r} trains nothing: all it selects has a dtype without gradients.")
    return trains


def without_held(phase: Phase, trains: Mapping[str, nn.Parameter], held: Collection[int]) -> dict[str, nn.Parameter]:
    """Give what a phase trains, less the affine part of frozen BatchNorm.

    Args:
        phase: The phase, for the error.
        trains: What :func:`phase_trains` gave.
        held: The identities of what stays frozen because its layer is.

    Raises:
        ValueError: If nothing is left.
    """
    left = {name: parameter for name, parameter in trains.items() if id(parameter) not in held}
    if not left:
        raise ValueError(
            f"Phase {phase.label!r} trains nothing: all it selects is the affine part of frozen BatchNorm layers. "
            "Select more, or freeze these with train_affine=True."
        )
    return left


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
    return {id(parameters[name]): float(phase.scales[select]) for name, select in owner.items()}


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


def _check_kept(module: nn.Module, phase: Phase, kept: Mapping[int, str]) -> None:
    for pattern in as_patterns(phase.train):
        if isinstance(pattern, str) and pattern.startswith("!"):
            continue
        named = resolve(module, pattern)
        if all(id(parameter) in kept for parameter in named.values()):
            keeper = kept[id(next(iter(named.values())))]
            raise ValueError(
                f"Phase {phase.label!r} would train what {keeper} keeps frozen: {selector_text(pattern)!r} selects "
                "nothing else. Leave it out of `train`."
            )
