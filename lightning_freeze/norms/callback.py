"""Gradient, weight and update norms while training."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_freeze._lightning import (
    Callback,
    DeepSpeedStrategy,
    FSDPStrategy,
    LightningModule,
    MisconfigurationException,
    Trainer,
    without_fit,
)
from lightning_freeze.logs import get_logger
from lightning_freeze.norms.core import (
    NO_NORMS,
    ParameterNames,
    Per,
    StepNorms,
    What,
    changed,
    combined,
    gradients,
    measure,
    named_metrics,
    nonfinite,
    read_steps,
    when_gradients_are_ready,
)
from lightning_freeze.selectors import named_unique_parameters
from lightning_freeze.words import whole_number

_log = get_logger(__name__)
_SHOWN = 5


class NormLogger(Callback):
    """Log the norms of gradients, weights and updates, without changing them.

    ============================ ===================================================================================
    metric                       is the norm of
    ============================ ===================================================================================
    ``norm/grad``                the gradient that the step is made of: accumulated, without the AMP loss scale, not
                                 yet clipped
    ``norm/grad_clipped``        the gradient as the optimizer was given it
    ``norm/nonfinite_grads``     nothing: it counts the parameters whose gradient holds an infinity or NaN (or a value
                                 too large to square); the log names them
    ``norm/weight``              the weights before the step
    ``norm/update``              what the step changed: weights after it less weights before it
    ``norm/update_ratio``        nothing: it is ``norm/update`` divided by ``norm/weight``
    ``norm/grad/backbone``       the same for one module (``per="module"``): a top-level one, or, where all parameters
                                 are below one module, a child of that
    ``norm/grad/backbone.bias``  the same for one parameter (``per="parameter"``)
    ``norm/optimizer_1/grad``    the same for the second optimizer, where there are several
    ============================ ===================================================================================

    Only parameters that require grad and that the optimizer holds count; one without a gradient has a weight norm and
    an update of zero. A step that AMP skips has an update of zero. Values go to the Trainer's loggers, to
    ``trainer.logged_metrics`` and to ``trainer.callback_metrics``.

    A logged step costs two passes over the gradients and two over the parameters, a copy of the parameters (for
    ``"update"``) that lives until the optimizer has stepped, and one wait for the device at the end of the batch,
    however many optimizers there are; counting the entries of a sparse gradient waits too. A step that is not logged
    costs next to nothing. With manual optimization, every backward of a batch that may be logged is measured, because
    clipping there comes before the step. Call ``self.manual_backward(loss)``: of ``loss.backward()`` Lightning tells
    nobody, and ``norm/grad`` is then what it is at the step. Where an optimizer steps several times in a batch, or
    calls its closure several times, the first is shown.

    Args:
        every_n_steps: Log every so many batches that step; if None, as often as the Trainer logs, see its
            ``log_every_n_steps``.
        per: ``"total"`` for one norm of everything, ``"module"`` or ``"parameter"`` for those as well.
        what: Which of ``"grad"``, ``"weight"`` and ``"update"`` (with the ratio) to log.

    Attributes:
        nonfinite: The names of the parameters whose gradient was not finite when it was last looked at.

    Raises:
        ValueError: If an argument has a value that it cannot have.
        TypeError: If an argument is of another type.
        MisconfigurationException: At fit start, if the strategy hides whole parameters from the callback (FSDP of the
            first kind, DeepSpeed), or an optimizer is not a ``torch.optim.Optimizer``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(max_steps=1, accelerator="cpu", callbacks=[NormLogger(every_n_steps=1)], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
        >>> trainer.fit(BoringModel())
        >>> sorted(name for name in trainer.logged_metrics if name.startswith("norm/"))[:3]
        ['norm/grad', 'norm/grad_clipped', 'norm/nonfinite_grads']
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        per: Per = "total",
        what: Iterable[What] = ("grad", "weight", "update"),
    ) -> None:
        if isinstance(what, str):
            raise TypeError(f"NormLogger(what={what!r}): it is a tuple. Write what=({what!r},).")
        self.every_n_steps = (
            None if every_n_steps is None else whole_number("NormLogger", "every_n_steps", every_n_steps)
        )
        self.per = _one_of("per", per, get_args(Per))
        self.what = tuple(_one_of("what", one, get_args(What)) for one in what)
        if not self.what:
            raise ValueError(f"NormLogger(what=()) logs nothing: give one of {', '.join(map(repr, get_args(What)))}.")
        self.nonfinite: tuple[str, ...] = ()
        self._logged: dict[int, int] = {}
        self._steps: dict[int, StepNorms] = {}
        self._handles: list[RemovableHandle] = []
        self._unclipped = NO_NORMS
        self._before = NO_NORMS
        self._names: ParameterNames | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured rightly."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise MisconfigurationException(
                f"NormLogger does not work with {type(trainer.strategy).__name__}: each process would show the norm of "
                "its own shard only. Use ModelParallelStrategy (FSDP2), DDP or one device."
            )
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise MisconfigurationException(
                    f"NormLogger has to be told when an optimizer has stepped, and {type(optimizer).__name__} is not a "
                    "torch.optim.Optimizer, which would do that. Derive it from that class."
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask to be told when gradients are clipped."""
        self._drop()
        if "grad" in self.what:
            for index, optimizer in enumerate(trainer.optimizers):
                if self._is_due(trainer, index):
                    ready = functools.partial(self._ready, index)
                    self._handles.append(when_gradients_are_ready(optimizer, ready))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """With manual optimization, look at gradients that were measured: the user may have clipped them since."""
        if self._measures_backward(trainer, pl_module):
            known = set(self._unclipped.names)
            here = {name: p for name, p in named_unique_parameters(pl_module).items() if name in known}
            self._before = measure(gradients(here), scale=_loss_scale(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization, measure the gradients that have changed, before the user clips them.

        Their versions do not tell which: DDP's ``gradient_as_bucket_view`` makes all those of a bucket share one.
        """
        if self._measures_backward(trainer, pl_module):
            here, scale = gradients(named_unique_parameters(pl_module)), _loss_scale(trainer)
            known = set(self._before.names)
            new = measure({name: gradient for name, gradient in here.items() if name not in known}, scale=scale)
            again = measure({name: gradient for name, gradient in here.items() if name in known}, scale=scale)
            self._unclipped = combined(self._unclipped, combined(new, changed(self._before, again)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure gradients and weights, and ask to be told when the step is done."""
        index = next(i for i, candidate in enumerate(trainer.optimizers) if candidate is optimizer)
        # LBFGS comes here several times in a step, a user with manual optimization several times in a batch.
        if index in self._steps or not self._is_due(trainer, index):
            return
        self._logged[index] = self._tick(trainer, 1)
        self._names = self._names or ParameterNames(pl_module)
        step = StepNorms(
            self._names.trained(optimizer),
            self.what,
            scale=_loss_scale(trainer) if _optimizer_handles_unscaling(optimizer) else None,
            unclipped=self._unclipped,
        )
        self._steps[index] = step
        self._handles.append(optimizer.register_step_post_hook(lambda *_: step.after()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the device and log."""
        steps = self._steps
        self._drop()
        if not steps:
            return
        for step in steps.values():
            step.after()  # AMP has skipped those that have not heard of it yet
        several = len(trainer.optimizers) > 1
        modules = self._names.modules if self._names is not None else {}
        metrics: dict[str, float] = {}
        bad: dict[str, None] = {}  # a set that keeps its order; two optimizers may hold one parameter
        for index, norms in zip(steps, read_steps(list(steps.values())), strict=True):
            prefix = f"norm/optimizer_{index}/" if several else "norm/"
            values = named_metrics(norms, what=self.what, per=self.per, modules=modules)
            metrics |= {f"{prefix}{name}": value for name, value in values.items()}
            bad |= dict.fromkeys(nonfinite(norms.get("grad", {})))
        self.nonfinite = tuple(bad)
        if bad and trainer.is_global_zero:
            _log.warning("step %d: %s", _stepped(trainer), _describe(self.nonfinite))
        _log_metrics(trainer, metrics)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._end()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(
            self.__dict__, _logged={}, _steps={}, _handles=[], _unclipped=NO_NORMS, _before=NO_NORMS, _names=None
        )

    def _ready(self, index: int) -> None:
        if index in self._steps:
            self._steps[index].ready()

    def _measures_backward(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        if pl_module.automatic_optimization or "grad" not in self.what:
            return False
        return any(self._is_due(trainer, index) for index in range(len(trainer.optimizers)))

    def _is_due(self, trainer: Trainer, index: int) -> bool:
        """Whether an optimizer's next step is logged: the first one after so many batches that stepped."""
        return self._tick(trainer, 1) > self._logged.setdefault(index, self._tick(trainer, 0))

    def _tick(self, trainer: Trainer, ahead: int) -> int:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (_stepped(trainer) + ahead) // every if every else 0

    def _end(self) -> None:
        self._drop()
        self._logged, self._names = {}, None

    def _drop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._steps, self._handles, self._unclipped, self._before = {}, [], NO_NORMS, NO_NORMS


def _stepped(trainer: Trainer) -> int:
    """Give the number of batches that stepped: Lightning's loggers count by it; global_step adds up all optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _log_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    # Not self.log: that would hold values back until the Trainer logs, and then repeat old ones.
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=_stepped(trainer))
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)


def _loss_scale(trainer: Trainer) -> Tensor | None:
    """Give what AMP multiplies the loss by, without waiting for the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale: Tensor | None = scaler.scale(torch.ones((), device=trainer.strategy.root_device)) if scaler else None
    return scale


def _describe(bad: Sequence[str]) -> str:
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    noun = "gradient is" if len(bad) == 1 else "gradients are"
    return f"{len(bad)} {noun} not finite: {', '.join(bad[:_SHOWN])}{more}"


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"NormLogger({name}={value!r}): {name} is one of {', '.join(map(repr, allowed))}.{hint}")
    return value
