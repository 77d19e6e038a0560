"""BatchNorm whose running statistics stay.

A frozen layer runs in eval mode and stays there when ``train()`` is called on it or on a module above it. ``momentum``
and ``track_running_stats`` are left alone: they show in checkpoints, and changing them also changes the output.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_freeze.selectors import Selector, select_layers

_BY_HAND = "freeze_batchnorm"


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a layer keeps running statistics: any BatchNorm, also SyncBatchNorm, timm's, or InstanceNorm.

    Example:
        >>> has_running_statistics(nn.BatchNorm2d(3)), has_running_statistics(nn.LayerNorm(3))
        (True, False)
    """
    # Looked up where buffers lie: asking a module for what it has not is slow, and this is asked of every module.
    return "running_mean" in module._buffers and isinstance(module._buffers["running_mean"], Tensor)


def every_module(module: nn.Module) -> list[nn.Module]:
    """Give a module and all below it, each once, as ``modules()`` does, but in time that does not grow with depth.

    Example:
        >>> [type(child).__name__ for child in every_module(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh())))]
        ['Sequential', 'ReLU', 'Sequential', 'Tanh']
    """
    found: dict[nn.Module, None] = {}
    ahead: list[nn.Module | None] = [module]
    while ahead:
        child = ahead.pop()
        if child is not None and child not in found:
            found[child] = None
            ahead.extend(reversed(list(child._modules.values())))
    return list(found)


@dataclass
class StayInEval:
    """Stands in for ``module.train``: keeps that one module in eval mode, whoever asks for training mode.

    It refers to the module it sits on, so the module still pickles and deep-copies. A copy is held by whom
    :func:`freeze_batchnorm` says; what a fit holds is the fit's, and the copy is in none.

    Args:
        module: The module that is held.
        wants_training: Whether the module would be in training mode were it not held.
        own: What ``module.train`` was, if somebody else had put something in its place already.
        holders: Who holds it; for a holder that freezes the affine parameters too, the names of those it found
            trainable, else None.
    """

    module: nn.Module
    wants_training: bool
    own: Callable[[bool], object] | None = None
    holders: dict[str, tuple[str, ...] | None] = field(default_factory=dict)

    def __call__(self, mode: bool = True) -> nn.Module:
        """Pass the mode on to the children and stay in eval mode."""
        self.wants_training = self.wants_training or mode
        plain = _plain(self.module, self.own)
        for child in self.module.children():
            if plain or _held(child) is None:  # else only the module's own train() knows what they would be asked
                child.train(mode)
        _set_mode(self.module, False, self.own)
        return self.module

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Give what a copy has in the place of this."""
        if _BY_HAND not in self.holders:
            return (_itself, (self.own,)) if self.own is not None else (getattr, (self.module, "train"))
        names = self.holders[_BY_HAND]
        if names is not None:
            names = tuple(dict.fromkeys(name for found in self.holders.values() for name in found or ()))
        return StayInEval, (self.module, self.wants_training, self.own, {_BY_HAND: names})


def hold_eval(modules: Iterable[nn.Module], holder: str) -> None:
    """Put each module, without its children, in eval mode until every holder has released it."""
    for module in modules:
        _hold(module, holder)


def release_eval(
    module: nn.Module, holder: str, *, keep: Container[nn.Module] = (), root: nn.Module | None = None
) -> None:
    """Give back to ``train()`` what ``holder`` holds at or below ``module``, except what is in ``keep``.

    A module that nobody holds any longer is in training mode again if ``root``, else ``module``, is and it would have
    been.
    """
    for child in every_module(module):
        if child not in keep:
            _let_go(child, holder, root=module if root is None else root)


def give_back_copy(module: nn.Module, twin: nn.Module, *, root: nn.Module) -> None:
    """Bring a copy's modes and affine flags to what the module's will be when the fit has released it.

    Args:
        module: What is held in a fit.
        twin: Its copy, which is not.
        root: The module whose mode counts, as in :func:`release_eval`.
    """
    for child, copied in zip(every_module(module), every_module(twin), strict=True):
        stay = _held(child)
        if stay is None or _BY_HAND in stay.holders:
            continue
        if stay.own is None:
            copied.__dict__.pop("train", None)
        _set_mode(copied, stay.wants_training and root.training, copied.__dict__.get("train"))
        for names in stay.holders.values():
            _make_trainable(copied, names or ())


def is_held(module: nn.Module) -> bool:
    """Whether a module is kept in eval mode."""
    return _held(module) is not None


def held_affine(module: nn.Module) -> set[int]:
    """Give the identities of the affine parameters that stay frozen because their layer is."""
    return {
        id(parameter)
        for child in every_module(module)
        if (stay := _held(child)) is not None and any(names is not None for names in stay.holders.values())
        for parameter in _affine(child).values()
    }


def freeze_batchnorm(module: nn.Module, select: Selector = "*", *, train_affine: bool = False) -> dict[str, nn.Module]:
    """Freeze BatchNorm layers: their running statistics never move, whatever calls ``train()``.

    A second call for the same layers brings them in line with it: ``train_affine=True`` gives back the affine
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
    return hold_batchnorm(module, select, holder=_BY_HAND, train_affine=train_affine)


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
    return release_batchnorm(module, select, holder=_BY_HAND)


