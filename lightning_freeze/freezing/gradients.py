"""Gradients of frozen parameters: they are dropped, but for one that a GradScaler needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.freezing.optimizers import members


@dataclass
class FrozenGradients:
    """Keeps frozen parameters without a gradient, by one look after each backward.

    Args:
        parameters: What is frozen.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> gradients = FrozenGradients([layer.bias])
        >>> layer(torch.ones(1, 1)).sum().backward()
        >>> gradients.drop() == [layer.bias], layer.bias.grad, layer.weight.grad
        (True, None, tensor([[1.]]))
    """

    parameters: list[nn.Parameter]
    _lent: dict[int, Tensor] = field(default_factory=dict)
    _clean: bool = False  # since the last step

    def drop(self) -> list[nn.Parameter]:
        """Drop the gradients, also what was lent, and return the parameters that had one."""
        self._lent = {}
        return self._drop()

    def begin_step(self, stepping: Optimizer) -> list[nn.Parameter]:
        """Drop what an optimizer must not see that is about to step, and return the parameters that had a gradient."""
        if self._lent:
            for parameter in members([stepping]):
                if self._lent.pop(id(parameter), None) is not None:
                    parameter.grad = None
        stray = [] if self._clean else self._drop()
        self._clean = False
        return stray

    def lend(self, optimizers: Iterable[Optimizer]) -> None:
        """Set one zero gradient in each wholly frozen optimizer, until its step: a GradScaler refuses it without."""
        frozen = set(map(id, self.parameters))
        for optimizer in optimizers:
            own = members([optimizer])
            if own and all(id(parameter) in frozen for parameter in own):
                smallest = min(own, key=torch.numel)
                smallest.grad = self._lent[id(smallest)] = torch.zeros_like(smallest)

    def _drop(self) -> list[nn.Parameter]:
        lent = self._lent
        stray = [p for p in self.parameters if p.grad is not None and not (lent and p.grad is lent.get(id(p)))]
        for parameter in stray:
            parameter.grad = None
        self._clean = True
        return stray
