"""Modules that stay in eval mode, whoever calls ``train()``; and which modules a phase leaves wholly frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

#: Who holds a module in eval mode: the user, by :func:`freeze_batchnorm`, or the fit that runs.
BY_HAND, BY_FIT = "freeze_batchnorm", "fit"


@dataclass
class StaysInEval:
    """Intercepts ``module.train`` and keeps that one module in eval mode, whoever asks for training mode.

    The module still pickles and deep-copies; a copy is held if :func:`freeze_batchnorm` holds the module, not by a fit.
    """

    module: nn.Module
    wants_training: bool  # were it not held
    own: Callable[..., object] | None = None  # the ``train`` that somebody else had set on the module
    holders: set[str] = field(default_factory=set)  # BY_HAND, BY_FIT or both
    affine: tuple[str, ...] | None = None  # what freeze_batchnorm found trainable and froze, None if it froze none

    def __call__(self, mode: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """Pass the mode on to the children and stay in eval mode."""
        self.wants_training = self.wants_training or mode
        for child in self.module.children():
            if self.is_plain or interceptor(child) is None:  # else only the module's own train() knows the child's mode
                child.train(mode)
        self.set_mode(False, *args, **kwargs)
        return self.module

    @property
    def is_plain(self) -> bool:
        """Whether the module's ``train`` sets flags and nothing else."""
        return self.own is None and type(self.module).train is nn.Module.train

    def set_mode(self, training: bool, *args: Any, **kwargs: Any) -> None:
        """Set the mode of the module and not of those below, by its own ``train()`` if it has one: that may do more."""
        is_plain = self.is_plain
        if not is_plain:
            with _children_muted(self.module):
                (self.own or type(self.module).train.__get__(self.module))(training, *args, **kwargs)
        if is_plain or not training:
            # Without nn.Module's search among parameters; TorchScript keeps its mode elsewhere.
            set_flag = object.__setattr__ if type(self.module).__setattr__ is nn.Module.__setattr__ else setattr
            set_flag(self.module, "training", training)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what a copy has in this place."""
        if BY_HAND not in self.holders:
            return (copy.copy, (self.own,)) if self.own is not None else (getattr, (self.module, "train"))
        return StaysInEval, (self.module, self.wants_training, self.own, {BY_HAND}, self.affine)


def is_held(module: nn.Module) -> bool:
    """Return whether a module is kept in eval mode."""
    return interceptor(module) is not None


def wholly_frozen(module: nn.Module, trains: Container[int]) -> list[nn.Module]:
    """Return the modules that have parameters of which none trains, and everything below them, each once.

    A module without parameters counts when every module that contains it is wholly frozen.
    """
    named = dict(module.named_modules(remove_duplicate=False))
    training = {name: [id(parameter) in trains for parameter in child.parameters()] for name, child in named.items()}
    frozen = {name for name, flags in training.items() if flags and not any(flags)}
    outside = {child for name, child in named.items() if frozen.isdisjoint(_upwards(name))}
    return [child for child in module.modules() if child not in outside]


def _upwards(name: str) -> Iterator[str]:
    """Yield a dotted name, and those of all that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def interceptor(module: nn.Module, holder: str | None = None) -> StaysInEval | None:
    """Return what keeps a module in eval mode, for anybody or one holder; None if nothing does."""
    stay = module.__dict__.get("train")
    return stay if isinstance(stay, StaysInEval) and (holder is None or holder in stay.holders) else None


def hold(module: nn.Module, holder: str = BY_FIT) -> StaysInEval:
    """Put one module, without its children, in eval mode and keep it there until every holder has released it."""
    stay = interceptor(module)
    if stay is None:
        own = module.__dict__.get("train")
        if getattr(own, "__func__", None) is type(module).train:  # a copy that was made in a fit has it
            own = None
        stay = StaysInEval(module, module.training, own)
        module.__dict__["train"] = stay
    stay.holders.add(holder)
    stay.set_mode(False)
    return stay


def release(module: nn.Module, holder: str = BY_FIT, *, training: bool = True) -> None:
    """Release one module from one holder, in the end in the mode it would be in."""
    if (stay := interceptor(module, holder)) is None:
        return
    stay.holders.remove(holder)
    if not stay.holders:
        del module.__dict__["train"]
        if stay.own is not None:
            module.__dict__["train"] = stay.own
        stay.set_mode(stay.wants_training and training)


@contextmanager
def _children_muted(module: nn.Module) -> Iterator[None]:
    """Let calls of ``train()`` and ``eval()`` on the modules below do nothing."""
    covered = [(child, child.__dict__.get("train")) for child in module.modules() if child is not module]
    for child, _ in covered:
        child.__dict__["train"] = lambda mode=True, *_, child=child, **__: child
    try:
        yield
    finally:
        for child, own in covered:
            if own is None:
                del child.__dict__["train"]
            else:
                child.__dict__["train"] = own
