"""What metrics are updated with, and which of their values can be logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import ClasswiseWrapper

from lightning_freeze._lightning import MisconfigurationException

_STEPS = {"train": "training_step", "val": "validation_step", "test": "test_step"}
_FOR_VECTORS = "Let it average, or wrap it in torchmetrics.ClasswiseWrapper, which gives each class or output a name."
_FOR_OTHERS = (
    "Give one that sums it up in a number, such as an area under a curve, or a torchmetrics.Metric of your own."
)


def preds_and_target(outputs: Any, stage: str) -> tuple[Any, Any]:
    """Return what a step returned under ``"preds"`` and ``"target"``; raise if they are not there."""
    if isinstance(outputs, Mapping) and "preds" in outputs and "target" in outputs:
        return outputs["preds"], outputs["target"]
    wanted = '"loss": loss, "preds": preds' if stage == "train" else '"preds": preds'
    raise MisconfigurationException(
        f'MetricLogger looks for "preds" and "target" in what {_STEPS[stage]} returns, and it returned '
        f'{describe(outputs)}. Let it return {{{wanted}, "target": target}}, or say where they are: '
        'MetricLogger(..., inputs=lambda outputs, batch: (outputs["logits"], batch[1])).'
    )


def scalars(collection: MetricCollection) -> tuple[dict[str, Tensor], list[str]]:
    """Return the scalars that metrics compute, as floating tensors, and the names of what is no scalar."""
    values = dict(_flat(collection.compute()))
    if any(_scalar(value) is None for value in values.values()):
        values = _with_scalars(values, {name: _computed(one) for name, one in collection.items(copy_state=False)})
    found = {name: scalar for name, value in values.items() if (scalar := _scalar(value)) is not None}
    return found, [name for name in values if name not in found]


def _with_scalars(values: dict[str, Any], computed: Mapping[str, Any]) -> dict[str, Any]:
    """Raise if one of the metrics computes no scalar; of a dict in a ClasswiseWrapper, take values instead of keys."""
    for name, value in computed.items():
        parts = [part for _, part in _flat({name: value})]
        if parts and all(_scalar(part) is None for part in parts):
            shown = f"The metric {name!r} computes {describe(parts[0])}"
            advice = _FOR_VECTORS if isinstance(parts[0], Tensor) and parts[0].ndim == 1 else _FOR_OTHERS
            raise ValueError(f"{shown}, and only scalars can be logged. {advice}")
    if any(isinstance(value, str) for value in values.values()):
        dicts = [value for value in computed.values() if isinstance(value, Mapping)]
        values = {name: value for name, value in values.items() if not isinstance(value, str)}
        values |= dict(_flat({key: value for one in dicts for key, value in one.items()}))
    return values


def _computed(metric: Metric) -> Any:
    """Return what a metric has just computed, and so remembers; what is in a ClasswiseWrapper, if that is a dict."""
    inner = metric.metric.compute() if isinstance(metric, ClasswiseWrapper) else None
    return inner if isinstance(inner, Mapping) else metric.compute()


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what is in nested dicts: those of MultitaskWrapper hold what a metric computes as a dict."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat({f"{name}_{part}": inner for part, inner in value.items()})
        else:
            yield name, value


def _scalar(value: Any) -> Tensor | None:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return tensor.reshape(()).to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.numel() == 1 else None


def describe(value: Any) -> str:
    """Return what kind of value something is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing in it'}"
    return f"a {type(value).__name__}"
