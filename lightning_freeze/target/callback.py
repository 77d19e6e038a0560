"""A gradient-free copy of a network that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze._lightning import (
    DeepSpeedStrategy,
    FSDPStrategy,
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    Trainer,
    callbacks_of,
    optimizers_of,
)
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.freezing.ledger import Hold
from lightning_freeze.freezing.optimizers import members
from lightning_freeze.logs import get_logger
from lightning_freeze.selectors import clean_name
from lightning_freeze.target.core import Pair, as_tau, hard_copy, pair_up, polyak_average, shared_parameters
from lightning_freeze.words import listed, suggestion, whole_number

_log = get_logger(__name__)


class TargetNetwork(Holder):
    """Let a target network follow another of the same architecture: in Q-learning, BYOL, a mean teacher.

    The target is a module of yours, most simply ``self.target = copy.deepcopy(self.online)``. At the start of a fresh
    fit it is copied from the source; a fit that resumes from a checkpoint or goes on after another keeps it as it is.
    Then it follows: with ``tau`` by a Polyak average, ``target += tau * (source - target)``, after every step; with
    ``every_n_steps`` by a copy after every so many. During the fit it never requires grad, so no optimizer moves it,
    also where you hand one ``self.parameters()``. After the fit, flags and modes are as they were.

    What counts as a step is one of an optimizer that has a parameter of the source that trains. So with gradient
    accumulation only the batches that step count, with manual optimization every call of ``optimizer.step()``, and a
    step that AMP skips does not. An optimizer inside of another one, as SAM has it, counts once, and so does one that
    takes another's place in mid-fit. An optimizer of other parameters, such as an actor's beside a critic's, does not
    count; where two optimizers share the source, each one's step does. The target has followed when
    ``on_train_batch_end`` comes.

    Beside a :class:`FreezeSchedule`, in whichever order the two are given, the target is left out of what a phase such
    as ``"*"`` selects, and its mode is none of the schedule's business. While a phase freezes the source wholly, the
    target rests.

    Under DDP the target does not have to be reduced: every process averages the same source, and no
    ``find_unused_parameters`` is needed. Running statistics of a plain BatchNorm differ between processes in the target
    as they do in the source. A checkpoint has the target's weights as part of the model, and the optimizer as it would
    be saved without the callback.

    Args:
        source: The dotted name of the module to follow, such as ``"online"`` or ``"agent.critic"``.
        target: The dotted name of the module that follows.
        tau: How far the target moves after each step, in [0, 1], or a function of the steps counted so far that
            returns it; Lillicrap et al. 2016 take 0.001, BYOL (Grill et al. 2020) lets it fall from 0.004 to 0 by a
            cosine: ``lambda step: 0.002 * (1 + math.cos(math.pi * step / total))``. Keep weights in float32: in
            bfloat16 such a step is lost to rounding.
        every_n_steps: After how many steps the target becomes a copy, at least 1; Mnih et al. 2015 take 10,000.
        copy_buffers: Whether buffers, such as a BatchNorm's running statistics, follow too: floating ones are averaged
            as parameters are, others are copied. If not, the target's buffers are left alone, also at the start.
            Buffers that are not in the ``state_dict`` are always left alone.
        eval_mode: Keep the target in eval mode while it trains, whatever calls ``train()``. If not, it is in the mode
            that you put it in: a target in training mode has dropout, and batch statistics in its BatchNorm.

    Attributes:
        steps: How many steps have counted so far.

    Raises:
        ValueError: If not exactly one of ``tau`` and ``every_n_steps`` is given, an argument is out of range, or one
            module is the other or inside it; at fit start, if a name names no module, the two have not the same
            architecture, or the target shares parameters with another module.
        TypeError: If an argument is of another type.
        MisconfigurationException: At fit start, if the Trainer has a strategy, an optimizer or a schedule with which
            the target cannot follow exactly.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TargetNetwork("online", "target", tau=0.005)], logger=False,
        ...     enable_checkpointing=False)
    """

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
        if tau is not None and not callable(tau):
            tau = as_tau(tau, "TargetNetwork")
        if every_n_steps is not None:
            every_n_steps = whole_number("TargetNetwork", "every_n_steps", every_n_steps)
        self.source, self.target = source, target
        self.tau, self.every_n_steps = tau, every_n_steps
        self.copy_buffers, self.eval_mode = copy_buffers, eval_mode
        self.steps = 0
        self._restored = False
        self._fit: tuple[list[Pair], set[int]] | None = None

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer are told apart by their target."""
        return self._generate_state_key(target=self.target)

    # Checkpoints

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

    # When

    def holds(self, module: nn.Module) -> Hold:
        """Return the target: it never trains, whatever a schedule selects, and its mode is this callback's."""
        inside = tuple(_module(module, self.target, "target").modules())
        frozen = frozenset(id(parameter) for parameter in inside[0].parameters())
        return Hold(frozen, inside if self.eval_mode else (), own=frozenset(inside))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier fit restored; it comes before a checkpoint is loaded."""
        self._restored = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the two, freeze the target and, in a fresh fit, copy the source."""
        _check_strategy(trainer)
        _check_optimizers(trainer)
        pairs = self._pairs(pl_module)
        self._check_others(trainer)
        super().on_fit_start(trainer, pl_module)
        source = _module(pl_module, self.source, "source")
        self._fit = pairs, {id(parameter) for parameter in source.parameters()}
        self.ledger.steps.counted.append(self._after_step)
        if not self._restored and trainer.global_step == 0 and trainer.current_epoch == 0:
            self.steps = 0
            hard_copy(pairs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a source that nothing steps."""
        super().on_train_start(trainer, pl_module)
        sources = self._fit[1] if self._fit is not None else set()
        if not any(id(p) in sources for p in members(optimizers_of(trainer))) and trainer.is_global_zero:
            _log.warning(
                "TargetNetwork: no optimizer holds a parameter of %r, so %r rests until one does.",
                *(self.source, self.target),
            )

    # What

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._fit is None or _skips(optimizer):
            return
        pairs, sources = self._fit
        active = sources & self.ledger.trains
        if not any(id(parameter) in active for parameter in members([optimizer])):
            return
        self.steps += 1
        if self.tau is not None:
            tau = as_tau(self.tau(self.steps - 1), "TargetNetwork") if callable(self.tau) else self.tau
            polyak_average(pairs, tau)
        elif self.every_n_steps is not None and self.steps % self.every_n_steps == 0:
            hard_copy(pairs)

    def _pairs(self, pl_module: LightningModule) -> list[Pair]:
        source, target = _module(pl_module, self.source, "source"), _module(pl_module, self.target, "target")
        names = (f"source {self.source!r}", f"target {self.target!r}")
        pairs = pair_up(source, target, buffers=self.copy_buffers, names=names)
        inside = set(target.modules())
        outside = [
            p for module in pl_module.modules() if module not in inside for p in module.parameters(recurse=False)
        ]
        if shared := shared_parameters(target, outside):
            raise ValueError(
                f"The {names[1]} shares parameters with a module outside of it: {listed(shared)}. They would not train "
                "there either. Build the target with copy.deepcopy."
            )
        return pairs

    def _check_others(self, trainer: Trainer) -> None:
        """Refuse to follow what no optimizer trains because it is a target itself."""
        others = [callback for callback in callbacks_of(trainer) if isinstance(callback, TargetNetwork)]
        if any(other.target == self.source for other in others):
            raise MisconfigurationException(
                f"TargetNetwork({self.source!r}, {self.target!r}): {self.source!r} is itself a target, so no optimizer "
                "steps it. Let both follow the same source."
            )

    def _close(self, trainer: Trainer) -> None:
        self._fit = None
        super()._close(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return super().__getstate__() | {"_fit": None}


def _skips(optimizer: Optimizer) -> bool:
    """Return whether AMP has a fused optimizer skip this step: it is called all the same, and lent what AMP has found.

    To ask waits for the device, so nothing else is asked.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _check_names(source: str, target: str) -> None:
    for role, name in (("source", source), ("target", target)):
        if not isinstance(name, str):
            raise TypeError(f"TargetNetwork({role}={name!r}): it is the dotted name of a module, such as {role!r}.")
        if not name:
            raise ValueError(f"TargetNetwork({role}=''): name a module inside the LightningModule, such as {role!r}.")
    if source == target:
        raise ValueError(f"TargetNetwork({source!r}, {target!r}): a module cannot follow itself. Name its copy.")
    for inner, outer in ((source, target), (target, source)):
        if inner.startswith(f"{outer}."):
            raise ValueError(
                f"TargetNetwork({source!r}, {target!r}): {inner!r} is inside {outer!r}, so it would be part of its own "
                "copy. Keep the two side by side."
            )


def _module(pl_module: nn.Module, name: str, role: str) -> nn.Module:
    """Return the module of that name, without regard to the segments that ``torch.compile`` puts into names."""
    modules: dict[str, nn.Module] = {}
    for path, module in pl_module.named_modules(remove_duplicate=False):
        modules.setdefault(clean_name(path), module)
    if name in modules:
        return modules[name]
    hint = suggestion(name, filter(None, modules))
    tops = ", ".join(name for name, _ in pl_module.named_children()) or "none"
    whose = type(pl_module).__name__
    raise ValueError(f"TargetNetwork({role}={name!r}) names no module of {whose}.{hint}\nTop-level modules: {tops}.")


def _check_strategy(trainer: Trainer) -> None:
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"TargetNetwork does not work with {type(trainer.strategy).__name__}: between steps a process has only a "
            "part of the parameters. Use one device or strategy='ddp'."
        )


def _check_optimizers(trainer: Trainer) -> None:
    """Refuse what does not say when it has stepped."""
    if not optimizers_of(trainer):
        raise MisconfigurationException(
            "TargetNetwork follows the steps of an optimizer, and configure_optimizers gave none. Return one, with "
            "manual optimization too."
        )
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, Optimizer):
            raise MisconfigurationException(
                f"TargetNetwork has to be told when an optimizer has stepped, and {type(optimizer).__name__} is not a "
                "torch.optim.Optimizer, which would do that. Derive it from that class."
            )
