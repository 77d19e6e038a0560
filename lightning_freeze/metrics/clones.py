"""A clone of the metrics for each dataloader of a stage, and what of them a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_freeze._lightning import MisconfigurationException
from lightning_freeze.metrics.values import describe, scalars
from lightning_freeze.ranks import from_all

# What every metric computes anew. torchmetrics has no public way to save what it keeps beside its states.
_CACHES = ("_computed", "_forward_cache")


class Clones:
    """Holds a clone of the metrics for each dataloader of one stage."""

    def __init__(self, metrics: MetricCollection) -> None:
        self.clones: list[MetricCollection] = []
        self._metrics = metrics
        self._updated: set[int] = set()
        self._random: Tensor | None = None

    def prepare(self, dataloaders: int, device: torch.device) -> None:
        """Make as many clones as there are dataloaders; those that are there go on."""
        if len(self.clones) != dataloaders:
            self.clones = [self._metrics.clone() for _ in range(dataloaders)]
        for clone in self.clones:
            clone.to(device)

    def reset(self) -> None:
        """Let go of what the metrics have gathered."""
        self._updated = set()
        for clone in self.clones:
            clone.reset()

    def update(self, dataloader: int, given: Any) -> None:
        """Update the metrics of a dataloader with positional or named arguments; raise if ``given`` is neither."""
        if not isinstance(given, Mapping | tuple | list):
            raise MisconfigurationException(
                f"MetricLogger(inputs=…) gave {describe(given)}; it has to give a tuple (preds, target), or a dict of "
                "named arguments."
            )
        given = apply_to_collection(given, Tensor, Tensor.detach)
        self._updated.add(dataloader)
        with self._apart():
            if isinstance(given, Mapping):
                self.clones[dataloader].update(**given)
            else:
                self.clones[dataloader].update(*given)

    def values(self) -> Iterator[tuple[int, dict[str, Tensor], list[str]]]:
        """Yield the scalars of each dataloader of which any process saw a batch, and the names of what is no scalar.

        Every process has to call this.
        """
        for dataloader in sorted(set[int]().union(*from_all(self._updated))):
            with self._apart():
                values, left_out = scalars(self.clones[dataloader])
            yield dataloader, values, left_out

    def saved(self, *, states: bool) -> list[dict[str, Any]]:
        """Return what metrics keep from epoch to epoch, and their ``states``, as ``weights_only`` can load it."""
        fresh = _metrics_in(self._metrics)
        held = [
            {path: _held(metric, fresh[path], states) for path, metric in _metrics_in(clone).items()}
            for clone in self.clones
        ]
        return list(_copied(held, "cpu"))

    def load(self, saved: list[dict[str, Any]], device: torch.device, *, states: bool) -> None:
        """Take over what was saved, without ``states`` only what metrics keep longer; raise if a state does not fit."""
        self.prepare(len(saved), device)
        for index, clone in enumerate(self.clones):
            metrics = _metrics_in(clone)
            for path, metric in metrics.items():
                one = saved[index].get(path, {"state": {}, "kept": {}})
                if states:
                    _check_fits(path, metric, one["state"])
                # Copies, because metrics add in place and those of a compute group were saved as one.
                vars(metric).update(_copied({**one["state"], **one["kept"]}, metric.device))
            if any(metric.update_count for metric in metrics.values()):
                self._updated.add(index)
        if not states:
            self.reset()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Have metrics keep no graph, and draw random numbers of their own, so that training draws what it would."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if self._random is not None:
                torch.set_rng_state(self._random)
            yield
            self._random = torch.get_rng_state()


def _metrics_in(collection: MetricCollection) -> dict[str, Metric]:
    return {path: module for path, module in collection.named_modules() if isinstance(module, Metric)}


def _copied(nest: Any, device: Any) -> Any:
    return apply_to_collection(nest, Tensor, Tensor.to, device, copy=True)


def _held(metric: Metric, fresh: Metric, states: bool) -> dict[str, Any]:
    """Return a metric's state, if asked for, and what it keeps longer: plain attributes unlike those of a fresh one."""

    def changed(name: str, value: Any) -> bool:
        other = vars(fresh).get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            return not torch.equal(value.cpu(), other.cpu())
        return isinstance(value, Tensor) or (type(value) in (bool, int, float) and value != other)

    state, own = metric.metric_state, vars(metric).items()
    kept = {name: value for name, value in own if name not in (*state, *_CACHES) and changed(name, value)}
    return {"state": state if states else {}, "kept": kept}


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
