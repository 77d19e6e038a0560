"""Proves, while training, that frozen is frozen and trained is trained."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_freeze._lightning import (
    Callback,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    StochasticWeightAveraging,
    Trainer,
    WeightAveraging,
    _MockOptimizer,
    without_fit,
)
from lightning_freeze.audit.digests import Witness, differing
from lightning_freeze.audit.findings import Finding, Report, alike, described
from lightning_freeze.audit.gradient_flow import Received, Uses, can_be_watched, stop_watching, watch_next_call
from lightning_freeze.audit.graphs import container, tensors_with_graph
from lightning_freeze.audit.membership import moved_by, state_marks
from lightning_freeze.audit.verdicts import (
    frozen_statistics,
    kept_graphs,
    memberships,
    merged,
    moved_in_step,
    replicas_apart,
    statistics_moved,
    value_moved,
    without_gradient,
)
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.logs import get_logger
from lightning_freeze.ranks import from_all
from lightning_freeze.schedule.callback import FreezeSchedule
from lightning_freeze.selectors import Selector, named_unique_parameters, resolve
from lightning_freeze.tensors import digest, has_values
from lightning_freeze.words import whole_number

OnViolation = Literal["warn", "raise"]

T = TypeVar("T")

_log = get_logger(__name__)
# How many times as long a round may last for parameters that can be expected to get a gradient later.
_PATIENCE = 10


class AuditError(MisconfigurationException):
    """What :class:`GradientAudit` raises with ``on_violation="raise"``; ``report`` has the findings as data."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