def hold_batchnorm(
    module: nn.Module, select: Selector, *, holder: str, train_affine: bool, given: str = "select={}"
) -> dict[str, nn.Module]:
    """Like :func:`freeze_batchnorm`, under a holder's name, so that several can freeze one layer."""
    changed = {}
    for name, layer in _batchnorm_layers(module, select, given).items():
        before = _held(layer)
        is_new = before is None or holder not in before.holders
        stay = _hold(layer, holder)
        follows = _free_affine(layer, stay, holder) if train_affine else _freeze_affine(layer, stay, holder)
        if is_new or follows:
            changed[name] = layer
    return changed


def release_batchnorm(module: nn.Module, select: Selector, *, holder: str) -> dict[str, nn.Module]:
    """Undo :func:`hold_batchnorm` for one holder."""
    layers = _batchnorm_layers(module, select, "select={}")
    return {name: layer for name, layer in layers.items() if _let_go(layer, holder, root=module)}


def release_layers(module: nn.Module, layers: Iterable[nn.Module], *, holder: str) -> None:
    """Undo :func:`hold_batchnorm` for one holder and the layers it gave, also for those no longer in ``module``."""
    for layer in layers:
        _let_go(layer, holder, root=module)


def _batchnorm_layers(module: nn.Module, select: Selector, given: str) -> dict[str, nn.Module]:
    layers = select_layers(module, select, has_running_statistics, given=given)
    if not layers and select != "*":
        shown = given.format(repr(select))
        raise ValueError(f"{shown} matches no layer with running statistics (BatchNorm and its kin).")
    return layers


