"""Which parameters optimizers hold: twice, or frozen and about to be moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer


def held_twice(optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Give the parameters that are held more than once, compared by identity, and where.

    Args:
        optimizers: All optimizers that train at the same time; one that comes twice counts once.
        parameters: Name to parameter, for what is looked for.

    Returns:
        Name to the places that hold it, for example ``["Adam 0, group 0", "SGD 1, group 0"]``.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> held_twice([torch.optim.SGD(net.parameters()), torch.optim.Adam([net.bias])], dict(net.named_parameters()))
        {'bias': ['SGD 0, group 0', 'Adam 1, group 0']}
    """
    places: dict[int, list[str]] = {}
    for index, optimizer in enumerate({id(optimizer): optimizer for optimizer in optimizers}.values()):
        for number, group in enumerate(optimizer.param_groups):
            for parameter, times in Counter(map(id, group["params"])).items():
                places.setdefault(parameter, []).extend([f"{type(optimizer).__name__} {index}, group {number}"] * times)
    return {name: places[id(p)] for name, p in parameters.items() if len(places.get(id(p), [])) > 1}


def moved_by(optimizer: Optimizer) -> set[int]:
    """Give the identities of the frozen parameters that a step would move now: those that have a gradient all the same.

    Momentum and weight decay move them also where that gradient is zero.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> _ = net.bias.requires_grad_(False)
        >>> moved_by(torch.optim.SGD(net.parameters())) == {id(net.bias)}
        True
    """
    return {
        id(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not parameter.requires_grad and parameter.grad is not None and group.get("lr", 1) != 0
    }


def state_marks(
    optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, tuple[object, ...]]:
    """Give, for each parameter, what changes when an optimizer that keeps a state has stepped it.

    Returns:
        Name to marks; equal marks at two times mean that no such step was taken between them. An optimizer without
        state, as SGD without momentum, leaves no mark.
    """
    return {
        name: tuple(
            mark
            for optimizer in optimizers
            if parameter in optimizer.state
            for mark in _marks(optimizer.state[parameter])
        )
        for name, parameter in parameters.items()
    }


def _marks(state: Mapping[str, object]) -> list[object]:
    return [
        (key, (id(value), value._version) if isinstance(value, Tensor) else repr(value)) for key, value in state.items()
    ]
