"""Parameters that an optimizer takes in although ``configure_optimizers`` did not give them to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.freezing.trial import try_adoption


class Adoption:
    """Keeps parameters at the end of an optimizer's first group, and out of its ``state_dict()``.

    Saving and loading see the optimizer as the user made it. The state of what is adopted is saved apart, by name, as
    the optimizer's own ``state_dict()`` has it: :meth:`state`. ``sparse``, and what is raised, are as of
    :func:`try_adoption`.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], sparse: Iterable[int]) -> None:
        self.optimizer, self.parameters = optimizer, dict(parameters)
        self._stash: dict[nn.Parameter, Any] | None = {}  # their state while they are out
        self._pinned = False  # whether they stay in while states are saved and loaded
        self._handles: list[Any] = []
        if self.parameters:
            self._stash = try_adoption(optimizer, parameters, sparse)
            self._handles = [
                optimizer.register_state_dict_pre_hook(self._take_out),
                optimizer.register_state_dict_post_hook(self._take_in),
                optimizer.register_load_state_dict_pre_hook(self._take_out),
                optimizer.register_load_state_dict_post_hook(self._take_in),
            ]
            self._take_in()

    def state(self) -> dict[str, Any]:
        """Return the state of each adopted parameter that has one, by name."""
        states = self.optimizer.state
        return {name: states[parameter] for name, parameter in self.parameters.items() if parameter in states}

    def load_state(self, states: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned; a parameter that is not in it begins anew."""
        if not self.parameters:
            return
        places = {id(p): place for place, p in enumerate(self.optimizer.param_groups[0]["params"])}
        numbers = {name: places[id(p)] for name, p in self.parameters.items()}
        self._pinned = True  # it converts states as it does its own, if it has all of them
        whole = self.optimizer.state_dict()
        kept = {number: state for number, state in whole["state"].items() if number not in numbers.values()}
        kept |= {number: states[name] for name, number in numbers.items() if name in states}
        self.optimizer.load_state_dict({**whole, "state": kept})
        self._pinned = False

    def release(self) -> None:
        """Take the parameters out for good."""
        for handle in self._handles:
            handle.remove()
        self._take_out()

    def _take_in(self, *_: Any) -> None:
        if self._stash is None:
            return
        group = self.optimizer.param_groups[0]
        group["params"].extend(self.parameters.values())
        if "param_names" in group:
            group["param_names"] = [*group["param_names"], *self.parameters]
        self.optimizer.state.update(self._stash.items())
        self._stash = None

    def _take_out(self, *_: Any) -> None:
        if self._stash is not None or self._pinned:
            return
        group, gone = self.optimizer.param_groups[0], {id(p) for p in self.parameters.values()}
        kept = [place for place, p in enumerate(group["params"]) if id(p) not in gone]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][place] for place in kept]
        group["params"][:] = [group["params"][place] for place in kept]
        self._stash = {p: self.optimizer.state.pop(p) for p in self.parameters.values() if p in self.optimizer.state}
