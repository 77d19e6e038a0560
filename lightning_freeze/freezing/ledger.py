"""One ledger a fit: who keeps which parameters frozen, and everything that follows from it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from lightning_freeze._lightning import LightningModule, Strategy, Trainer
from lightning_freeze.freezing.batchnorm import affine_frozen_by_hand, has_running_statistics
from lightning_freeze.freezing.ddp import follow_trainable_set
from lightning_freeze.freezing.eval_mode import BY_HAND, hold, leave_as_after_fit, release
from lightning_freeze.freezing.fsdp import reshard
from lightning_freeze.freezing.gradients import FrozenGradients
from lightning_freeze.freezing.steps import Steps
from lightning_freeze.functional import can_train, set_trainable
from lightning_freeze.logs import get_logger
from lightning_freeze.selectors import named_unique_parameters
from lightning_freeze.words import listed

_log = get_logger(__name__)


@dataclass(frozen=True)
class Hold:
    """What one holder asks for.

    Args:
        frozen: The identities of parameters that it keeps frozen.
        eval_mode: Modules that it keeps in eval mode, each without its children.
        trains: The identities of parameters that train unless a holder keeps them frozen.
        own: Modules whose mode is this holder's to choose, whether it keeps them in eval mode or not.
    """

    frozen: frozenset[int] = frozenset()
    eval_mode: tuple[nn.Module, ...] = ()
    trains: frozenset[int] = frozenset()
    own: frozenset[nn.Module] = frozenset()


@dataclass
class _Found:
    """How the fit found the module; what it has not touched is the user's to change."""

    flags: dict[int, bool]
    layers: list[nn.Module]
    touched: set[int] = field(default_factory=set)