def _affine(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Give a layer's affine parameters, and in the place of one that is parametrized what it is made of."""
    affine = dict(layer.named_parameters(recurse=False))
    if parametrize.is_parametrized(layer):
        made_of = layer.get_submodule("parametrizations").named_parameters(prefix="parametrizations")
        affine.update(made_of)
    return affine


def _freeze_affine(layer: nn.Module, stay: StayInEval, holder: str) -> bool:
    """Freeze the affine parameters for a holder; give whether that changed anything."""
    before, own = stay.holders[holder], _affine(layer)
    found = [name for name, parameter in own.items() if parameter.requires_grad]
    stay.holders[holder] = tuple(dict.fromkeys([*(before or ()), *found]))
    for parameter in own.values():
        parameter.requires_grad = False
        parameter.grad = None
    return bool(found) or (before is None and bool(own))


def _free_affine(layer: nn.Module, stay: StayInEval, holder: str) -> bool:
    """Give back the affine parameters that a holder froze; give whether it had frozen them."""
    found_trainable, stay.holders[holder] = stay.holders[holder], None
    _give_back(layer, stay, found_trainable or ())
    return found_trainable is not None and bool(_affine(layer))


def _give_back(layer: nn.Module, stay: StayInEval, found_trainable: Iterable[str]) -> None:
    """Make affine parameters trainable again, or leave that to whoever else keeps them frozen."""
    other = next((other for other, names in stay.holders.items() if names is not None), None)
    if other is not None:  # still frozen: whoever releases it last makes it trainable again
        stay.holders[other] = tuple({*(stay.holders[other] or ()), *found_trainable})
        return
    _make_trainable(layer, found_trainable)


def _make_trainable(layer: nn.Module, names: Iterable[str]) -> None:
    affine = _affine(layer)
    for name in names:
        # A parametrization that was put on or taken off since has renamed it.
        same = [name] if name in affine else [other for other in affine if _attribute(other) == _attribute(name)]
        for found in same:
            affine[found].requires_grad = True


def _attribute(name: str) -> str:
    """Give which tensor of a layer a name of :func:`_affine` belongs to."""
    return name.removeprefix("parametrizations.").split(".")[0]


def _plain(module: nn.Module, own: Callable[[bool], object] | None) -> bool:
    """Whether a module's ``train`` sets flags and nothing else."""
    return own is None and type(module).train is nn.Module.train


def _set_mode(module: nn.Module, training: bool, own: Callable[[bool], object] | None) -> None:
    """Set the mode of one module and not of those below, by its own ``train()`` if it has one: that may do more."""
    if not _plain(module, own):
        with _left_alone(every_module(module)[1:]):
            own(training) if own is not None else type(module).train(module, training)
        if training:
            return
    if type(module).__setattr__ is nn.Module.__setattr__:
        object.__setattr__(
            module, "training", training
        )  # without the search among parameters that nn.Module begins with
    else:
        module.training = training


@contextmanager
def _left_alone(modules: list[nn.Module]) -> Iterator[None]:
    """Let calls of ``train()`` and ``eval()`` on these modules do nothing."""
    covered = [(module, module.__dict__.get("train")) for module in modules]
    for module in modules:
        module.__dict__["train"] = lambda mode=True, module=module: module
    try:
        yield
    finally:
        for module, own in covered:
            if own is None:
                del module.__dict__["train"]
            else:
                module.__dict__["train"] = own


def _itself(thing: Any) -> Any:
    return thing


def _held(module: nn.Module) -> StayInEval | None:
    stay = module.__dict__.get("train")
    return stay if isinstance(stay, StayInEval) else None


def _hold(module: nn.Module, holder: str) -> StayInEval:
    stay = _held(module)
    if stay is None:
        own = module.__dict__.get("train")
        if getattr(own, "__func__", None) is type(module).train:  # a copy that was made in a fit has it
            own = None
        stay = StayInEval(module, module.training, own)
        module.__dict__["train"] = stay
    stay.holders.setdefault(holder, None)
    _set_mode(module, False, stay.own)
    return stay


def _let_go(module: nn.Module, holder: str, *, root: nn.Module) -> bool:
    """Release one module from one holder; give whether it was held by it."""
    stay = _held(module)
    if stay is None or holder not in stay.holders:
        return False
    found_trainable = stay.holders.pop(holder) or ()
    if not stay.holders:
        del module.__dict__["train"]
        if stay.own is not None:
            module.__dict__["train"] = stay.own
        _set_mode(module, stay.wants_training and (module is root or root.training), stay.own)
    _give_back(module, stay, found_trainable)
    return True


def wholly_frozen(module: nn.Module, trains: Container[int]) -> list[nn.Module]:
    """Give the modules that have parameters of which none trains, and everything below them.

    Args:
        module: The module to look in.
        trains: The ``id`` of every parameter that trains.

    Returns:
        Each module once. A module without parameters counts when every module that contains it is wholly frozen.
    """
    states: dict[nn.Module, bool | None] = {}

    def trains_below(child: nn.Module) -> bool | None:
        """Whether a parameter at or below trains, None if there are no parameters."""
        if child not in states:
            own = [id(parameter) in trains for parameter in child._parameters.values() if parameter is not None]
            inside = [grandchild for grandchild in child._modules.values() if grandchild is not None]
            below = [state for grandchild in inside if (state := trains_below(grandchild)) is not None]
            states[child] = any([*own, *below]) if own or below else None
        return states[child]

    trains_below(module)
    outside: set[nn.Module] = set()
    ahead = [module]
    while ahead:
        child = ahead.pop()
        if child not in outside and states[child] is not False:
            outside.add(child)
            ahead.extend(grandchild for grandchild in child._modules.values() if grandchild is not None)
    return [child for child in every_module(module) if child not in outside]


def frozen_running_statistics(module: nn.Module, trains: Container[int]) -> list[nn.Module]:
    """Give the layers with running statistics among the wholly frozen modules."""
    return [layer for layer in wholly_frozen(module, trains) if has_running_statistics(layer)]
