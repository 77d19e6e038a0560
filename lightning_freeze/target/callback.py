"""A gradient-free copy of a network that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze._lightning import LightningModule, MisconfigurationException, Trainer, callbacks_of, optimizers_of
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.freezing.ledger import Hold
from lightning_freeze.freezing.optimizers import members
from lightning_freeze.freezing.strategies import refuse_shards, refuse_without_hooks
from lightning_freeze.logs import get_logger
from lightning_freeze.names import module_named
from lightning_freeze.target.core import Pair, checked_tau, hard_copy, pair_up, polyak_average, shared_parameters
from lightning_freeze.words import listed, whole_number

_log = get_logger(__name__)


class TargetNetwork(Holder):
    """Let a target network follow another of the same architecture: in Q-learning, BYOL, a mean teacher.

    The target is a module of yours, most simply ``self.target = copy.deepcopy(self.online)``. A fresh fit begins with a
    copy of the source. After every optimizer step that trains the source, the target follows: by a Polyak average,
    ``target += tau * (source - target)``, or by a copy every so many steps. It never requires grad, also where an
    optimizer or a phase such as ``"*"`` has it too. After the fit, flags and modes are as they were.
    ``docs/how-it-works.md`` says what counts as a step, and what holds under DDP.

    Args:
        source: The dotted name of the module to follow, such as ``"online"`` or ``"agent.critic"``.
        target: The dotted name of the module that follows.
        tau: How far the target moves after each step, in [0, 1], or a function of the steps counted so far that
            returns it, as BYOL has it: ``lambda step: 0.002 * (1 + math.cos(math.pi * step / total))``. Keep weights in
            float32: in bfloat16 small steps are lost to rounding.
        every_n_steps: After how many steps the target becomes a copy, at least 1.
        copy_buffers: Whether the buffers in the ``state_dict``, such as a BatchNorm's running statistics, follow too:
            floating ones are averaged, others copied. If not, the target keeps its own, also at the start.
        eval_mode: Keep the target in eval mode, whatever calls ``train()``. If not, it is in the mode that you put it
            in: in training mode it has dropout, and batch statistics in its BatchNorm.

    Attributes:
        steps: How many steps have counted so far.

    Raises:
        ValueError: If not exactly one of ``tau`` and ``every_n_steps`` is given, an argument is out of range, or one
            module is the other or inside it; at fit start, if a name names no module, the architectures differ, or the
            target shares parameters with another module.
        TypeError: If an argument is of another type.
        MisconfigurationException: At fit start, if the Trainer has a strategy, an optimizer or a callback with which
            the target cannot follow exactly.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TargetNetwork("online", "target", tau=0.005)], logger=False,
        ...     enable_checkpointing=False)
    """

    _fit: tuple[list[Pair], set[int]] | None = None

    def __init__(
        self,
        source: str,
        target: str,
        *,
        tau: float | Callable[[int], float] | None = None,
        every_n_steps: int | None = None,
        copy_buffers: bool = True,
        eval_mode: bool = False,
    ) -> None:
        _check_names(source, target)
        if (tau is None) == (every_n_steps is None):
            raise ValueError(
                f"TargetNetwork(tau={tau!r}, every_n_steps={every_n_steps!r}): give one of the two, tau=0.005 for a "
                "Polyak average after every step, or every_n_steps=1000 for a copy after so many."
            )
        if every_n_steps is not None:
            every_n_steps = whole_number("TargetNetwork", "every_n_steps", every_n_steps)
        self.source, self.target, self.every_n_steps = source, target, every_n_steps
        self.tau = tau if tau is None or callable(tau) else checked_tau("TargetNetwork", tau)
        self.copy_buffers, self.eval_mode = copy_buffers, eval_mode
        self.steps = 0
        self._restored = False

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint; the target is in it, as a Trainer may have several of these."""
        return self._generate_state_key(target=self.target)

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps have counted; the target itself is in the model's state."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.steps = state_dict["steps"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that the target comes from a checkpoint, also if that was written without this callback."""
        self._restored = True
        self.steps = 0

    def holds(self, module: nn.Module) -> Hold:
        """Return the target: it never trains, whatever a schedule selects, and its mode is this callback's."""
        inside = tuple(self._named(module, "target").modules())
        frozen = frozenset(id(parameter) for parameter in inside[0].parameters())
        return Hold(frozen, inside if self.eval_mode else (), own=frozenset(inside))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier fit restored; a checkpoint is loaded after this."""
        self._restored = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the two, freeze the target and, in a fresh fit, copy the source."""
        self._check_trainer(trainer)
        source, target = self._named(pl_module, "source"), self._named(pl_module, "target")
        names = (f"source {self.source!r}", f"target {self.target!r}")
        pairs = pair_up(source, target, buffers=self.copy_buffers, names=names)
        _check_unshared(pl_module, target, names[1])
        super().on_fit_start(trainer, pl_module)
        self._fit = pairs, {id(parameter) for parameter in source.parameters()}
        self.ledger.steps.counted.append(self._after_step)
        if not self._restored and trainer.global_step == 0 and trainer.current_epoch == 0:
            self.steps = 0
            hard_copy(pairs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a source that no optimizer steps."""
        super().on_train_start(trainer, pl_module)
        _, sources = self._fit or ([], set())
        if sources.isdisjoint(map(id, members(optimizers_of(trainer)))):
            _log.warning(
                "TargetNetwork: no optimizer holds a parameter of %r, so %r rests until one does.",
                *(self.source, self.target),
            )

    def _after_step(self, optimizer: Optimizer) -> None:
        """Follow, if the optimizer trains the source."""
        if self._fit is None or _was_skipped(optimizer):
            return
        pairs, sources = self._fit
        if (sources & self.ledger.trains).isdisjoint(map(id, members([optimizer]))):
            return
        self.steps += 1
        if self.tau is not None:
            tau = checked_tau("TargetNetwork", self.tau(self.steps - 1)) if callable(self.tau) else self.tau
            polyak_average(pairs, tau)
        elif self.every_n_steps is not None and self.steps % self.every_n_steps == 0:
            hard_copy(pairs)

    def _check_trainer(self, trainer: Trainer) -> None:
        """Refuse a strategy, an optimizer or a callback with which the target cannot follow."""
        refuse_shards("TargetNetwork", trainer.strategy)
        if not optimizers_of(trainer):
            raise MisconfigurationException(
                "TargetNetwork follows the steps of an optimizer, and configure_optimizers gave none. Return one, with "
                "manual optimization too."
            )
        refuse_without_hooks("TargetNetwork", trainer)
        others = [callback for callback in callbacks_of(trainer) if isinstance(callback, TargetNetwork)]
        if any(other.target == self.source for other in others):
            raise MisconfigurationException(
                f"TargetNetwork({self.source!r}, {self.target!r}): {self.source!r} is itself a target, so no optimizer "
                "steps it. Let both follow the same source."
            )

    def _named(self, module: nn.Module, role: str) -> nn.Module:
        name = getattr(self, role)
        return module_named(module, name, f"TargetNetwork({role}={name!r})")

    def _close(self, trainer: Trainer) -> None:
        self._fit = None
        super()._close(trainer)


def _check_names(source: object, target: object) -> None:
    """Refuse what cannot be the dotted names of two modules, neither of them in the other."""
    for role, name in (("source", source), ("target", target)):
        if not isinstance(name, str):
            raise TypeError(f"TargetNetwork({role}={name!r}): it is the dotted name of a module, such as {role!r}.")
        if not name:
            raise ValueError(f"TargetNetwork({role}=''): name a module inside the LightningModule, such as {role!r}.")
    if source == target:
        raise ValueError(f"TargetNetwork({source!r}, {target!r}): a module cannot follow itself. Name its copy.")
    for inner, outer in ((source, target), (target, source)):
        if str(inner).startswith(f"{outer}."):
            raise ValueError(
                f"TargetNetwork({source!r}, {target!r}): {inner!r} is inside {outer!r}, so it would be part of its own "
                "copy. Keep the two side by side."
            )


def _was_skipped(optimizer: Optimizer) -> bool:
    """Return whether AMP has had a fused optimizer skip this step; it waits for the device."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)  # lent to it by the GradScaler
    return found_inf is not None and bool(found_inf.item())


def _check_unshared(pl_module: nn.Module, target: nn.Module, which: str) -> None:
    """Refuse a target that shares parameters with a module outside of it."""
    inside = set(target.modules())
    outside = [p for module in pl_module.modules() if module not in inside for p in module.parameters(recurse=False)]
    if shared := shared_parameters(target, outside):
        raise ValueError(
            f"The {which} shares parameters with a module outside of it: {listed(shared)}. They would not train there "
            "either. Build the target with copy.deepcopy."
        )
