"""BatchNorm whose running statistics stay.

A frozen layer runs in eval mode and stays there when ``train()`` is called on it or on a module above it. ``momentum``
and ``track_running_stats`` are left alone: they show in checkpoints, and changing them also changes the output.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_freeze.freezing.eval_mode import BY_HAND, StaysInEval, hold, interceptor, release
from lightning_freeze.functional import set_trainable
from lightning_freeze.selectors import Selector, select_layers


def has_running_statistics(module: nn.Module) -> bool:
    """Return whether a layer keeps running statistics: any BatchNorm, also SyncBatchNorm, timm's, or InstanceNorm."""
    return any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))


def learns_in_buffers(module: nn.Module) -> bool:
    """Return whether a module can learn without a parameter: in running statistics, or in buffers and nothing else."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return "running_mean" in names or (bool(names) and next(module.parameters(), None) is None)


def affine_frozen_by_hand(modules: Iterable[nn.Module]) -> set[int]:
    """Return the identities of the affine parameters that :func:`freeze_batchnorm` froze."""
    held = [layer for layer in modules if (stay := interceptor(layer)) is not None and stay.affine is not None]
    return {id(parameter) for layer in held for parameter in affine_parameters(layer).values()}


def freeze_batchnorm(module: nn.Module, select: Selector = "*", *, train_affine: bool = False) -> dict[str, nn.Module]:
    """Freeze BatchNorm layers: their running statistics never move, whatever calls ``train()``.

    A second call for the same layers brings them in line with it: ``train_affine=True`` unfreezes the affine
    parameters that the first one froze, without it those freeze that train.

    What makes new layers loses this: ``SyncBatchNorm.convert_sync_batchnorm`` (and so ``sync_batchnorm=True``) and
    ``torch.jit.script``. Convert first, or use the :class:`FreezeBatchNorm` callback.

    Args:
        module: Any module; layers are found at any depth, also subclasses (SyncBatchNorm, timm's).
        select: Which layers, see :data:`Selector`; a layer counts when one of its parameters or buffers is selected.
        train_affine: Leave the affine parameters (``weight`` and ``bias``) trainable.

    Returns:
        Name to layer, for the layers that this changed.

    Raises:
        ValueError: If ``select`` matches nothing, or no layer with running statistics.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> list(freeze_batchnorm(net))
        ['1']
        >>> net.train()[1].training, net[1].weight.requires_grad
        (False, False)
        >>> _ = unfreeze_batchnorm(net)
        >>> net[1].training, net[1].weight.requires_grad
        (True, True)
    """
    changed = {}
    for name, layer in batchnorm_layers(module, select).items():
        before = _state(layer)
        follow = _unfreeze_affine if train_affine else _freeze_affine
        follow(layer, hold(layer, BY_HAND))
        if _state(layer) != before:
            changed[name] = layer
    return changed


def unfreeze_batchnorm(module: nn.Module, select: Selector = "*") -> dict[str, nn.Module]:
    """Undo :func:`freeze_batchnorm`: running statistics move again, affine flags are as they were before.

    Args:
        module: Any module.
        select: Which layers, see :data:`Selector`.

    Returns:
        Name to layer, for the layers that were frozen by :func:`freeze_batchnorm`.

    Raises:
        ValueError: If ``select`` matches nothing, or no layer with running statistics.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(4))
        >>> _ = freeze_batchnorm(net)
        >>> list(unfreeze_batchnorm(net)), list(unfreeze_batchnorm(net))
        (['0'], [])
    """
    released = {}
    for name, layer in batchnorm_layers(module, select).items():
        if (stay := interceptor(layer, BY_HAND)) is not None:
            _unfreeze_affine(layer, stay)
            release(layer, BY_HAND, training=layer is module or module.training)
            released[name] = layer
    return released


def batchnorm_layers(module: nn.Module, select: Selector, given: str = "select={}") -> dict[str, nn.Module]:
    """Return the layers with running statistics that a selector names; raise if there is none, unless it is ``"*"``."""
    layers = select_layers(module, select, has_running_statistics, given=given)
    if not layers and select != "*":
        shown = given.format(repr(select))
        raise ValueError(f"{shown} matches no layer with running statistics (BatchNorm and its kin).")
    return layers


def affine_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return a layer's affine parameters, and in the place of one that is parametrized what it is made of."""
    return {name: p for name, p in layer.named_parameters() if "." not in name or name.startswith("parametrizations.")}


def _state(layer: nn.Module) -> tuple[bool, list[bool]]:
    """Return what :func:`freeze_batchnorm` changes in a layer."""
    is_frozen = interceptor(layer, BY_HAND) is not None
    return is_frozen, [parameter.requires_grad for parameter in affine_parameters(layer).values()]


def _freeze_affine(layer: nn.Module, stay: StaysInEval) -> None:
    affine = affine_parameters(layer)
    found = [name for name, parameter in affine.items() if parameter.requires_grad]
    stay.affine = (*(stay.affine or ()), *found)
    for parameter in affine.values():
        set_trainable(parameter, False)


def _unfreeze_affine(layer: nn.Module, stay: StaysInEval) -> None:
    """Make trainable again what was frozen, also where a parametrization put on or taken off since has renamed it."""
    names, stay.affine = stay.affine or (), None
    affine = affine_parameters(layer)
    renamed = {_attribute(name) for name in names if name not in affine}
    for name, parameter in affine.items():
        if name in names or _attribute(name) in renamed:
            parameter.requires_grad = True


def _attribute(name: str) -> str:
    """Return which tensor of a layer a name of :func:`affine_parameters` belongs to."""
    return name.removeprefix("parametrizations.").split(".")[0]