class Ledger:
    """Brings flags, modes, gradients and the wrapper in line with what the holders of a fit ask for.

    A parameter that a holder keeps frozen is frozen, whoever else wants it to train. :meth:`settle` goes by what was
    decided, not by the flags it finds: other code switches those too, for an online evaluation or a GAN's other half.

    Attributes:
        parameters: All parameters by name, tied ones once.
        trains: The identities of the parameters that train, as decided last.
        gradients: Those of what is frozen.
        steps: What is done around the optimizers' steps during the fit.
    """

    def __init__(self, strategy: Strategy, module: nn.Module) -> None:
        reshard(strategy, module)
        self.module, self.strategy = module, strategy
        self.parameters = named_unique_parameters(module)
        layers = [layer for layer in module.modules() if has_running_statistics(layer)]
        self._found = _Found({id(p): p.requires_grad for p in self.parameters.values()}, layers)
        self.trains = {key for key, flag in self._found.flags.items() if flag}
        self._holds: dict[str, Hold] = {}
        self._in_eval: list[nn.Module] = []
        self._warned = False
        self.gradients = FrozenGradients(self._warn_of_switched)
        self.steps = Steps()
        self.steps.before.append(self.gradients.begin_step)
        self.steps.after.append(self.gradients.end_step)

    @property
    def batchnorm(self) -> list[nn.Module]:
        """The layers with running statistics."""
        return self._found.layers

    @property
    def came_frozen(self) -> set[int]:
        """The identities of what could train and did not require grad when the fit began."""
        return {id(p) for p in self.parameters.values() if can_train(p) and not self._found.flags[id(p)]}

    def has(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer steps parameters of the module."""
        return any(id(p) in self._found.flags for group in optimizer.param_groups for p in group["params"])

    def hold(self, who: str, hold: Hold) -> None:
        """Replace what a holder asks for; :meth:`settle` then does it."""
        self._holds[who] = hold

    def held(self, *, without: str = "") -> dict[int, str]:
        """Return who keeps a parameter frozen, by its identity, ``without`` one holder."""
        by_hand = {BY_HAND: Hold(frozenset(affine_frozen_by_hand(self._found.layers)))}
        holds = {**self._holds, **by_hand}
        return {key: who for who, hold in holds.items() if who != without for key in hold.frozen}

    def left_alone(self) -> set[nn.Module]:
        """Return the modules whose mode one holder chooses."""
        return {module for hold in self._holds.values() for module in hold.own}

    def settle(self, *, modes: bool = True) -> None:
        """Bring everything in line; doing it twice changes nothing. For all ranks at the same step.

        Without ``modes``, no module changes mode: Lightning warns of some in eval mode before ``on_train_start``.
        """
        reshard(self.strategy, self.module)
        before, frozen = self.trains, self.held().keys()
        wanted = {key for hold in self._holds.values() for key in hold.trains}
        self._warn_of_switched(self.gradients.parameters)
        self.trains = set()
        self.gradients.watch([])
        for parameter in self.parameters.values():
            self._decide(parameter, frozen=id(parameter) in frozen, wanted=id(parameter) in wanted)
            if id(parameter) in self.trains and id(parameter) not in before:
                parameter.grad = None  # from before its phase
        if modes:
            stay = dict.fromkeys(module for hold in self._holds.values() for module in hold.eval_mode)
            self._release_modes(stay)
            for child in stay:
                hold(child)
            self._in_eval = list(stay)
        if self.trains != before:
            froze = before - self.trains
            follow_trainable_set(self.strategy, [p for p in self.parameters.values() if id(p) in froze])

    def as_after_fit(self, hyperparameters: dict[str, Any], live: Mapping[str, Any]) -> None:
        """Put copies in the place of modules among hyperparameters that are about to be saved, as they came.

        ``save_hyperparameters()`` keeps the module that the LightningModule was built with, so what the fit does to it
        would be saved. The copies share the memory of all tensors.
        """
        for key, module in live.items():
            if hyperparameters.get(key) is not module or not isinstance(module, nn.Module):
                continue
            memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
            memo |= {id(parameter): copy.copy(parameter) for parameter in module.parameters()}
            twin = copy.deepcopy(module, memo)
            for parameter, copied in zip(module.parameters(), twin.parameters(), strict=True):
                copied.requires_grad = self._found.flags.get(id(parameter), copied.requires_grad)
            leave_as_after_fit(module, twin, training=self.module.training)
            hyperparameters[key] = twin

    def close(self) -> None:
        """Restore flags and modes; what was learned stays. Calling it again does nothing."""
        self.steps.close()
        self.gradients.drop()
        reshard(self.strategy, self.module)
        self._release_modes()
        by_hand = affine_frozen_by_hand(self._found.layers)
        for parameter in self.parameters.values():
            if id(parameter) in self._found.touched and id(parameter) not in by_hand:
                parameter.requires_grad = self._found.flags[id(parameter)]
        self._in_eval, self._found.touched = [], set()
        self.gradients.watch([])

    def _release_modes(self, stay: Collection[nn.Module] = ()) -> None:
        for child in self._in_eval:
            if child not in stay:
                release(child, training=self.module.training)

    def _decide(self, parameter: nn.Parameter, *, frozen: bool, wanted: bool) -> None:
        key, found = id(parameter), self._found
        if frozen or wanted:
            found.touched.add(key)
            set_trainable(parameter, not frozen)
        elif key in found.touched:  # its holder has let it go
            found.touched.remove(key)
            set_trainable(parameter, found.flags[key])
        if frozen:
            self.gradients.parameters.append(parameter)
        elif wanted or found.flags[key]:
            self.trains.add(key)

    def _warn_of_switched(self, parameters: Iterable[nn.Parameter]) -> None:
        switched = {id(parameter) for parameter in parameters if parameter.requires_grad}
        if self._warned or not switched:
            return
        self._warned = True
        names = [name for name, parameter in self.parameters.items() if id(parameter) in switched]
        if self.strategy.is_global_zero:
            _log.warning(
                "other code has switched on requires_grad of %d frozen parameter(s): %s. They stay frozen: their "
                "gradients are dropped before each step.",
                *(len(names), listed(names)),
            )


_LEDGERS: WeakKeyDictionary[Trainer, Ledger] = WeakKeyDictionary()


def open_ledger(trainer: Trainer, pl_module: LightningModule, holds: Mapping[str, Hold]) -> Ledger:
    """Open the ledger of the fit that begins, with what all holders ask for."""
    ledger = _LEDGERS[trainer] = Ledger(trainer.strategy, pl_module)
    for who, asked in holds.items():
        ledger.hold(who, asked)
    return ledger


def ledger_of(trainer: Trainer) -> Ledger | None:
    """Return the ledger of the fit that runs, None if nothing holds anything."""
    return _LEDGERS.get(trainer)


def close_ledger(trainer: Trainer) -> None:
    """End the fit's ledger, if one is open."""
    if (ledger := _LEDGERS.pop(trainer, None)) is not None:
        ledger.close()
