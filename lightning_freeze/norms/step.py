"""Measures what is around an optimizer step: gradients before and after clipping, weights, and their update."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.freezing.optimizers import members
from lightning_freeze.freezing.steps import Steps
from lightning_freeze.norms.core import gradients, measure, nonfinite, spread, vector

#: What to measure around an optimizer step.
What: TypeAlias = Literal["grad", "weight", "update"]


class BackwardNorms:
    """Holds the norm that each gradient had after the last backward that changed it, whatever clips it since."""

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def before(self, parameters: Mapping[str, nn.Parameter], scale: Tensor | None = None) -> None:
        """Measure the gradients that are known, before a backward: they may have been clipped."""
        known = {name: gradient for name, gradient in gradients(parameters).items() if name in self.norms}
        self._before = measure(known, scale=scale)

    def after(self, parameters: Mapping[str, nn.Parameter], scale: Tensor | None = None) -> None:
        """Measure all gradients after a backward; of those that it did not change, the norm that is known stays."""
        # Versions of tensors are no help: DDP's gradient_as_bucket_view makes the gradients of a bucket share one.
        now = measure(gradients(parameters), scale=scale)
        if both := [name for name in now if name in self._before]:
            new, old, known = (vector([norms[name] for name in both]) for norms in (now, self._before, self.norms))
            now |= zip(both, torch.where(new == old, known, new).unbind(), strict=True)
        self.norms |= now

    def unclipped(self, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the norms of gradients as a step begins with, where it is known, what they were before clipping."""
        both = [name for name in now if name in self.norms]
        if not both:
            return now
        new, old = (vector([norms[name] for name in both]) for norms in (now, self.norms))
        # One that is zero now was zeroed, not clipped, unless an infinite gradient has clipped all others to zero.
        zeroed = (new == 0) & vector([*self.norms.values()]).isfinite().all()
        return now | dict(zip(both, torch.where(zeroed, new, old).unbind(), strict=True))


class StepNorms:
    """Measures the next step of an optimizer: call :meth:`begins` before it; hooks do the rest until :meth:`close`."""

    def __init__(self, optimizer: Optimizer, what: Collection[What] = ("grad", "weight", "update")) -> None:
        self.norms: dict[str, dict[str, Tensor]] = {}  # for each quantity that of each parameter
        self._optimizer, self._what = optimizer, what
        self._parameters: dict[str, nn.Parameter] = {}
        self._copies: dict[str, Tensor] = {}
        self._scale: Tensor | None = None
        self._steps = Steps(optimizer)
        # Not after it: SGD(nesterov=True, foreach=True) adds its momentum to gradients in place.
        self._steps.before.append(lambda _: self._measure_clipped())
        self._steps.counted.append(lambda _: self.end())

    @torch.no_grad()
    def begins(
        self, named: Mapping[str, nn.Parameter], scale: Tensor | None = None, backwards: BackwardNorms | None = None
    ) -> None:
        """Measure weights and gradients; ``backwards`` knows those that were clipped already."""
        held = set(map(id, members([self._optimizer])))
        changing = {n: p for n, p in named.items() if id(p) in held and (p.requires_grad or p.grad is not None)}
        self._parameters, self._scale = changing, scale
        if "grad" in self._what:
            self.norms["grad"] = (backwards or BackwardNorms()).unclipped(measure(gradients(changing), scale=scale))
        if "weight" in self._what or "update" in self._what:
            self.norms["weight"] = measure(changing)
        if "update" in self._what:
            self._copies = {name: p.detach().clone() for name, p in changing.items()}

    @torch.no_grad()
    def end(self) -> None:
        """Measure what the step has changed; AMP may have skipped it. A second call does nothing."""
        self._measure_clipped()
        if "update" in self._what and "update" not in self.norms and self.norms:
            self.norms["update"] = measure({n: old.sub_(self._parameters[n]) for n, old in self._copies.items()})
            self._copies = {}

    def close(self) -> None:
        """Remove the hooks."""
        self._steps.close()

    def _measure_clipped(self) -> None:
        if "grad" in self.norms and "grad_clipped" not in self.norms:
            self.norms["grad_clipped"] = measure(gradients(self._parameters), scale=self._scale)


def named_metrics(
    norms: Mapping[str, Mapping[str, float]], what: Collection[What], places: Mapping[str, str]
) -> dict[str, float]:
    """Return what was measured as metrics: ``grad``, ``grad/backbone``, ``update_ratio/backbone``, …."""
    joined = {quantity: spread(values, places) for quantity, values in norms.items()}
    if "update" in joined:
        updates, weights = joined["update"], joined["weight"]
        joined["update_ratio"] = {
            place: norm / weights[place] if weights[place] else math.inf if norm else 0.0
            for place, norm in updates.items()
        }
    if "weight" not in what:
        joined.pop("weight", None)
    metrics = {
        f"{quantity}/{place}".rstrip("/"): n for quantity, values in joined.items() for place, n in values.items()
    }
    return metrics | ({"nonfinite_grads": float(len(nonfinite(norms["grad"])))} if "grad" in norms else {})
