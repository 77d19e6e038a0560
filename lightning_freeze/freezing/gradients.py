"""Gradients of frozen parameters: they are dropped, but for one that an optimizer at rest needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_freeze.freezing.optimizers import members

_grad = attrgetter("grad")


class FrozenGradients:
    """Keeps frozen parameters without a gradient by one look after each backward; ``on_stray`` gets those with one."""

    def __init__(self, on_stray: Callable[[list[nn.Parameter]], object]) -> None:
        self._on_stray = on_stray
        self.watch([])

    def watch(self, parameters: list[nn.Parameter]) -> None:
        """Take what is frozen from now on."""
        self.parameters, self._frozen = parameters, set(map(id, parameters))
        self._lent: frozenset[int] = frozenset()
        self._clean = False  # since the last step

    def drop(self, lent: frozenset[int] = frozenset()) -> None:
        """Drop the gradients, but for those that are ``lent``."""
        self._lent, self._clean = lent, True
        if list(map(_grad, self.parameters)).count(None) == len(self.parameters):  # in C: it is done in each step
            return
        stray = [p for p in self.parameters if p.grad is not None and id(p) not in lent]
        for parameter in stray:
            parameter.grad = None
        self._on_stray(stray)

    def begin_step(self, stepping: Optimizer) -> None:
        """Drop what an optimizer must not see that is about to step."""
        if self._lent or not self._clean:
            self.drop(self._lent.difference(map(id, members([stepping]))))
        self._clean = False

    def lend(self, optimizers: Iterable[Optimizer]) -> None:
        """Set one zero gradient in each wholly frozen optimizer, until its step: some clips and scalers need it."""
        for optimizer in optimizers:
            own = members([optimizer])
            if own and self._frozen.issuperset(map(id, own)):
                smallest = min(own, key=torch.numel)
                smallest.grad = torch.zeros_like(smallest)
                self._lent |= {id(smallest)}
