"""One ledger a fit: who keeps which parameters frozen, and everything that follows from it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze._lightning import Strategy
from lightning_freeze.freezing.batchnorm import affine_frozen_by_hand, has_running_statistics
from lightning_freeze.freezing.ddp import follow_trainable_set
from lightning_freeze.freezing.eval_mode import BY_HAND, hold, interceptor, release
from lightning_freeze.freezing.fsdp import reshard
from lightning_freeze.freezing.gradients import FrozenGradients
from lightning_freeze.freezing.optimizers import members
from lightning_freeze.freezing.steps import Steps
from lightning_freeze.freezing.trial import try_frozen
from lightning_freeze.functional import can_train, set_trainable, topmost
from lightning_freeze.logs import get_logger
from lightning_freeze.selectors import named_unique_parameters
from lightning_freeze.words import listed, quoted

_log = get_logger(__name__)


@dataclass(frozen=True)
class Hold:
    """What one holder asks for; parameters are given by identity."""

    frozen: frozenset[int] = frozenset()
    eval_mode: tuple[nn.Module, ...] = ()  # stay there, each without its children
    trains: frozenset[int] = frozenset()  # unless a holder keeps them frozen
    own: frozenset[nn.Module] = frozenset()  # in the mode that this holder chooses, be it eval mode or not


class Ledger:
    """Brings flags, modes, gradients and the wrapper in line with what the holders of a fit ask for.

    A parameter that a holder keeps frozen is frozen, whoever else wants it to train. :meth:`settle` goes by what was
    decided, not by the flags it finds: other code switches those too, for an online evaluation or a GAN's other half.
    """

    def __init__(self, strategy: Strategy, module: nn.Module) -> None:
        reshard(strategy, module)
        self.module, self.strategy = module, strategy
        self.parameters = named_unique_parameters(module)
        self._flags = {id(p): p.requires_grad for p in self.parameters.values()}  # as the fit found them
        self._touched: set[int] = set()  # other flags are the user's to change
        self.trains = {key for key, flag in self._flags.items() if flag}  # as decided last, by identity
        self._holds: dict[str, Hold] = {}
        self._done = set[object]()  # warnings that were given, optimizers that were tried
        self.gradients = FrozenGradients(self._warn_of_switched)
        self.steps = Steps()
        self.steps.before.append(self.gradients.begin_step)

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules, as the fit found them."""
        return list(self.module.modules())

    @cached_property
    def batchnorm(self) -> list[nn.Module]:
        """The layers with running statistics."""
        return [layer for layer in self.modules if has_running_statistics(layer)]

    @property
    def came_frozen(self) -> set[int]:
        """The identities of what could train and did not require grad when the fit began."""
        return {id(p) for p in self.parameters.values() if can_train(p) and not self._flags[id(p)]}

    def has(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer steps parameters of the module."""
        return not self._flags.keys().isdisjoint(map(id, members([optimizer])))

    def hold(self, who: str, hold: Hold) -> None:
        """Replace what a holder asks for; :meth:`settle` then does it."""
        self._holds[who] = hold

    def held(self, *, without: str = "") -> dict[int, str]:
        """Return who keeps a parameter frozen, by its identity, ``without`` one holder."""
        by_hand = {BY_HAND: Hold(frozenset(affine_frozen_by_hand(self.modules)))}
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
        self._warn_of_switched(self.gradients.parameters)
        before, frozen = self.trains, self.held().keys()
        wanted = {key for hold in self._holds.values() for key in hold.trains}
        self.trains = {key for key, found in self._flags.items() if key not in frozen and (found or key in wanted)}
        self.gradients.watch([p for p in self.parameters.values() if id(p) in frozen])
        if modes:  # first: a module's own train() may set flags
            stay = dict.fromkeys(module for hold in self._holds.values() for module in hold.eval_mode)
            self._release_modes(stay)
            for child in stay:
                hold(child)
        for parameter in self.parameters.values():
            key = id(parameter)
            if key in frozen or key in wanted or key in self._touched:
                set_trainable(parameter, key in self.trains)
            if key in self.trains and key not in before:
                parameter.grad = None  # from before its phase
        self._touched = frozen | wanted
        self.try_optimizers(frozen)
        if self.trains != before:
            froze = before - self.trains
            follow_trainable_set(self.strategy, [p for p in self.parameters.values() if id(p) in froze])

    def look_again(self) -> None:
        """Put right what hooks of the module have done at an epoch's start, which run after those of callbacks."""
        reshard(self.strategy, self.module)  # else parameters that are gathered would look like new ones
        off = {id(p) for p in self.parameters.values() if not p.requires_grad} & self.trains & self._touched
        self._warn(
            "other code has switched off requires_grad of %d parameter(s) that shall train: %s. They train all the "
            'same. To keep them frozen, take them away from the phases: ["*", %s].',
            self._names(off),
            quoted([f"!{name}" for name in topmost(self.module, off)]),
        )
        self._warn(
            "%d parameter(s) are in the module that were not when the fit began: %s. No phase decides whether they "
            "train: make them in __init__, setup or configure_model.",
            [name for name, p in named_unique_parameters(self.module).items() if id(p) not in self._flags],
        )
        if off:
            self.settle()

    def try_optimizers(self, frozen: Collection[int]) -> None:
        """Refuse an optimizer that cannot pass by those of its parameters that freeze, now or later in the fit.

        Raises:
            ValueError: If there is one.
        """
        for optimizer in self.strategy.optimizers:
            if optimizer not in self._done and any(id(p) in frozen for p in members([optimizer])):
                self._done.add(optimizer)
                with self.steps.paused():
                    try_frozen(optimizer)

    def as_after_fit(self, hyperparameters: dict[str, Any], live: Mapping[str, Any]) -> None:
        """Put copies in the place of modules among hyperparameters that are about to be saved, as they came.

        ``save_hyperparameters()`` keeps the module that the LightningModule was built with, so what the fit does to it
        would be saved. The copies share the memory of all tensors.
        """
        for key, module in live.items():
            if hyperparameters.get(key) is not module or not isinstance(module, nn.Module):
                continue
            memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
            for parameter in module.parameters():
                copied = memo[id(parameter)] = copy.copy(parameter)
                copied.requires_grad = self._flags.get(id(parameter), parameter.requires_grad)
            hyperparameters[key] = twin = copy.deepcopy(module, memo)
            for child, copy_of in zip(module.modules(), twin.modules(), strict=True):
                if (stay := interceptor(child)) is not None:  # a fit does not hold the copy, which is in eval mode
                    hold(copy_of).wants_training = stay.wants_training
                    release(copy_of, training=self.module.training)

    def close(self) -> None:
        """Restore flags and modes; what was learned stays. Calling it again does nothing."""
        self.steps.close()
        self.gradients.drop()
        reshard(self.strategy, self.module)
        self._release_modes()
        by_hand = affine_frozen_by_hand(self.modules)
        for parameter in self.parameters.values():
            if id(parameter) in self._touched and id(parameter) not in by_hand:
                parameter.requires_grad = self._flags[id(parameter)]
        self._touched = set()
        self.gradients.watch([])

    def _release_modes(self, stay: Collection[nn.Module] = ()) -> None:
        for child in self.modules:
            if "train" in vars(child) and child not in stay:  # most are not held
                release(child, training=self.module.training)

    def _warn_of_switched(self, parameters: Iterable[nn.Parameter]) -> None:
        self._warn(
            "other code has switched on requires_grad of %d frozen parameter(s): %s. They stay frozen: their gradients "
            "are dropped before each step.",
            self._names({id(parameter) for parameter in parameters if parameter.requires_grad}),
        )

    def _names(self, keys: Collection[int]) -> list[str]:
        return [name for name, parameter in self.parameters.items() if id(parameter) in keys] if keys else []

    def _warn(self, message: str, names: Sequence[str], *arguments: str) -> None:
        if names and message not in self._done:
            self._done.add(message)
            _log.warning(message, len(names), listed(names), *arguments)
