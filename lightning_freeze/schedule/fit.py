"""A schedule resolved against one module and its optimizers, for one fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze._lightning import SHARDED, MisconfigurationException, Trainer, optimizers_of
from lightning_freeze.freezing.fsdp import CheckpointsByName
from lightning_freeze.freezing.ledger import Ledger
from lightning_freeze.freezing.optimizers import OptimizerState, PhasedOptimizer, members
from lightning_freeze.freezing.step_view import Scale
from lightning_freeze.functional import scalars, topmost
from lightning_freeze.logs import get_logger
from lightning_freeze.schedule.length import steps_at_most
from lightning_freeze.schedule.meaning import FrozenMode, Resolved, resolve_phases
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.preset import Preset, phases_for
from lightning_freeze.schedule.schedulers import PhaseSchedulers
from lightning_freeze.words import listed, quoted

_log = get_logger(__name__)


@dataclass
class Fit:
    """A schedule at work."""

    phases: Sequence[Phase]
    ledger: Ledger
    resolved: Resolved
    policy: OptimizerState
    schedulers: PhaseSchedulers
    resolve: Callable[[Sequence[Phase]], Resolved]  # returns what phases mean for the module
    optimizers: list[PhasedOptimizer] = field(default_factory=list)
    checkpoints: CheckpointsByName | None = None

    def begin(self, trainer: Trainer) -> None:
        """Take the Trainer's optimizers under the schedule."""
        self.follow(trainer)
        if isinstance(trainer.strategy, SHARDED):
            self.checkpoints = CheckpointsByName(trainer.strategy, self.ledger.parameters, self.ledger.steps.paused)

    def take_steps(self, trainer: Trainer) -> None:
        """Take the phases that depend on how many optimizer steps the fit takes, now that its data is there."""
        if isinstance(self.phases, Preset) and self.phases.take_steps(steps_at_most(trainer)):
            self.resolved = self.resolve(self.phases)

    def follow(self, trainer: Trainer) -> bool:
        """Take optimizers over that somebody has put in the place of others; return whether there were any."""
        optimizers = optimizers_of(trainer)
        if optimizers == [phased.optimizer for phased in self.optimizers]:
            return False
        self._release_optimizers()
        self.schedulers = _schedulers(trainer)
        adopt = self._to_adopt(optimizers)
        sparse = _sparse(self.ledger.module) if adopt else []
        with self.ledger.steps.paused():  # throw-away optimizers step, and some fail
            for optimizer in optimizers:
                phased = PhasedOptimizer(
                    optimizer, scales=self.resolved.scales, adopt=adopt, optimizer_state=self.policy, sparse=sparse
                )
                self.optimizers.append(phased)
                if phased.view:
                    self.ledger.steps.before.append(phased.view.show)
                    self.ledger.steps.after.append(phased.view.hide)
        self.ledger.try_optimizers(frozenset().union(*(hold.frozen for hold in self.resolved.holds)))
        return True

    def apply(self, index: int, factor: Callable[[Scale], float]) -> None:
        """Follow a phase; ``factor`` says, before each step, which factor a learning rate scale is."""
        for phased in self.optimizers:
            phased.apply(index, self.ledger.trains, factor)

    def state(self) -> list[dict[str, Any]]:
        """Return what the optimizers' own states do not have, for a checkpoint."""
        self.ledger.steps.suspend()
        return [phased.state() | self.schedulers.state(phased.optimizer) for phased in self.optimizers]

    def load_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take over what :meth:`state` returned."""
        if len(states) != len(self.optimizers):
            return
        for phased, state in zip(self.optimizers, states, strict=True):
            phased.load_state(state)
            if "rates" in state:
                self.schedulers.saved[phased.optimizer] = state["rates"]

    def rates(self, index: int) -> dict[str, float]:
        """Return the learning rates of what the phase scales and trains, by selector."""
        scaled = self.resolved.scaled[index].items()
        found = ((select, phased.view.rate(one)) for select, one in scaled for phased in self.optimizers)
        return {select: rate for select, rate in found if rate is not None}

    def trainable(self) -> int:
        """Return how many scalars train."""
        return sum(scalars(p) for p in self.ledger.parameters.values() if id(p) in self.ledger.trains)

    def release(self) -> list[dict[str, Any]]:
        """Leave the optimizers as the user made them; return their last :meth:`state`."""
        if self.checkpoints is not None:
            self.checkpoints.release()
        state = self.state()
        self._release_optimizers()
        return state

    def _release_optimizers(self) -> None:
        self.ledger.steps.suspend()
        self.schedulers.end()
        for phased in self.optimizers:
            if phased.view:
                self.ledger.steps.before.remove(phased.view.show)
                self.ledger.steps.after.remove(phased.view.hide)
            phased.release()
        self.optimizers = []

    def _to_adopt(self, optimizers: Sequence[Optimizer]) -> dict[str, nn.Parameter]:
        parameters, strategy = self.ledger.parameters, self.ledger.strategy
        held, ours = {id(p): p for p in members(optimizers)}, set(map(id, parameters.values()))
        if outside := [p for key, p in held.items() if key not in ours]:
            raise MisconfigurationException(
                f"The optimizer holds {len(outside)} parameter(s) that are not the LightningModule's, of shape "
                f"{', '.join(str(tuple(p.shape)) for p in outside[:5])}: they have no name, so no phase can say "
                "whether they train, and no checkpoint would hold them. Make them part of the LightningModule."
            )
        wanted = {name for trains in self.resolved.trains for name in trains}
        adopt = {n: p for n, p in parameters.items() if n in wanted and id(p) not in held}
        if not adopt or not optimizers:
            return {}
        keys = set(map(id, adopt.values()))
        left_out = quoted([f"!{name}" for name in topmost(self.ledger.module, keys)])
        if len(optimizers) > 1:
            raise MisconfigurationException(
                f"The schedule trains parameters that none of the {len(optimizers)} optimizers holds: "
                f"{listed(adopt)}. Which one should is for you to say: give them to one in configure_optimizers, or "
                f'leave them out, Phase(["*", {left_out}]).'
            )
        if isinstance(strategy, SHARDED):
            raise MisconfigurationException(
                f"The schedule trains parameters that the optimizer was not given: {listed(adopt)}. With "
                f"{type(strategy).__name__}, which saves optimizers in parts, they cannot be added later: give them to "
                "the optimizer in configure_optimizers; a phase says from when on they train."
            )
        # What came trainable was left out by the user, not by a filter.
        say = _log.info if keys <= self.ledger.came_frozen else _log.warning
        say(
            "the schedule trains %d parameters that the optimizer was not given; it takes them into its first group: "
            '%s. To leave them out, take them away: Phase(["*", %s]).',
            *(len(adopt), listed(adopt), left_out),
        )
        return adopt


def begin_fit(
    phases: Sequence[Phase], ledger: Ledger, trainer: Trainer, mode: FrozenMode, policy: OptimizerState, who: str
) -> Fit:
    """Return a schedule resolved against the module of a fit, before it has taken over optimizers."""
    came_frozen, held, left_alone = ledger.came_frozen, ledger.held(without=who), ledger.left_alone()
    phases = phases_for(phases, ledger.module, {*came_frozen, *held})
    resolve = partial(
        resolve_phases, ledger.module, came_frozen=came_frozen, held=held, mode=mode, left_alone=left_alone
    )
    return Fit(phases, ledger, resolve(phases), policy, _schedulers(trainer), resolve)


def _schedulers(trainer: Trainer) -> PhaseSchedulers:
    return PhaseSchedulers(trainer.lightning_module, optimizers_of(trainer), trainer.strategy.lr_scheduler_configs)


def _sparse(module: nn.Module) -> list[int]:
    """Return the identities of parameters that get sparse gradients."""
    sparse = [child for child in module.modules() if getattr(child, "sparse", False) is True]
    return [id(parameter) for child in sparse for parameter in child.parameters(recurse=False)]
