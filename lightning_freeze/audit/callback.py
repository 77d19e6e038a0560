"""The callback that proves, while training, that frozen is frozen and trained is trained."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_freeze._lightning import Callback, LightningModule, Trainer, optimizers_of
from lightning_freeze.audit.checks import At, Check, Moment
from lightning_freeze.audit.findings import AuditError, Report, alike, described, subject
from lightning_freeze.audit.frozen_values import FrozenValues
from lightning_freeze.audit.gradients import Gradients
from lightning_freeze.audit.graphs import Graphs
from lightning_freeze.audit.optimizers import Membership
from lightning_freeze.audit.replicas import Replicas
from lightning_freeze.freezing.strategies import refuse_shards
from lightning_freeze.logs import get_logger
from lightning_freeze.ranks import from_all
from lightning_freeze.selectors import Selector, resolve
from lightning_freeze.words import one_of, whole_number

_log = get_logger(__name__)

# Of torch and timm: copies that move without gradients, by design.
_AVERAGES = ("type:AveragedModel", "type:ModelEmaV2", "type:ModelEmaV3")


class GradientAudit(Callback):
    """Prove, while training, that frozen is frozen and trained is trained; report by name what is not.

    - ``"frozen_value_moved"``, ``"frozen_statistics_moved"``: a frozen parameter, a buffer of a frozen module, moved.
    - ``"frozen_in_step"``: an optimizer steps a frozen parameter, because it still has a gradient.
    - ``"no_gradient"``: a trainable parameter gets no gradient, and what cuts it off, down to the line of a ``detach``.
    - ``"in_no_optimizer"``, ``"in_two_optimizers"``: a trainable parameter is not in one optimizer, once.
    - ``"graph_kept"``: a tensor keeps a graph alive between steps, and the way to it, such as ``self.losses[3]``.
    - ``"replicas_differ"``: a parameter, or a buffer of a frozen module, differs between DDP's processes.

    The first batches of a fit, of a phase of :class:`FreezeSchedule` and of every ``every_n_epochs``-th epoch are
    audited; values, graphs and replicas also at that epoch's end. Training is the same to the bit; a batch that is not
    audited costs next to nothing, an audited one a hash of the frozen values and a look at every operation. After an
    error or Ctrl-C, only completed steps count. What moves by design is left alone, such as a :class:`TargetNetwork`'s
    target or torch's ``AveragedModel``.

    Args:
        on_violation: ``"warn"`` logs each finding once; ``"raise"`` raises at the audited point, on all processes.
        every_n_epochs: Audit every so many epochs.
        first_n_steps: How many batches are audited each time; for a parameter that may get its gradient later, because
            it did so earlier in the phase or manual optimization has not stepped its optimizer yet, ten times as many.
        ignore: Parameters that no finding shall be about, see :func:`select_parameters`, for example a momentum encoder
            that your own code moves; buffers of a module that is ignored as a whole are, too.

    Attributes:
        report: The :class:`Report` of the last fit. Under ``ddp_spawn`` and ``ddp_fork`` it stays in the processes that
            train.

    Raises:
        ValueError: If an argument has a value that it cannot have; at fit start, if ``ignore`` matches nothing.
        TypeError: If an argument is of another type.
        MisconfigurationException: At fit start, if the strategy shards parameters. While training, as
            :class:`AuditError`, for a finding with ``on_violation="raise"``.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Forgetful(BoringModel):
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD([self.layer.weight], lr=0.1)
        >>> audit = GradientAudit()
        >>> trainer = Trainer(max_steps=1, accelerator="cpu", callbacks=[audit], logger=False, limit_val_batches=0,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Forgetful())
        >>> [(finding.kind, finding.name) for finding in audit.report]
        [('in_no_optimizer', 'layer.bias')]
    """

    _fit: _Fit | None = None

    def __init__(
        self,
        *,
        on_violation: Literal["warn", "raise"] = "warn",
        every_n_epochs: int = 1,
        first_n_steps: int = 3,
        ignore: Selector | None = None,
    ) -> None:
        self.on_violation = one_of("GradientAudit", "on_violation", on_violation, ("warn", "raise"))
        self.every_n_epochs = whole_number("GradientAudit", "every_n_epochs", every_n_epochs)
        self.first_n_steps = whole_number("GradientAudit", "first_n_steps", first_n_steps)
        self.ignore = ignore
        self.report = Report()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be audited, begin a new report, and make the checks."""
        refuse_shards("GradientAudit", trainer.strategy)
        self.report = Report()
        ignored = resolve(pl_module, _AVERAGES, partial=True)
        if self.ignore is not None:
            ignored |= resolve(pl_module, self.ignore, given="GradientAudit(ignore={})")
        start = Moment(trainer, pl_module, frozenset(ignored))
        frozen, gradients = FrozenValues(), Gradients(self.first_n_steps)
        replicas = Replicas(frozen, late=start.parameters.keys() - start.requires_grad)
        self._fit = _Fit(start, [Graphs(start), frozen, Membership(), replicas, gradients], gradients)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check at the start of phases and epochs, and begin an audited batch."""
        fit = self._current()
        phase, epoch = sum(len(schedule.history) for schedule in fit.start.schedules), trainer.current_epoch
        if phase != fit.phase:
            fit.audited = 0
            self._check("phase start")
        elif epoch != fit.epoch:
            self._check("epoch start" if self._is_due(trainer) else "epoch skipped")
        fit.phase, fit.epoch = phase, epoch
        if not fit.gradients.waiting:
            return
        fit.audited += 1
        fit.end_step()
        fit.step = ExitStack()
        now = fit.now("step", batch=batch)
        for check in fit.checks:
            check.begin(now, fit.step)
        for optimizer in optimizers_of(trainer):
            # After the step: before it, with a closure, there are no gradients, and others may still drop some.
            hook = optimizer.register_step_post_hook(lambda one, *_: fit.note(one))
            fit.step.callback(hook.remove)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note what requires grad for the backward."""
        self._current().note()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Check after an audited batch."""
        fit = self._current()
        if fit.step is not None:
            fit.end_step()
            self._check("first steps end" if fit.audited == self.first_n_steps else "step end")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check at the end of an audited epoch."""
        if self._is_due(trainer):
            self._check("epoch end")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is left, and log how it was."""
        self._check("train end")
        _log.info(self.report.summary)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report gradients that were missing, which may have led to an error; leave nothing behind."""
        if self._fit is not None and self._fit.step is not None and isinstance(exception, Exception):
            self._check("exception", exception)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        if self._fit is not None:
            self._fit.end_step()
        self._fit = None

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.current_epoch % self.every_n_epochs == 0

    def _current(self) -> _Fit:
        assert self._fit is not None
        return self._fit

    def _check(self, at: At, error: BaseException | None = None) -> None:
        fit = self._current()
        now = fit.now(at, error=error)
        checks = [check for check in fit.checks if at in check.moments]
        mine = [check.observe(now) for check in checks]
        by_rank = from_all(mine) if error is None else [mine]  # after an error, other processes may never answer
        facts = zip(*by_rank, strict=True)
        found = [finding for check, of_it in zip(checks, facts, strict=True) for finding in check.decide(now, of_it)]
        known = set(map(subject, self.report))
        new = [finding for finding in found if subject(finding) not in known]
        self.report += new
        self.report.parameters = len(now.parameters)
        self.report.checks += at not in ("epoch skipped", "train end", "exception")
        if new and self.on_violation == "raise" and error is None:
            raise AuditError(self.report)
        for group in alike(new):
            _log.warning("audit, step %d: %s", group[0].step, described(group))


@dataclass
class _Fit:
    """What the callback holds on to during one fit; ``step`` undoes what was put in place for an audited batch."""

    start: Moment
    checks: list[Check]
    gradients: Gradients
    phase: int = -1
    epoch: int = -1
    audited: int = 0  # batches, in this phase
    step: ExitStack | None = None

    def now(self, at: At, **more: Any) -> Moment:
        return replace(self.start, at=at, **more)

    def note(self, optimizer: Optimizer | None = None) -> None:
        if self.step is not None:
            now = self.now("step")
            for check in self.checks:
                check.note(now, optimizer)

    def end_step(self) -> None:
        step, self.step = self.step, None
        if step is not None:
            step.close()
