"""Parameters that an optimizer was given and must not hold, while its checkpoint stays the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class _Place:
    """Where a parameter was: the index of its group, the index in it, and the name the user gave it, if any."""

    group: int
    index: int
    parameter: nn.Parameter
    name: str | None


class Withheld:
    """Keep parameters out of an optimizer, whoever put them in.

    Number and order of the groups stay, so that LR schedulers keep working; a group may be empty. While the optimizer's
    state is saved or loaded the parameters are back in their places, so a checkpoint does not show that they were out.

    Args:
        optimizer: Any optimizer; its lists change in place.
        parameters: What it must not hold. Those it does not have are fine.

    Raises:
        ValueError: If the optimizer is LBFGS and has one of them: it makes one vector of all its parameters.

    Example:
        >>> from torch.optim import SGD
        >>> net = nn.Linear(2, 1)
        >>> sgd = SGD(net.parameters())
        >>> withheld = Withheld(sgd, [net.bias])
        >>> len(sgd.param_groups[0]["params"]), len(sgd.state_dict()["param_groups"][0]["params"])
        (1, 2)
        >>> withheld.release()
        >>> len(sgd.param_groups[0]["params"])
        2
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._unwanted = {id(parameter) for parameter in parameters}
        self._handles: list[RemovableHandle] = []
        self._out: list[_Place] = []
        self._take_out()
        if not self._out:
            return
        if isinstance(optimizer, LBFGS):
            self._put_back()
            raise ValueError(
                "LBFGS makes one vector of all its parameters, so none can be kept out of it. Build it with the "
                "parameters that train."
            )
        self._handles = [
            optimizer.register_state_dict_pre_hook(lambda _: self._put_back()),
            optimizer.register_state_dict_post_hook(lambda _, __: self._take_out()),
            optimizer.register_load_state_dict_pre_hook(lambda _, __: self._put_back()),
            optimizer.register_load_state_dict_post_hook(lambda _: self._take_out()),
        ]

    def release(self) -> None:
        """Give the optimizer back whole."""
        for handle in self._handles:
            handle.remove()
        self._put_back()

    def _take_out(self) -> None:
        for number, group in enumerate(self._optimizer.param_groups):
            params, names = group["params"], group.get("param_names")
            out = [
                _Place(number, index, parameter, names[index] if names else None)
                for index, parameter in enumerate(params)
                if id(parameter) in self._unwanted
            ]
            if out:
                gone = {place.index for place in out}
                _keep(group, [index for index in range(len(params)) if index not in gone])
                self._out += out

    def _put_back(self) -> None:
        out, self._out = self._out, []
        for place in out:
            group = self._optimizer.param_groups[place.group]
            group["params"].insert(place.index, place.parameter)
            if place.name is not None:
                group["param_names"].insert(place.index, place.name)


def _keep(group: dict[str, Any], indices: list[int]) -> None:
    group["params"][:] = [group["params"][index] for index in indices]
    if "param_names" in group:  # a new list: a state that was saved holds the old one
        group["param_names"] = [group["param_names"][index] for index in indices]
