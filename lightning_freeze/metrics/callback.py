"""Metrics of training, validation and test that stay out of the model."""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

from lightning_freeze._lightning import Callback, LightningModule, MisconfigurationException, Trainer, without_fit
from lightning_freeze.logs import get_logger
from lightning_freeze.ranks import from_all

_log = get_logger(__name__)

#: A part of a Trainer's work that has metrics of its own.
Stage: TypeAlias = Literal["train", "val", "test"]

#: From what the step returned and its batch to what ``Metric.update`` takes: positional arguments, or named ones.
Inputs: TypeAlias = Callable[[Any, Any], Sequence[Any] | Mapping[str, Any]]

_OWN_METRIC = (
    "Give one that sums it up in a number, such as an area under a curve, or a torchmetrics.Metric of your own."
)
_STEPS = {"train": "training_step", "val": "validation_step", "test": "test_step"}
# What every Metric has beside its state, and computes anew.
_PASSING = ("_computed", "_forward_cache", "_update_count")
_ALIASES = {"training": "train", "fit": "train", "validation": "val", "validate": "val", "testing": "test"}


class MetricLogger(Callback):
    """Compute torchmetrics over each epoch and log them, outside of the model and its graph.

    Each stage, and each dataloader of a stage, has a clone of the metrics of its own. It is reset when an epoch starts,
    updated after every step and logged when the epoch ends, joined over all processes. As with ``self.log``, values are
    in ``trainer.callback_metrics``, where ModelCheckpoint, EarlyStopping and LR schedulers can monitor them, in the
    Trainer's loggers and in what ``trainer.validate`` and ``trainer.test`` return. Names are the prefix and the
    metric's name: ``val/accuracy``, and with several dataloaders ``val/accuracy/dataloader_idx_0``.

    A checkpoint from the middle of a training epoch holds what the metrics have seen so far, from every process.
    Resuming with as many processes goes on exactly there. (Validation that is cut off starts anew.) What a metric keeps
    from epoch to epoch, such as the extremes of torchmetrics' ``MinMaxMetric``, goes on too, and the sanity check is
    not among it. The model holds nothing of all that: neither its modules nor its ``state_dict`` change.

    A metric that draws random numbers, such as torchmetrics' ``BootStrapper``, draws them from the global generator, as
    it would anywhere else. One that takes logits, such as ``AUROC``, tells them from probabilities anew in each batch:
    a small batch of logits that all lie from 0 to 1 counts as it is. Give it probabilities to be sure.

    Args:
        metrics: A torchmetrics ``Metric``, a ``MetricCollection`` or a dict of name to metric. It is cloned, and itself
            never updated. It has to compute scalars.
        stages: Which of ``"train"``, ``"val"`` and ``"test"`` to log.
        inputs: What to update the metrics with: called with what the step returned and its batch, it gives a tuple
            ``(preds, target)``, or a dict of named arguments. By default, the step returns a dict with both.
        prefix: What names start with; ``{stage}`` becomes the stage.

    Raises:
        ValueError: If an argument has a value that it cannot have; after an epoch, if a metric's value is no scalar.
        TypeError: If an argument is of another type.
        MisconfigurationException: After the first step, if it returned nothing to update the metrics with; at fit
            start, or when values are computed, if another MetricLogger or ``self.log`` uses the same name.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> class Net(LightningModule):
        ...     def validation_step(self, batch, batch_idx):
        ...         inputs, target = batch
        ...         return {"preds": inputs, "target": target}
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     callbacks=[MetricLogger({"accuracy": MulticlassAccuracy(3)})])
        >>> data = DataLoader([(torch.eye(3)[i], i) for i in range(3)], batch_size=2)
        >>> trainer.validate(Net(), data, verbose=False)
        [{'val/accuracy': 1.0}]
    """

    def __init__(
        self,
        metrics: Metric | MetricCollection | Mapping[str, Metric | MetricCollection],
        *,
        stages: Sequence[Stage] = ("train", "val", "test"),
        inputs: Inputs | None = None,
        prefix: str = "{stage}/",
    ) -> None:
        self.metrics = _as_collection(metrics)
        self.stages = _as_stages(stages)
        if inputs is not None and not callable(inputs):
            raise TypeError(
                f"MetricLogger(inputs={inputs!r}): it is a function, such as "
                "lambda outputs, batch: (outputs['logits'], batch[1])."
            )
        self.inputs = inputs
        self.prefix = _as_prefix(prefix, self.stages)
        self._clones: dict[str, list[MetricCollection]] = {}
        self._aside: list[MetricCollection] = []
        self._shown: set[str] = set()
        self._missing = False

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer are told apart by what they log in which stages."""
        names, stages = list(self.metrics.keys()), sorted(self.stages)
        return self._generate_state_key(prefix=self.prefix, metrics=names, stages=stages)

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier fit has seen, before a checkpoint may be loaded; refuse another of the same names."""
        self._clones, self._shown, self._missing = {}, set(), False
        self._check_others(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the metrics ready; those from a checkpoint go on."""
        self._prepare("train", 1, pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew. An epoch that is resumed in its middle does not come here."""
        self._missing = False
        self._reset("train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the metrics."""
        # What Lightning makes of a training step that returned None to be skipped.
        skipped = pl_module.automatic_optimization and outputs == {}
        if not skipped:
            self._tell_of_missing(trainer)
            self._update("train", 0, outputs, batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's values, before ModelCheckpoint and EarlyStopping look at them."""
        self._tell_of_missing(trainer)
        # Not reset here: a fit that resumes after the last validation of an epoch comes here again.
        self._log_values("train", pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._prepare("val", _dataloaders(trainer), pl_module.device)
        self._reset("val")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics."""
        self._update("val", dataloader_idx, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values and let go of what the metrics have gathered."""
        self._log_values("val", pl_module)
        self._reset("val")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put aside what came from a checkpoint: Lightning checks also when it resumes between epochs."""
        self._aside = self._clones.pop("val", [])

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what the check has shown, also where a reset would not."""
        self._clones["val"], self._aside = self._aside, []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._prepare("test", _dataloaders(trainer), pl_module.device)
        self._reset("test")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics."""
        self._update("test", dataloader_idx, outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values and let go of what the metrics have gathered."""
        self._log_values("test", pl_module)
        self._reset("test")

    # Checkpoints
    # Not in state_dict, which is not told of the other processes: only rank zero writes, and each has seen other data.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what the metrics of training have seen in this epoch, and what all keep longer, for every process."""
        if not {"train", "val"} & set(self.stages):
            return
        told = from_all(
            {
                "train": [(_states(clone), _kept(clone, self.metrics)) for clone in self._clones.get("train", [])],
                "val": [({}, _kept(clone, self.metrics)) for clone in self._clones.get("val", [])],
            }
        )
        if any(map(any, (theirs.values() for theirs in told))):
            checkpoint["callbacks"][self.state_key] = {"processes": told}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over what this process has seen."""
        if trainer.state.fn != "fit":
            return
        saved = checkpoint["callbacks"].get(self.state_key)
        if saved is None:
            self._missing = True
            return
        told = saved.get("processes", [])
        if len(told) != trainer.world_size:
            if trainer.is_global_zero:
                _log.warning(
                    "the checkpoint %s: if it is from the middle of an epoch, the metrics of that epoch cover only the "
                    "rest of it, and what metrics keep from epoch to epoch begins anew",
                    f"is from {len(told)} processes, and there are {trainer.world_size} now"
                    if told
                    else "has the state of MetricLogger in the form of another version",
                )
            return
        self._missing = not told[trainer.global_rank].get("train")
        for stage, mine in told[trainer.global_rank].items():
            if stage in self.stages and mine:
                self._prepare(stage, len(mine), pl_module.device)
                for clone, (states, kept) in zip(self._clones[stage], mine, strict=True):
                    if stage == "train":
                        _load_states(clone, states)
                    _load_kept(clone, kept)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model's log functions that Lightning lends; what metrics have seen stays."""
        return without_fit(self.__dict__)

    def _tell_of_missing(self, trainer: Trainer) -> None:
        """Say that the epoch was resumed in its middle without what the metrics have seen before."""
        if self._missing and "train" in self.stages and trainer.is_global_zero:
            _log.warning(
                "the checkpoint has no state of MetricLogger(stages=%r, prefix=%r) with the metrics %s: its metrics of "
                "epoch %d cover only the rest of it",
                *(self.stages, self.prefix, ", ".join(map(str, self.metrics)), trainer.current_epoch),
            )
        self._missing = False

    # What

    def _names(self) -> set[str]:
        """Give what metrics are logged as; some, such as ``MinMaxMetric``, show their names only in their values."""
        names = self._shown or {str(name) for name in self.metrics}
        return {f"{self.prefix.format(stage=stage)}{name}" for stage in self.stages for name in names}

    def _check_others(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if isinstance(callback, MetricLogger) and callback is not self]
        if both := self._names() & {name for other in others for name in other._names()}:
            raise MisconfigurationException(
                f"Two MetricLoggers log {min(both)!r}, and only one of the two values would show. Give one of them "
                f'another prefix, such as MetricLogger(..., prefix="other/{self.prefix}").'
            )

    def _prepare(self, stage: Stage, dataloaders: int, device: torch.device) -> None:
        if stage not in self.stages:
            return
        clones = self._clones.setdefault(stage, [])
        if len(clones) != dataloaders:
            clones[:] = [self.metrics.clone() for _ in range(dataloaders)]
        for clone in clones:
            clone.to(device)

    def _reset(self, stage: Stage) -> None:
        for clone in self._clones.get(stage, []):
            clone.reset()

    @torch.no_grad()
    def _update(self, stage: Stage, dataloader_idx: int, outputs: Any, batch: Any) -> None:
        if stage not in self.stages:
            return
        clone = self._clones[stage][dataloader_idx]
        given = self.inputs(outputs, batch) if self.inputs is not None else _preds_and_target(outputs, _STEPS[stage])
        given = apply_to_collection(given, Tensor, Tensor.detach)
        if isinstance(given, Mapping):
            clone.update(**given)
        elif isinstance(given, tuple | list):
            clone.update(*given)
        else:
            raise MisconfigurationException(
                f"MetricLogger(inputs=…) gave {_describe(given)}; it has to give a tuple (preds, target), or a dict of "
                "named arguments."
            )

    @torch.no_grad()
    def _log_values(self, stage: Stage, pl_module: LightningModule) -> None:
        trainer, clones = pl_module.trainer, self._clones.get(stage, [])
        prefix, taken = self.prefix.format(stage=stage), _logged_in_epoch(trainer)
        updated = from_all([any(metric.update_count for metric in _metrics_in(clone).values()) for clone in clones])
        for index, clone in enumerate(clones):
            if not any(mine[index] for mine in updated):
                continue  # no batch, so no value: an empty dataloader, or nothing left of a resumed epoch
            suffix = f"/dataloader_idx_{index}" if len(clones) > 1 else ""
            values = clone.compute()
            if not values.keys() <= self._shown:
                self._shown |= values.keys()
                self._check_others(trainer)
            for name, value in values.items():
                logged = f"{prefix}{name}{suffix}"
                if logged in taken:
                    raise MisconfigurationException(
                        f"MetricLogger logs {logged!r}, and so does self.log in {taken[logged]}; only one of the two "
                        "values would show. Give one of them another name, such as MetricLogger(..., "
                        f'prefix="metrics/{self.prefix}").'
                    )
                # Every process has the joined value; of equal ones the largest is exactly that, unlike their mean.
                scalar = _scalar(name, value).to(pl_module.device)
                pl_module.log(logged, scalar, sync_dist=True, reduce_fx="max", add_dataloader_idx=False)


def _logged_in_epoch(trainer: Trainer) -> dict[str, str]:
    """Give the names that anybody has logged with ``self.log`` for this epoch, and the hook in which."""
    results = trainer._results
    assert results is not None
    return {
        results._forked_name(result, on_step=False)[0]: result.meta.fx.partition(".")[0]
        for result in results.result_metrics
        if result.meta.on_epoch and not result.has_reset
    }


def _scalar(name: str, result: Any) -> Tensor:
    try:
        value = torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"The metric {name!r} computes {_describe(result)}, and only scalars can be logged. {_OWN_METRIC}"
        ) from None
    if value.numel() != 1:
        mend = (
            "Let it average, or wrap it in torchmetrics.ClasswiseWrapper, which gives each class or output a name."
            if value.ndim == 1
            else _OWN_METRIC
        )
        raise ValueError(
            f"The metric {name!r} computes a tensor of shape {tuple(value.shape)}, and only scalars can be logged. "
            f"{mend}"
        )
    scalar = value.reshape(())
    return scalar if scalar.is_floating_point() else scalar.float()


def _dataloaders(trainer: Trainer) -> int:
    """Give how many dataloaders Lightning tells apart; a CombinedLoader that mixes them counts as one."""
    loop = trainer._evaluation_loop
    return loop.num_dataloaders if loop._is_sequential else 1


def _preds_and_target(outputs: Any, step: str) -> tuple[Any, Any]:
    if isinstance(outputs, Mapping) and "preds" in outputs and "target" in outputs:
        return outputs["preds"], outputs["target"]
    wanted = (
        '{"loss": loss, "preds": preds, "target": target}'
        if step == "training_step"
        else ('{"preds": preds, "target": target}')
    )
    raise MisconfigurationException(
        f'MetricLogger looks for "preds" and "target" in what {step} returns, and it returned {_describe(outputs)}. '
        f"Let it return {wanted}, or say where they are: MetricLogger(..., inputs=lambda outputs, batch: "
        '(outputs["logits"], batch[1])).'
    )


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing in it'}"
    return f"a {type(value).__name__}"


# State


def _metrics_in(collection: MetricCollection) -> dict[str, Metric]:
    return {path: module for path, module in collection.named_modules() if isinstance(module, Metric)}


def _states(collection: MetricCollection) -> dict[str, dict[str, Any]]:
    """Give what each metric has gathered, on the CPU, in types that ``torch.load(weights_only=True)`` accepts."""
    return {
        path: {
            "updates": metric.update_count,
            "state": apply_to_collection(metric.metric_state, Tensor, Tensor.to, "cpu", copy=True),
        }
        for path, metric in _metrics_in(collection).items()
    }


def _kept(collection: MetricCollection, fresh: MetricCollection) -> dict[str, dict[str, Any]]:
    """Give each metric's plain attributes that are not those of a fresh one, as the extremes of ``MinMaxMetric``."""
    others = _metrics_in(fresh)
    return {
        path: {
            name: apply_to_collection(value, Tensor, Tensor.to, "cpu", copy=True)
            for name, value in vars(metric).items()
            if name not in metric.metric_state and name not in _PASSING
            if type(value) in (bool, int, float) or isinstance(value, Tensor)
            if not _same(value, vars(others[path]).get(name))
        }
        for path, metric in _metrics_in(collection).items()
    }


def _same(value: Any, other: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return type(value) is type(other) and bool(value == other)
    return value.dtype == other.dtype and torch.equal(value.cpu(), other.cpu())


def _load_kept(collection: MetricCollection, kept: dict[str, dict[str, Any]]) -> None:
    for path, metric in _metrics_in(collection).items():
        for name, value in kept.get(path, {}).items():
            setattr(metric, name, apply_to_collection(value, Tensor, Tensor.to, metric.device, copy=True))


def _load_states(collection: MetricCollection, states: dict[str, dict[str, Any]]) -> None:
    for path, metric in _metrics_in(collection).items():
        saved = states.get(path, {"state": {}, "updates": 0})
        _check_fits(path, metric, saved["state"])
        for name, value in saved["state"].items():
            # Copies, because metrics add in place and those of a compute group were saved as one.
            setattr(metric, name, apply_to_collection(value, Tensor, Tensor.to, metric.device, copy=True))
        metric._update_count = saved["updates"]
        metric._computed = None


def _check_fits(path: str, metric: Metric, saved: dict[str, Any]) -> None:
    fresh = metric.metric_state
    if saved.keys() != fresh.keys() or not all(_fits(fresh[name], saved[name]) for name in fresh):
        raise MisconfigurationException(
            f"The checkpoint holds a state of the metric {path!r} that does not fit {metric} as MetricLogger has it "
            "now. Give MetricLogger the metrics with which the checkpoint was written."
        )


def _fits(fresh: Any, saved: Any) -> bool:
    if not isinstance(fresh, Tensor) or not isinstance(saved, Tensor):
        return isinstance(fresh, list) and isinstance(saved, list)
    return fresh.ndim == 0 or fresh.shape == saved.shape  # a scalar may have been broadcast


# Arguments


def _as_collection(metrics: Any) -> MetricCollection:
    if isinstance(metrics, MetricCollection):
        collection = metrics.clone()
    elif isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            _check_metric(f"metrics[{name!r}]", metric)
        collection = MetricCollection({name: metric.clone() for name, metric in metrics.items()})
    else:
        _check_metric("metrics", metrics)
        collection = MetricCollection([metrics.clone()])
    if not len(collection):
        raise ValueError("MetricLogger(metrics=…) is empty: there is nothing to log.")
    return collection


def _check_metric(given: str, metric: Any) -> None:
    if isinstance(metric, Metric | MetricCollection):
        return
    shown = getattr(metric, "__name__", repr(metric))
    if isinstance(metric, type):
        mend = f"This is the class; give an object of it: {shown}(...)."
    elif isinstance(metric, MetricTracker):
        shown = "MetricTracker(...)"
        mend = "A tracker keeps epochs apart, which MetricLogger does itself: give it the metric that is tracked."
    elif callable(metric) and not isinstance(metric, nn.Module):
        mend = "This is a function, which knows one batch only; torchmetrics has a class for each."
    elif isinstance(metric, list | tuple):
        mend = f"Write {given}=MetricCollection([...])."
    else:
        mend = "For example torchmetrics.classification.MulticlassAccuracy(num_classes=10)."
    raise TypeError(
        f"MetricLogger({given}={shown}): it is a torchmetrics Metric, a MetricCollection or a dict of name to metric. "
        f"{mend}"
    )


def _as_stages(stages: Any) -> tuple[Stage, ...]:
    if isinstance(stages, str):
        raise TypeError(f"MetricLogger(stages={stages!r}): it is a tuple. Write stages=({stages!r},).")
    known = get_args(Stage)
    for stage in stages:
        if stage not in known:
            close = difflib.get_close_matches(str(stage), [*known, *_ALIASES], n=1)
            hint = f" Did you mean {_ALIASES.get(close[0], close[0])!r}?" if close else ""
            raise ValueError(
                f"MetricLogger(stages=…) has {stage!r}; a stage is one of {', '.join(map(repr, known))}.{hint}"
            )
    if not stages:
        raise ValueError(f"MetricLogger(stages=()) logs nothing: give one of {', '.join(map(repr, known))}.")
    return tuple(stages)


def _as_prefix(prefix: Any, stages: Sequence[Stage]) -> str:
    if not isinstance(prefix, str):
        raise TypeError(f'MetricLogger(prefix={prefix!r}): it is a string, such as "{{stage}}/".')
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(prefix) if field is not None}
    except ValueError as error:
        raise ValueError(f'MetricLogger(prefix="{prefix}"): {error}. An example is "{{stage}}/".') from error
    for field in fields - {"stage"}:
        raise ValueError(
            f'MetricLogger(prefix="{prefix}") has the field {{{field}}}, and {{stage}} is the only one there is. '
            f'Did you mean "{prefix.replace(f"{{{field}}}", "{stage}")}"?'
        )
    if "stage" not in fields and len(stages) > 1:
        raise ValueError(
            f'MetricLogger(prefix="{prefix}") gives the metrics of {", ".join(stages)} the same names. '
            f'Did you mean "{{stage}}/{prefix}"?'
        )
    return prefix
