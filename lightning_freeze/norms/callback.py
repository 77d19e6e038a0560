"""Gradient, weight and update norms while training."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, get_args

from torch import Tensor
from torch.optim import Optimizer

from lightning_freeze._lightning import (
    Callback,
    LightningModule,
    Trainer,
    log_values,
    logged_step,
    loss_scale,
    unscales_gradients,
    without_fit,
)
from lightning_freeze.freezing.strategies import refuse_shards, refuse_without_hooks
from lightning_freeze.logs import get_logger
from lightning_freeze.norms.core import Per, metric_places, nonfinite, read
from lightning_freeze.norms.step import BackwardNorms, StepNorms, What, named_metrics
from lightning_freeze.selectors import named_unique_parameters
from lightning_freeze.words import listed, one_of, some_of, whole_number

_log = get_logger(__name__)


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
    ``norm/grad/backbone``       the same for one module (``per="module"``): a top-level one, or a child of the one
                                 that all parameters are below
    ``norm/grad/backbone.bias``  the same for one parameter (``per="parameter"``)
    ``norm/optimizer_1/grad``    the same for the second optimizer, where there are several
    ============================ ===================================================================================

    Of what an optimizer holds, that counts which requires grad or has a gradient. Values go to the Trainer's loggers,
    ``trainer.logged_metrics`` and ``trainer.callback_metrics``. A logged step costs two passes over the gradients and
    two over the parameters, a copy of the parameters (for ``"update"``) until the optimizer has stepped, and one wait
    for the device. With manual optimization call ``self.manual_backward(loss)``: Lightning does not see
    ``loss.backward()``. Where an optimizer steps or calls its closure several times in a batch, the first is shown.

    Args:
        every_n_steps: Log every so many batches that step; if None, as often as the Trainer's ``log_every_n_steps``.
        per: ``"total"`` for one norm of everything, ``"module"`` or ``"parameter"`` for those as well.
        what: Which of ``"grad"``, ``"weight"`` and ``"update"`` (with the ratio) to log.

    Attributes:
        nonfinite: The names of the parameters whose gradient was not finite in the last step that was looked at, also
            if that step raised an exception.

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
        self.every_n_steps = every_n_steps
        if every_n_steps is not None:
            self.every_n_steps = whole_number("NormLogger", "every_n_steps", every_n_steps)
        self.per: Per = one_of("NormLogger", "per", per, get_args(Per))
        self.what: tuple[What, ...] = some_of("NormLogger", "what", what, get_args(What))
        self.nonfinite: tuple[str, ...] = ()
        self._steps: dict[int, StepNorms] = {}  # for each optimizer whose next step is logged
        self._backwards = BackwardNorms()  # of the batch that runs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured rightly."""
        refuse_shards("NormLogger", trainer.strategy, fsdp2=True)
        refuse_without_hooks("NormLogger", trainer)
        self.nonfinite = ()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Every so many batches that step, watch for each optimizer's next step, in whichever batch it comes."""
        self._backwards = BackwardNorms()
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (logged_step(trainer) + 1) % every == 0:
            for index, optimizer in enumerate(trainer.optimizers):
                if index not in self._steps:
                    self._steps[index] = StepNorms(optimizer, self.what)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """With manual optimization, see which gradients the user has clipped since they were measured."""
        if self._measures_backward(pl_module):
            self._backwards.before(named_unique_parameters(pl_module), loss_scale(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization, measure gradients before the user clips them."""
        if self._measures_backward(pl_module):
            self._backwards.after(named_unique_parameters(pl_module), loss_scale(trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure gradients and weights."""
        step = self._steps.get(trainer.optimizers.index(optimizer))
        # LBFGS comes here several times in a step, a user with manual optimization several times in a batch.
        if step is not None and not step.norms:
            scale = loss_scale(trainer) if unscales_gradients(optimizer) else None
            step.begins(named_unique_parameters(pl_module), scale, self._backwards)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Wait for the device and log."""
        for step in self._steps.values():
            step.end()
        norms = self._read(trainer)
        for index in norms:
            self._steps.pop(index).close()
        if norms:
            places = metric_places(named_unique_parameters(pl_module), self.per)
            several = len(trainer.optimizers) > 1
            metrics = {
                (f"norm/optimizer_{index}/" if several else "norm/") + name: value
                for index, values in norms.items()
                for name, value in named_metrics(values, self.what, places).items()
            }
            # Not self.log: that would hold values back until the Trainer logs, and then repeat old ones.
            log_values(trainer, metrics)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        for step in self._steps.values():
            step.close()
        self._steps, self._backwards = {}, BackwardNorms()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name what was not finite in the step that failed: often that is why."""
        with suppress(RuntimeError):  # the device itself may have failed
            self._read(trainer)
        self.teardown(trainer, pl_module, "fit")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(self, _steps={}, _backwards=BackwardNorms())

    def _measures_backward(self, pl_module: LightningModule) -> bool:
        return not pl_module.automatic_optimization and "grad" in self.what and bool(self._steps)

    def _read(self, trainer: Trainer) -> dict[int, dict[str, dict[str, float]]]:
        """Return the norms of what has stepped, with one wait for all, and say which gradients are not finite."""
        stepped = {index: step.norms for index, step in self._steps.items() if step.norms}
        values = iter(read([norms for measured in stepped.values() for norms in measured.values()]))
        norms = {index: dict(zip(measured, values, strict=False)) for index, measured in stepped.items()}
        if norms:  # two optimizers may hold one parameter
            bad = dict.fromkeys(name for one in norms.values() for name in nonfinite(one.get("grad", {})))
            self.nonfinite = tuple(bad)
            if bad:
                noun = "gradient is" if len(bad) == 1 else "gradients are"
                _log.warning("step %d: %d %s not finite: %s", logged_step(trainer), len(bad), noun, listed(bad))
        return norms
