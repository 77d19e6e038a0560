"""A clone of the metrics for each stage and dataloader, and what of them a checkpoint holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_freeze._lightning import MisconfigurationException
from lightning_freeze.metrics.values import scalars, update
from lightning_freeze.ranks import from_all

# What every metric computes anew. torchmetrics has no public way to save what it keeps beside its states.
_CACHES = ("_computed", "_forward_cache")


class Clones:
    """Holds, for each stage, a clone of the metrics for each dataloader."""

    def __init__(self, metrics: MetricCollection, stages: Collection[str]) -> None:
        self._metrics, self._stages = metrics, stages
        self._of: dict[str, list[MetricCollection]] = {}
        self._updated: set[tuple[str, int]] = set()
        self._random: Tensor | None = None

    def __getitem__(self, stage: str) -> list[MetricCollection]:
        return self._of.get(stage, [])

    def prepare(self, stage: str, dataloaders: int, device: torch.device) -> None:
        """Make as many clones as there are dataloaders; those that are there go on."""
        if stage in self._stages and len(self[stage]) != dataloaders:
            self._of[stage] = [self._metrics.clone() for _ in range(dataloaders)]
        for clone in self[stage]:
            clone.to(device)

    def reset(self, stage: str) -> None:
        """Let go of what the metrics of a stage have gathered."""
        self._updated = {place for place in self._updated if place[0] != stage}
        for clone in self[stage]:
            clone.reset()

    def update(self, stage: str, dataloader: int, given: Any) -> None:
        """Update the metrics of a dataloader."""
        self._updated.add((stage, dataloader))
        with self._own_random_numbers():
            update(self[stage][dataloader], given)

    def values(self, clone: MetricCollection) -> tuple[dict[str, Tensor], list[str]]:
        """Return the scalars that a clone computes, and the names of what is no scalar."""
        with self._own_random_numbers():
            return scalars(clone)

    def updated(self, stage: str) -> Iterator[tuple[int, MetricCollection]]:
        """Yield dataloader and clone where a batch was seen on any process; every process has to call this."""
        counts = [[metric.update_count for metric in _metrics_in(clone).values()] for clone in self[stage]]
        # Counts are in checkpoints; Running has none.
        seen = from_all([(stage, i) in self._updated or any(own) for i, own in enumerate(counts)])
        return ((i, clone) for i, clone in enumerate(self[stage]) if any(theirs[i] for theirs in seen))

    def saved(self) -> dict[str, list[Any]]:
        """Return what metrics of training have gathered, and what all keep longer, as ``weights_only`` can load it."""
        fresh = _metrics_in(self._metrics)
        held = {
            stage: [{path: _held(one, fresh[path], stage) for path, one in _metrics_in(clone).items()} for clone in own]
            for stage, own in (("train", self["train"]), ("val", self["val"]))
        }
        return dict(_copied(held, "cpu"))

    def load(self, saved: Mapping[str, list[Any]], device: torch.device, *, states: bool) -> None:
        """Go on where the metrics that were saved were; raise if what they had gathered does not fit."""
        for stage, held in saved.items():
            self.prepare(stage, len(held), device)
            for clone, entry in zip(self[stage], held, strict=False):
                for path, metric in _metrics_in(clone).items():
                    one = entry.get(path, {"state": {}, "kept": {}})
                    if states and stage == "train":
                        _check_fits(path, metric, one["state"])
                    # Copies, because metrics add in place and those of a compute group were saved as one.
                    vars(metric).update(_copied({**one["state"], **one["kept"]}, metric.device))
            if not states:
                self.reset(stage)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Have metrics that draw some, as BootStrapper, go on with their own, so that training draws what it would."""
        others = torch.get_rng_state()
        if self._random is not None:
            torch.set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(others)


def _metrics_in(collection: MetricCollection) -> dict[str, Metric]:
    return {path: module for path, module in collection.named_modules() if isinstance(module, Metric)}


def _copied(nest: Any, device: Any) -> Any:
    return apply_to_collection(nest, Tensor, Tensor.to, device, copy=True)


def _held(metric: Metric, fresh: Metric, stage: str) -> dict[str, Any]:
    """Return a metric's state, in training, and what it keeps longer: plain attributes unlike those of a fresh one."""

    def changed(name: str, value: Any) -> bool:
        other = vars(fresh).get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            return not torch.equal(value.cpu(), other.cpu())
        return isinstance(value, Tensor) or (type(value) in (bool, int, float) and value != other)

    state, own = metric.metric_state, vars(metric).items()
    kept = {name: value for name, value in own if name not in (*state, *_CACHES) and changed(name, value)}
    return {"state": state if stage == "train" else {}, "kept": kept}


def _check_fits(path: str, metric: Metric, saved: Mapping[str, Any]) -> None:
    def fits(fresh: Any, value: Any) -> bool:
        if isinstance(fresh, list):
            return isinstance(value, list)
        return isinstance(value, Tensor) and fresh.shape in ((), value.shape)  # a scalar may have been broadcast

    fresh = metric.metric_state
    if saved.keys() != fresh.keys() or not all(fits(fresh[name], saved[name]) for name in fresh):
        raise MisconfigurationException(
            f"The checkpoint holds a state of the metric {path!r} that does not fit {metric} as MetricLogger has it "
            "now. Give MetricLogger the metrics with which the checkpoint was written."
        )
