"""Checks of MetricLogger's arguments: what was given, what is wrong with it, what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

#: A part of a Trainer's work that has metrics of its own.
Stage: TypeAlias = Literal["train", "val", "test"]

#: From what the step returned and its batch to what ``Metric.update`` takes: positional arguments, or named ones.
Inputs: TypeAlias = Callable[[Any, Any], Sequence[Any] | Mapping[str, Any]]


def as_collection(metrics: Any) -> MetricCollection:
    """Return a copy of what was given as metrics; raise if it is something else, or nothing."""
    if isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            _check_metric(f"metrics[{name!r}]", metric)
            if not isinstance(name, str) or "." in name:  # torchmetrics keeps them as modules of these names
                right = str(name).replace(".", "/")
                raise ValueError(
                    f"MetricLogger(metrics={{{name!r}: …}}): names are text without dots, as {right!r} is."
                )
        collection = MetricCollection({name: metric.clone() for name, metric in metrics.items()})
    else:
        _check_metric("metrics", metrics)
        collection = metrics.clone() if isinstance(metrics, MetricCollection) else MetricCollection([metrics.clone()])
    if not len(collection):
        raise ValueError("MetricLogger(metrics=…) is empty: there is nothing to log.")
    return collection


def _check_metric(given: str, metric: Any) -> None:
    if isinstance(metric, Metric | MetricCollection):
        return
    shown = getattr(metric, "__name__", repr(metric))
    if isinstance(metric, type):
        right = f"This is the class; give an object of it: {shown}(...)."
    elif isinstance(metric, MetricTracker):
        shown = "MetricTracker(...)"
        right = "A tracker keeps epochs apart, which MetricLogger does itself: give it the metric that is tracked."
    elif callable(metric) and not isinstance(metric, nn.Module):
        right = "This is a function, which knows one batch only; torchmetrics has a class for each."
    elif isinstance(metric, list | tuple):
        right = f"Write {given}=MetricCollection([...])."
    else:
        right = "For example torchmetrics.classification.MulticlassAccuracy(num_classes=10)."
    kinds = "a torchmetrics Metric, a MetricCollection or a dict of name to metric"
    raise TypeError(f"MetricLogger({given}={shown}): it is {kinds}. {right}")


def as_prefix(prefix: Any, stages: Sequence[Stage]) -> str:
    """Return the prefix; raise if names of different stages would not differ by it."""
    if not isinstance(prefix, str):
        raise TypeError(f'MetricLogger(prefix={prefix!r}): it is a string, such as "{{stage}}/".')
    try:
        prefixes = {prefix.format(stage=stage) for stage in stages}
    except (AttributeError, IndexError, KeyError, ValueError):
        right = re.sub(r"\{\w*\}?", "{stage}", prefix)
        raise ValueError(
            f'MetricLogger(prefix="{prefix}"): {{stage}} is the only field there is. Did you mean "{right}"?'
        ) from None
    if len(prefixes) < len(stages):
        raise ValueError(
            f'MetricLogger(prefix="{prefix}") gives the metrics of {", ".join(stages)} the same names. '
            f'Did you mean "{{stage}}/{prefix}"?'
        )
    return prefix
