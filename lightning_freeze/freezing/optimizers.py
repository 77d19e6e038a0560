"""An optimizer that follows a schedule and is the user's own outside of its step.

Freezing needs nothing of the optimizer: what has no gradient is passed over. What a schedule needs beside that is a
learning rate scale, parameters that the optimizer was never given, and a policy for the state of what freezes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_freeze._distributed import ZeroRedundancyOptimizer
from lightning_freeze.freezing.adoption import Adoption
from lightning_freeze.freezing.step_view import Scale, StepView, factor_at
from lightning_freeze.freezing.trial import state_anew, try_scales

OptimizerState = Literal["keep", "drop", "offload"]


def members(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """Return the parameters that are in optimizers."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


class PhasedOptimizer:
    """An optimizer under a schedule.

    Args:
        optimizer: Any but LBFGS.
        scales: For each phase, the identity of each parameter whose learning rate is scaled, and its factor, or what
            moves it.
        adopt: Name to parameter, for what the optimizer shall train and was not given.
        optimizer_state: What becomes of a parameter's state when it freezes, see :class:`FreezeSchedule`.
        sparse: The identities of parameters that get sparse gradients.

    Raises:
        ValueError: If the optimizer is refused, has no learning rate where one is scaled, or would refuse in mid-fit
            what is adopted or scaled.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scales: Sequence[Mapping[int, Scale]] = ({},),
        adopt: Mapping[str, nn.Parameter] | None = None,
        optimizer_state: OptimizerState = "keep",
        sparse: Iterable[int] = (),
    ) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS flattens its parameters into one vector when it is built, so none can freeze later. "
                "Use another optimizer, or freeze by hand before configure_optimizers and leave FreezeSchedule out."
            )
        self.optimizer = optimizer
        self._policy = optimizer_state
        self._offloaded: dict[nn.Parameter, dict[str, torch.device]] = {}
        self._adoption = Adoption(optimizer, adopt or {}, sparse)
        try:
            self.view = StepView(optimizer, scales)
            for group, factors in self.view.factors:
                try_scales(optimizer, group, factors)
            if isinstance(optimizer, ZeroRedundancyOptimizer) and (adopt or self.view):
                raise ValueError(
                    "ZeroRedundancyOptimizer deals its parameters out to the ranks when it is built, so they can "
                    "freeze, but none can be added, and their rates cannot be scaled. Leave lr_scale out and give it "
                    "all that shall train; or use the optimizer inside of it."
                )
        except ValueError:
            self._adoption.release()
            raise
        # What a constructor made, a step may not make anew: all of Adagrad in torch 2.6, marks that say how to step.
        self._marks = {
            parameter: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for parameter in members([optimizer])
            if (state := optimizer.state.get(parameter))
        }

    def apply(self, phase: int, trains: Collection[int], factor: Callable[[Scale], float] = factor_at) -> None:
        """Follow a phase, given by its index in ``scales``, what trains, and what says which factor a scale is."""
        self.view.begin(phase, factor)
        if self._policy == "keep":
            return
        for parameter in members([self.optimizer]):
            if id(parameter) in trains:
                self._reload(parameter)
            elif self._policy == "offload":
                self._offload(parameter)
            else:
                self.optimizer.state.pop(parameter, None)
                if marks := self._marks.get(parameter):
                    self.optimizer.state[parameter] = dict(marks)
        active, states = {p: marks for p, marks in self._marks.items() if id(p) in trains}, self.optimizer.state
        if bare := [p for p, marks in active.items() if states.get(p, {}).keys() <= marks.keys()]:
            states.update(state_anew(self.optimizer, bare).items())

    def state(self) -> dict[str, Any]:
        """Return what the optimizer's own ``state_dict()`` does not have, for a checkpoint."""
        return {"adopted": self._adoption.state(), "parts": self.view.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned, also of a schedule that adopts or scales other parameters."""
        self._adoption.load_state(state["adopted"])
        self.view.load_state(state["parts"])

    def release(self) -> None:
        """Leave the optimizer as the user made it."""
        for parameter in members([self.optimizer]):
            self._reload(parameter)
        self._adoption.release()

    def _offload(self, parameter: nn.Parameter) -> None:
        state = self.optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device.type != "cpu":
                self._offloaded.setdefault(parameter, {})[key] = value.device
                state[key] = value.cpu()

    def _reload(self, parameter: nn.Parameter) -> None:
        state = self.optimizer.state.get(parameter, {})
        for key, device in self._offloaded.pop(parameter, {}).items():
            if isinstance(state.get(key), Tensor):
                state[key] = state[key].to(device)
