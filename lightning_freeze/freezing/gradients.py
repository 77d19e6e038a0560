"""Gradients of frozen parameters: they are dropped, but for one that an optimizer at rest needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.freezing.optimizers import members

_grad = attrgetter("grad")


class FrozenGradients:
    """Keeps frozen parameters without a gradient by one look after each backward; ``on_stray`` gets those with one."""

    def __init__(self, on_stray: Callable[[list[nn.Parameter]], object]) -> None:
        self._on_stray = on_stray
        self._lent: dict[int, Tensor] = {}
        self._clean = False  # since the last step
        self.watch([])

    def watch(self, parameters: list[nn.Parameter]) -> None:
        """Take what is frozen from now on."""
        self.parameters, self._lent, self._clean = parameters, {}, False

    def drop(self, *, lent: bool = True) -> None:
        """Drop the gradients, also what was ``lent``."""
        if lent and self._lent:
            self._lent = {}
        self._clean, kept = True, self._lent
        if list(map(_grad, self.parameters)).count(None) == len(self.parameters):  # in C: it is done in each step
            return
        stray = [p for p in self.parameters if p.grad is not None and not (kept and p.grad is kept.get(id(p)))]
        if stray:
            for parameter in stray:
                parameter.grad = None
            self._on_stray(stray)

    def begin_step(self, stepping: Optimizer) -> None:
        """Drop what an optimizer must not see that is about to step."""
        if self._lent:
            for parameter in members([stepping]):
                if self._lent.pop(id(parameter), None) is not None:
                    parameter.grad = None
        if not self._clean:
            self.drop(lent=False)
        self._clean = False

    def lend(self, optimizers: Iterable[Optimizer]) -> None:
        """Set one zero gradient in each wholly frozen optimizer, until its step: some clips and scalers need it."""
        frozen = set(map(id, self.parameters))
        for optimizer in optimizers:
            own = members([optimizer])
            if own and all(id(parameter) in frozen for parameter in own):
                smallest = min(own, key=torch.numel)
                smallest.grad = self._lent[id(smallest)] = torch.zeros_like(smallest)