class GradientAudit(Callback):
    """Prove, while training, that frozen is frozen and trained is trained; report by name what is not.

    =============================  ====================================================================================
    kind of finding                what it says
    =============================  ====================================================================================
    ``"frozen_value_moved"``       a parameter that does not require grad has another value than before
    ``"frozen_statistics_moved"``  the running statistics of a BatchNorm whose parameters are frozen have moved
    ``"frozen_in_step"``           an optimizer steps a frozen parameter, because it still has a gradient
    ``"no_gradient"``              a trainable parameter gets no gradient: the branch is not used, a ``detach`` or
                                   ``no_grad`` cuts it off (and where), or the loss does not depend on its output
    ``"in_no_optimizer"``          a trainable parameter that no optimizer holds
    ``"in_two_optimizers"``        a trainable parameter that optimizers hold twice
    ``"graph_kept"``               a tensor that keeps a graph alive between steps, and the way to it, such as
                                   ``self.losses[3]``
    ``"replicas_differ"``          a parameter, or a frozen running statistic, that DDP's processes hold with different
                                   values
    =============================  ====================================================================================

    The first batches of a fit are audited, the first after a phase of a :class:`FreezeSchedule` has begun, and those at
    the start of every ``every_n_epochs``-th epoch; values, graphs and replicas also at that epoch's end. The audit
    changes nothing: weights, optimizer states and random numbers are those without it, to the bit. A batch that is not
    audited costs next to nothing; an audited one costs a hash of the frozen values, of which 16 bytes each are kept,
    and the first of them a look at every operation. It follows what is unfrozen, by whomever.

    What moves by design is left alone: the target of a :class:`TargetNetwork`; what only requires grad inside the step,
    as networks of a GAN that are switched in turn; the running statistics of frozen layers where a schedule has
    ``frozen_mode="train"``; what trains under a model averager, as in post-local SGD, and differs between two of its
    steps. A parameter counts as one without gradient if no audited batch on any process gave it one.
    With manual optimization, its optimizer has to have stepped as well, and where it did get a gradient earlier in
    the phase, as with layers that are dropped at random, it is given ten times as many batches.

    Args:
        on_violation: ``"warn"`` logs each finding once; ``"raise"`` raises at the audited point, on all processes.
        every_n_epochs: Audit every so many epochs, at least 1.
        first_n_steps: How many batches are audited each time, at least 1.
        ignore: Parameters that no finding shall be about, see :func:`select_parameters`: for example a momentum encoder
            that your own code moves.

    Attributes:
        report: The findings of the last fit as a list of
            :class:`~lightning_freeze.audit.findings.Finding`; print it for a readable text. Under ``ddp_spawn`` and
            ``ddp_fork``, as in notebooks, it stays in the processes that train: use ``strategy="ddp"``, or
            ``on_violation="raise"``.

    Raises:
        ValueError: If an argument has a value that it cannot have; at fit start, if ``ignore`` matches nothing.
        TypeError: If an argument is of another type.
        MisconfigurationException: At fit start, if the strategy shards parameters. While training, as
            :class:`AuditError`, for a finding with ``on_violation="raise"``.

    Example:
        >>> import torch
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

    def __init__(
        self,
        *,
        on_violation: OnViolation = "warn",
        every_n_epochs: int = 1,
        first_n_steps: int = 3,
        ignore: Selector | None = None,
    ) -> None:
        if on_violation not in get_args(OnViolation):
            close = difflib.get_close_matches(str(on_violation), get_args(OnViolation), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"GradientAudit(on_violation={on_violation!r}): it is 'warn' or 'raise'.{hint}")
        self.on_violation = on_violation
        self.every_n_epochs = whole_number("GradientAudit", "every_n_epochs", every_n_epochs)
        self.first_n_steps = whole_number("GradientAudit", "first_n_steps", first_n_steps)
        self.ignore = ignore
        self.report = Report()
        self._fit: _Fit | None = None

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be audited, and begin a new report."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise MisconfigurationException(
                f"GradientAudit does not work with {type(trainer.strategy).__name__}: between steps a process has only "
                "a part of the parameters. Audit a short run on one device or with strategy='ddp'."
            )
        self.report = Report()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what there was before the fit."""
        parameters = named_unique_parameters(pl_module)
        ignored = resolve(pl_module, self.ignore, given="GradientAudit(ignore={})") if self.ignore is not None else {}
        self._fit = _Fit(
            ignored=set(ignored),
            late={name for name, parameter in parameters.items() if not parameter.requires_grad},
            known=[weakref.ref(tensor) for tensor in tensors_with_graph()],
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a round of audited batches when one is due."""
        fit = self._current()
        phase = sum(len(schedule.history) for schedule in _schedules(trainer))
        if phase != fit.phase:
            fit.begin_phase(phase)
            self._begin_round(trainer, pl_module)
        elif trainer.current_epoch != fit.epoch:
            if any(isinstance(callback, StochasticWeightAveraging) for callback in _callbacks(trainer)):
                fit.witness.forget()  # it puts the averages in place between two epochs
            if self._is_due(trainer):
                fit.round = fit.round or _Round()
                self._begin_round(trainer, pl_module)
            else:
                self._frozen(trainer, pl_module).let_go(fit.witness)
        fit.epoch = trainer.current_epoch
        if fit.round is not None:
            self._begin_step(trainer, pl_module, batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note that there is a backward, and what requires grad for it."""
        if self._fit is not None and self._fit.step is not None:
            self._fit.step.backward = True
            self._fit.step.note_flags()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note what the optimizer is about to move."""
        if self._fit is not None and self._fit.step is not None:
            self._fit.step.note_stepping(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End an audited batch."""
        fit = self._current()
        fit.begun = True
        if fit.step is not None:
            self._end_step(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at values, graphs and replicas."""
        if self._fit is None or not self._fit.begun or not self._is_due(trainer):
            return
        findings = [*self._moved(trainer, pl_module), *self._graphs(trainer, pl_module)]
        findings = merged(_gathered(trainer, findings))
        self._conclude(trainer, [*findings, *self._apart(trainer, pl_module)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge what is left to judge, and say how it was."""
        fit = self._current()
        findings = []
        if fit.begun and fit.since != _trained(trainer) and not any(map(_averages, _callbacks(trainer))):
            findings += merged(_gathered(trainer, self._moved(trainer, pl_module)))
        findings += self._judged(trainer, pl_module, last=True)
        if findings:
            self._conclude(trainer, findings)
        if trainer.is_global_zero:
            _log.info(self.report.summary)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what is known by now, if a gradient that was missing may have led to the error; leave nothing behind."""
        fit = self._fit
        if fit is not None and fit.step is not None and not isinstance(exception, AuditError):
            fit.step.close()
            if "does not require grad" in str(exception):
                fit.step.backward = True
            self._explain(trainer, pl_module)
        self._release(pl_module)

    # Rounds and steps

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.current_epoch % self.every_n_epochs == 0

    def _begin_round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit = self._current()
        parameters = named_unique_parameters(pl_module)
        self.report.parameters = len(parameters)
        findings = self._moved(trainer, pl_module)
        if optimizers := _optimizers(trainer):
            findings += memberships(optimizers, fit.trainable(pl_module), _trained(trainer))
        self._conclude(trainer, merged(_gathered(trainer, findings)))

    def _begin_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        fit = self._current()
        assert fit.round is not None
        graphs: list[Finding] = []
        if fit.round.fresh and fit.round.steps == 1:
            upcoming: set[int] = set()
            apply_to_collection(batch, Tensor, lambda tensor: upcoming.add(id(tensor)))
            graphs = self._graphs(trainer, pl_module, upcoming)
        parameters = {
            name: parameter for name, parameter in named_unique_parameters(pl_module).items() if name not in fit.ignored
        }
        fit.step = _Step(parameters, _optimizers(trainer), graphs)
        got = fit.received if fit.round.steps == 0 else fit.round.received
        watch = {name: p for name, p in self._candidates(pl_module).items() if name not in got}
        if watch and can_be_watched(pl_module):
            watch_next_call(pl_module, "training_step", watch, fit.uses)

    def _end_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit = self._current()
        step, fit.step = fit.step, None
        assert step is not None
        assert fit.round is not None
        step.close()
        stop_watching(pl_module, "training_step")
        fit.flickering |= step.switched
        number = _trained(trainer)
        mine = [
            *step.graphs,
            *(moved_in_step(name, step=number) for name in step.moved),
            *self._moved(trainer, pl_module, by_step=step.moved, certain=True),
        ]
        told = _gathered(trainer, (mine, step.received.names, step.backward or bool(step.received.names), step.stepped))
        fit.round.take_in(told)
        fit.received |= fit.round.received
        findings = merged([theirs for theirs, *_ in told])
        if fit.round.fresh and fit.round.steps == self.first_n_steps:
            findings += self._apart(trainer, pl_module)
        findings += self._judged(trainer, pl_module)
        self._conclude(trainer, findings)

    # Facts

    def _candidates(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """Give the trainable parameters of which it is not yet known that they get no gradient."""
        fit = self._current()
        return {name: p for name, p in fit.trainable(pl_module).items() if ("no_gradient", name) not in fit.told}

    def _judged(self, trainer: Trainer, pl_module: LightningModule, *, last: bool = False) -> list[Finding]:
        """Give a finding for each parameter that has got no gradient for long enough; end the round if none waits."""
        fit = self._current()
        turn = fit.round
        if turn is None or turn.steps == 0 or (turn.steps < self.first_n_steps and not last):
            return []
        missing = {name: p for name, p in self._candidates(pl_module).items() if name not in turn.received}
        if turn.steps < _PATIENCE * self.first_n_steps:
            waiting = {name for name in missing if name in fit.received}
            if not pl_module.automatic_optimization:
                resting = [o for index, o in enumerate(_optimizers(trainer)) if index not in turn.stepped]
                held = {id(p) for optimizer in resting for group in optimizer.param_groups for p in group["params"]}
                waiting |= {name for name, p in missing.items() if id(p) in held}
        else:
            waiting = set()
        if not waiting or last:
            fit.round = None
        names = [name for name in missing if name not in waiting]
        return without_gradient(names, fit.uses, steps=turn.steps, step=_trained(trainer))

    def _frozen(self, trainer: Trainer, pl_module: LightningModule) -> _Frozen:
        """Give what must not move now."""
        fit = self._current()
        parameters = named_unique_parameters(pl_module)
        trains = {id(p) for name, p in parameters.items() if p.requires_grad or name in fit.flickering}
        keepers = [callback for callback in _callbacks(trainer) if isinstance(callback, Holder)]
        kept = [module for keeper in keepers for module in keeper.holds(pl_module).own]
        moves = {id(tensor) for module in kept for tensor in (*module.parameters(), *module.buffers())}
        ignored_layers = {name.rpartition(".")[0] for name in fit.ignored}
        awake = any(schedule.frozen_mode == "train" for schedule in _schedules(trainer))
        statistics = frozen_statistics(pl_module, trains, held_only=awake)
        return _Frozen(
            {
                name: p
                for name, p in parameters.items()
                if id(p) not in trains and name not in fit.ignored and id(p) not in moves and has_values(p)
            },
            {
                name: (layer, buffer)
                for name, (layer, buffer) in statistics.items()
                if id(buffer) not in moves and name.rpartition(".")[0] not in ignored_layers and has_values(buffer)
            },
        )

    def _moved(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        by_step: Iterable[str] = (),
        certain: bool = False,
    ) -> list[Finding]:
        """Give a finding for all that was frozen at the last look, is frozen now, and has another value.

        Unless it is certain that it was frozen all the time, what an optimizer with a state has stepped meanwhile may
        have been unfrozen and frozen again, and does not count.
        """
        fit = self._current()
        frozen = self._frozen(trainer, pl_module)
        since, step = fit.since, _trained(trainer)
        marks, before = state_marks(_optimizers(trainer), frozen.parameters), fit.marks
        fit.marks, fit.since = marks, step
        findings = []
        for name in fit.witness.look(frozen.tensors):
            if name in frozen.statistics:
                findings.append(statistics_moved(name, frozen.statistics[name][0], step=step))
            elif certain or since == step or marks[name] == before.get(name):
                findings.append(value_moved(name, since=since, step=step, by_step=name in by_step))
        return findings

    def _graphs(self, trainer: Trainer, pl_module: LightningModule, upcoming: Iterable[int] = ()) -> list[Finding]:
        """Give a finding for each place that keeps a graph alive, now that a step is over."""
        fit = self._current()
        known = {id(tensor) for ref in fit.known if (tensor := ref()) is not None} | set(upcoming)
        others = {type(callback).__name__: callback for callback in _callbacks(trainer)}
        return kept_graphs(pl_module, others, {"trainer": trainer}, known, _trained(trainer))

    def _apart(self, trainer: Trainer, pl_module: LightningModule) -> list[Finding]:
        """Give a finding for all that DDP's processes should have alike and have not; a call that all make."""
        fit = self._current()
        if trainer.world_size == 1 or not isinstance(trainer.strategy, DDPStrategy):
            return []
        model = trainer.strategy.model
        apart = set(model.parameters_to_ignore) if isinstance(model, DistributedDataParallel) else set()
        tensors: dict[str, Tensor] = {
            name: p for name, p in named_unique_parameters(pl_module).items() if name not in apart
        }
        if trainer.strategy._model_averager is not None:  # what trains is only alike when it has just averaged
            tensors = {name: p for name, p in tensors.items() if not p.requires_grad}
        # Those of a layer that trains differ rightly: each process sees its own part of the batch.
        tensors |= {name: buffer for name, (_, buffer) in self._frozen(trainer, pl_module).statistics.items()}
        mine = {name: digest(tensor) for name, tensor in tensors.items() if has_values(tensor)}
        names = [name for name in differing(from_all(mine)) if name not in fit.ignored]
        late = fit.late if not _schedules(trainer) else set()
        trainable = {name for name, p in named_unique_parameters(pl_module).items() if p.requires_grad}
        return replicas_apart(names, late & trainable, _trained(trainer))

    # Words

    def _conclude(self, trainer: Trainer, findings: list[Finding]) -> None:
        """Report what is new."""
        fit = self._current()
        self.report.checks += 1
        new = []
        for finding in findings:
            key = (finding.kind, container(finding.name) if finding.kind == "graph_kept" else finding.name)
            if key not in fit.told:
                fit.told.add(key)
                new.append(finding)
        self.report.extend(new)
        if new and self.on_violation == "raise":
            raise AuditError(self.report)
        self._log(trainer, new)

    def _log(self, trainer: Trainer, findings: list[Finding]) -> None:
        if trainer.is_global_zero:
            for group in alike(findings):
                _log.warning("audit, step %d: %s", group[0].step, described(group))

    def _explain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, without asking other processes, what has got no gradient until an error came."""
        fit = self._current()
        assert fit.round is not None
        assert fit.step is not None
        fit.round.take_in([((), fit.step.received.names, fit.step.backward, fit.step.stepped)])
        findings = self._judged(trainer, pl_module, last=True)
        self.report.extend(findings)
        self._log(trainer, findings)

    def _current(self) -> _Fit:
        assert self._fit is not None
        return self._fit

    def _release(self, pl_module: LightningModule) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            if fit.step is not None:
                fit.step.close()
            stop_watching(pl_module, "training_step")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(self.__dict__, _fit=None)


@dataclass(frozen=True)
class _Frozen:
    """What must not move: parameters, and running statistics with their layers."""

    parameters: dict[str, nn.Parameter]
    statistics: dict[str, tuple[nn.Module, Tensor]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **{name: buffer for name, (_, buffer) in self.statistics.items()}}

    def let_go(self, witness: Witness) -> None:
        """Let a witness forget all that may move, without a look at values."""
        witness.keep({*self.parameters, *self.statistics})


class _Step:
    """What is noted during one audited batch."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizers: list[Optimizer], graphs: list[Finding]) -> None:
        self.graphs = graphs
        self.backward = False
        self.switched: set[str] = set()
        self.moved: list[str] = []
        self.stepped: set[int] = set()
        self.received = Received(parameters)
        self._parameters, self._optimizers = parameters, optimizers
        self._trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._without_closure)
            for optimizer in optimizers
            if isinstance(optimizer, Optimizer)
        ]

    def note_flags(self) -> None:
        """Note what requires grad only inside the step; a GAN may switch it there."""
        requires = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        self.switched |= requires - self._trainable
        self.received.follow()

    def note_stepping(self, optimizer: Optimizer) -> None:
        """Note what an optimizer is about to move."""
        self.note_flags()
        self.stepped |= {index for index, candidate in enumerate(self._optimizers) if candidate is optimizer}
        self.received.take_in(parameter for group in optimizer.param_groups for parameter in group["params"])
        moved = moved_by(optimizer)
        self.moved += [n for n, p in self._parameters.items() if id(p) in moved and n not in self.moved]

    def close(self) -> None:
        """Remove the hooks."""
        self.received.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _without_closure(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure the gradients are not there yet; Lightning tells of the step when they are.
        if not any(callable(one) for one in (*args, *kwargs.values())):
            self.note_stepping(optimizer)


@dataclass
class _Round:
    """A few batches in a row that are audited; ``fresh`` is the one at the start of a fit or phase."""

    fresh: bool = False
    steps: int = 0
    received: set[str] = field(default_factory=set)
    stepped: set[int] = field(default_factory=set)

    def take_in(self, told: Iterable[tuple[Any, set[str], bool, set[int]]]) -> None:
        """Add what the processes tell of one batch: findings, who got a gradient, if any was, which optimizers went."""
        told = list(told)
        self.steps += any(backward for _, _, backward, _ in told)
        for _, received, _, stepped in told:
            self.received |= received
            self.stepped |= stepped


@dataclass
class _Fit:
    """What the audit holds on to during one fit."""

    ignored: set[str]
    late: set[str]
    known: list[weakref.ref[Tensor]]
    begun: bool = False
    epoch: int = -1
    phase: int = -1
    since: int = 0
    witness: Witness = field(default_factory=Witness)
    marks: dict[str, tuple[object, ...]] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)
    uses: Uses = field(default_factory=Uses)
    received: set[str] = field(default_factory=set)
    flickering: set[str] = field(default_factory=set)
    round: _Round | None = None
    step: _Step | None = None

    def begin_phase(self, phase: int) -> None:
        """Forget what only held in the last phase."""
        self.phase = phase
        self.uses, self.received, self.flickering = Uses(), set(), set()
        self.round = _Round(fresh=True)

    def trainable(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Give what trains and may be reported."""
        return {
            name: parameter
            for name, parameter in named_unique_parameters(module).items()
            if parameter.requires_grad and name not in self.ignored and has_values(parameter)
        }


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _schedules(trainer: Trainer) -> list[FreezeSchedule]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, FreezeSchedule)]


def _averages(callback: Callback) -> bool:
    """Whether a callback replaces the weights at the end."""
    return isinstance(callback, WeightAveraging | StochasticWeightAveraging)


def _optimizers(trainer: Trainer) -> list[Optimizer]:
    return [optimizer for optimizer in trainer.optimizers if not isinstance(optimizer, _MockOptimizer)]


def _trained(trainer: Trainer) -> int:
    """Give how many batches the fit has trained, also before it was resumed."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)


def _gathered(trainer: Trainer, mine: T) -> list[T]:
    """Give what each process has; one call that all make."""
    return from_all(mine) if trainer.world_size > 1 else [mine]
