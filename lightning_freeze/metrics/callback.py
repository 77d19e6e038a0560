"""Metrics of training, validation and test that stay out of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torchmetrics import Metric, MetricCollection

from lightning_freeze._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    epoch_names,
    evaluation_dataloaders,
)
from lightning_freeze.logs import get_logger
from lightning_freeze.metrics.arguments import Inputs, Stage, as_collection, as_prefix
from lightning_freeze.metrics.clones import Clones
from lightning_freeze.metrics.values import preds_and_target
from lightning_freeze.ranks import from_all
from lightning_freeze.words import listed, some_of

_log = get_logger(__name__)


class MetricLogger(Callback):
    """Compute torchmetrics over each epoch and log them, outside of the model and its graph.

    Each stage, and each dataloader of a stage, has a clone of the metrics: reset when an epoch starts, updated after
    every step and logged when the epoch ends, joined over all processes. As with ``self.log``, ModelCheckpoint,
    EarlyStopping and LR schedulers can monitor the values. Names are the prefix and the metric's name:
    ``val/accuracy``, and with several dataloaders ``val/accuracy/dataloader_idx_0``.

    A checkpoint from the middle of a training epoch holds what the metrics have seen so far, and what they keep from
    epoch to epoch, such as the extremes of ``MinMaxMetric``; a fit that resumes with as many processes goes on exactly
    there. Validation that was cut off starts anew.

    Args:
        metrics: A torchmetrics ``Metric``, a ``MetricCollection`` or a dict of name to metric; they are cloned. What
            they compute that is no scalar, such as ``classes`` of ``MeanAveragePrecision``, is left out, and the log
            says so once.
        stages: Which of ``"train"``, ``"val"`` and ``"test"`` to log.
        inputs: What to update the metrics with: called with what the step returned and its batch, it returns a tuple
            ``(preds, target)``, or a dict of named arguments. By default, the step returns a dict with both. Prefer
            probabilities to logits: ``AUROC`` and others tell them apart by the values of each batch.
        prefix: What names start with; ``{stage}`` becomes the stage.
        prog_bar: Whether the progress bar shows the values.

    Raises:
        ValueError: If an argument has a value that it cannot have; after an epoch, if a metric computes no scalar.
        TypeError: If an argument is of another type.
        MisconfigurationException: After the first step, if it returned nothing to update the metrics with; at fit
            start, or when values are computed, if another MetricLogger or ``self.log`` uses the same name.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> MetricLogger({"accuracy": MulticlassAccuracy(num_classes=3)}, stages=("train", "val"), prog_bar=True).stages
        ('train', 'val')
    """

    def __init__(
        self,
        metrics: Metric | MetricCollection | Mapping[str, Metric | MetricCollection],
        *,
        stages: Sequence[Stage] = ("train", "val", "test"),
        inputs: Inputs | None = None,
        prefix: str = "{stage}/",
        prog_bar: bool = False,
    ) -> None:
        self.metrics = as_collection(metrics)
        self.stages: tuple[Stage, ...] = some_of("MetricLogger", "stages", stages, get_args(Stage))
        self.prefix = as_prefix(prefix, self.stages)
        self.inputs, self.prog_bar = inputs, prog_bar
        if inputs is not None and not callable(inputs):
            right = "lambda outputs, batch: (outputs['logits'], batch[1])"
            raise TypeError(f"MetricLogger(inputs={inputs!r}): it is a function, such as {right}.")
        if not isinstance(prog_bar, bool):
            raise TypeError(f"MetricLogger(prog_bar={prog_bar!r}): it is True or False.")
        self._clones: dict[str, Clones] = {}
        self._names = set(map(str, self.metrics))  # MinMaxMetric shows others when it computes them
        self._left_out: set[str] = set()
        self._missing = ""

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer differ by what they log in which stages."""
        return self._generate_state_key(prefix=self.prefix, metrics=list(self.metrics), stages=sorted(self.stages))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier fit has seen, before a checkpoint may be loaded; refuse another of the same names."""
        self._clones = {stage: Clones(self.metrics) for stage in (*get_args(Stage), "sanity check")}
        self._missing = ""
        _refuse_same_names(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the metrics ready; those from a checkpoint go on."""
        if "train" in self.stages:
            self._clones["train"].prepare(1, pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew. An epoch that is resumed in its middle does not come here."""
        self._missing = ""
        self._clones["train"].reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the metrics."""
        # What Lightning makes of a training step that returned None to be skipped.
        if not (pl_module.automatic_optimization and outputs == {}):
            self._warn_of_missing(trainer)
            self._update(trainer, outputs, batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's values, before ModelCheckpoint and EarlyStopping look at them."""
        self._warn_of_missing(trainer)
        # Not reset here: a fit that resumes after the last validation of an epoch comes here again.
        self._log_values(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        clones, stage = self._running(trainer)
        if stage in self.stages:
            clones.prepare(evaluation_dataloaders(trainer), pl_module.device)
        clones.reset()

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
        self._update(trainer, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values and let go of what the metrics have gathered."""
        self._log_values(trainer, pl_module)
        clones, _ = self._running(trainer)
        clones.reset()

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    # Not in state_dict, which does not see the other processes: only rank zero writes, and each has seen other data.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what the metrics of training have seen in this epoch, and what all keep longer, for every process."""
        ranks = from_all({stage: self._clones[stage].saved(states=stage == "train") for stage in ("train", "val")})
        if any(any(theirs.values()) for theirs in ranks):
            checkpoint["callbacks"][self.state_key] = {"ranks": ranks}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over what this process has seen; from another number of processes, only what metrics keep longer."""
        if trainer.state.fn != "fit":
            return
        entry = checkpoint["callbacks"].get(self.state_key, {})
        ranks = entry.get("ranks", [{}])
        same = len(ranks) == trainer.world_size
        if entry and "ranks" not in entry:
            self._missing = "has the state of MetricLogger in the form of another version"
        elif not any(theirs.get("train") for theirs in ranks):
            names = ", ".join(map(str, self.metrics))
            given = f"(stages={self.stages!r}, prefix={self.prefix!r}) with the metrics {names}"
            self._missing = f"has no state of MetricLogger{given}"
        elif not same:
            self._missing = f"is from {len(ranks)} processes, and there are {trainer.world_size} now"
        for stage, saved in ranks[trainer.global_rank if same else 0].items():
            self._clones[stage].load(saved, pl_module.device, states=same and stage == "train")

    def _warn_of_missing(self, trainer: Trainer) -> None:
        """Say that the epoch was resumed in its middle without what the metrics have seen before."""
        if self._missing and "train" in self.stages:
            rest = f"its metrics of epoch {trainer.current_epoch} cover only the rest of it"
            _log.warning("the checkpoint %s: %s", self._missing, rest)
        self._missing = ""

    def _running(self, trainer: Trainer) -> tuple[Clones, Stage]:
        """Return the metrics of the running loop, and its stage: what the sanity check sees does not count."""
        stage: Stage = "train" if trainer.training else "test" if trainer.testing else "val"
        return self._clones["sanity check" if trainer.sanity_checking else stage], stage

    def _update(self, trainer: Trainer, outputs: Any, batch: Any, dataloader_idx: int = 0) -> None:
        clones, stage = self._running(trainer)
        if stage in self.stages:
            given = self.inputs(outputs, batch) if self.inputs else preds_and_target(outputs, stage)
            clones.update(dataloader_idx, given)

    def _log_values(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clones, stage = self._running(trainer)
        prefix, taken = self.prefix.format(stage=stage), epoch_names(trainer)
        for index, values, left_out in clones.values():
            if not self._left_out.issuperset(left_out):
                _log.info(
                    "MetricLogger logs scalars only, and leaves out what else metrics compute: %s", listed(left_out)
                )
            self._left_out |= set(left_out)
            self._names |= set(values)
            _refuse_same_names(trainer)
            for name, value in values.items():
                logged = f"{prefix}{name}" + (f"/dataloader_idx_{index}" if len(clones.clones) > 1 else "")
                if logged in taken:
                    raise MisconfigurationException(
                        f"MetricLogger logs {logged!r}, and so does self.log in {taken[logged]}; only one of the two "
                        "values would show. Give one of them another name, such as MetricLogger(..., "
                        f'prefix="metrics/{self.prefix}").'
                    )
                # Every process has the joined value; of equal ones the largest is exactly that, unlike their mean.
                how: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max", "add_dataloader_idx": False}
                pl_module.log(logged, value.to(pl_module.device), prog_bar=self.prog_bar, **how)


def _refuse_same_names(trainer: Trainer) -> None:
    taken: set[str] = set()
    for logger in [one for one in callbacks_of(trainer) if isinstance(one, MetricLogger)]:
        names = {f"{logger.prefix.format(stage=stage)}{name}" for stage in logger.stages for name in logger._names}
        if both := names & taken:
            raise MisconfigurationException(
                f"Two MetricLoggers log {min(both)!r}, and only one of the two values would show. Give one of them "
                f'another prefix, such as MetricLogger(..., prefix="other/{logger.prefix}").'
            )
        taken |= names
