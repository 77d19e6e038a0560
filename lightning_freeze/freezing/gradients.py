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
    """Keeps frozen parameters without a gradient.

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

    def drop(self, stepping: Optimizer | None = None) -> list[nn.Parameter]:
        """Drop the gradients, and return the parameters that had one; those lent stay until their optimizer steps.

        Args:
            stepping: The optimizer that is about to step; without one, what was lent is dropped too.
        """
        lent = self._lent
        if lent:
            due = lent.keys() if stepping is None else set(map(id, members([stepping])))
            lent = self._lent = {key: gradient for key, gradient in lent.items() if key not in due}
        stray = [p for p in self.parameters if p.grad is not None and (not lent or p.grad is not lent.get(id(p)))]
        for parameter in stray:
            parameter.grad = None
        return stray

    def lend(self, optimizers: Iterable[Optimizer]) -> None:
        """Set one zero gradient in each wholly frozen optimizer, until its step: a GradScaler refuses it without."""
        frozen = set(map(id, self.parameters))
        for optimizer in optimizers:
            own = members([optimizer])
            if own and all(id(parameter) in frozen for parameter in own):
                smallest = min(own, key=torch.numel)
                smallest.grad = self._lent[id(smallest)] = torch.zeros_like(smallest)
