"""Schedules that train a few layers at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from lightning_freeze.schedule.arguments import as_layers
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.preset import Layers, Parts, Preset, preset
from lightning_freeze.words import one_of, whole_number

Order = Literal["random", "ascending", "descending"]


def layerwise_sampling(
    layers: Layers,
    always: str | Sequence[str] | None = None,
    *,
    total_steps: int | None = None,
    count: int = 2,
    every_n_steps: int = 20,
    seed: int = 0,
    order: Order = "random",
    weights: Sequence[float] | None = None,
) -> Preset:
    """Train a few layers at a time, drawn anew every so many optimizer steps.

    It takes the memory of these few layers, if optimizer state is dropped or offloaded when they freeze: Pan et al.,
    "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024. In order
    instead of at random, it is that of BAdam (Luo et al., NeurIPS 2024).

    There are as many draws as the fit takes, which is known when it begins. Each is a function of ``seed`` and its
    number alone, so a fit that is resumed, or goes on for longer, draws what one without a stop would.

    Args:
        layers: What is drawn from: names, lists of names that are one layer, or the name of one module, whose
            :func:`layers_of` are drawn from.
        always: What trains all the time: everything that no layer names if not given, as in LISA the embedding and the
            head; with names, or ``()`` for none, what is neither named here never trains.
        total_steps: Optimizer steps of the whole fit, where the Trainer cannot tell: without limit, or by time.
        count: How many layers train at a time.
        every_n_steps: Optimizer steps between two draws.
        seed: Of the draws: the same seed makes the same schedule.
        order: ``"random"``, or ``"ascending"`` from the first layer on and around, or ``"descending"``.
        weights: For each layer how likely it is drawn, in relation to the others; 0 for never.

    Returns:
        One phase a draw; the last one has no end.

    Raises:
        ValueError: If there is no name, or a number is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> phases = layerwise_sampling(["l0", "l1", "l2"], ["head"], total_steps=60, count=1, order="descending")
        >>> [phase.train for phase in phases], phases[0].steps, phases[-1].steps
        ([['head', 'l2'], ['head', 'l1'], ['head', 'l0']], 20, None)
    """
    where = "layerwise_sampling"
    stay = None if always is None else [always] if isinstance(always, str) else list(always)
    total_steps = None if total_steps is None else whole_number(where, "total_steps", total_steps)
    every_n_steps = whole_number(where, "every_n_steps", every_n_steps)
    draws = Draws(whole_number(where, "count", count), seed, one_of(where, "order", order, get_args(Order)), weights)
    if not isinstance(layers, str):
        draws.check(len(as_layers("layers", layers)))
    build = partial(_sampled, always=stay, total=total_steps, every=every_n_steps, draws=draws)
    rest = "they train all the time" if always is None else "what `always` does not name either never trains"
    return preset(build, where, layers, rest=rest, beside=rest, is_known=total_steps is not None)


@dataclass(frozen=True)
class Draws:
    """Which layers train in each phase of :func:`layerwise_sampling`, with its arguments."""

    count: int
    seed: int
    order: Order
    weights: Sequence[float] | None

    def check(self, layers: int) -> None:
        """Raise a ValueError if so many layers cannot be drawn from."""
        weights = self.weights
        if weights is not None and (len(weights) != layers or not all(w >= 0 and math.isfinite(w) for w in weights)):
            raise ValueError(
                f"layerwise_sampling(weights={weights!r}): give each of the {layers} layers a finite weight, 0 or more."
            )
        if weights is not None and self.order != "random":
            raise ValueError(f"layerwise_sampling(weights=…, order={self.order!r}): weights are for order='random'.")
        able = layers if weights is None else sum(weight > 0 for weight in weights)
        if self.count > able:
            raise ValueError(
                f"layerwise_sampling(count={self.count}): between 1 and {able}, the number of layers to draw from."
            )

    def layers(self, number: int, layers: int) -> list[int]:
        """Return the indices of what is drawn the ``number``-th time, from 0, of so many layers."""
        if self.order == "random":
            generator = random.Random(f"{self.seed} {number}")
            weights = [1.0] * layers if self.weights is None else self.weights
            # The first of several exponential clocks to ring is each with a probability that is its rate.
            clocks = [generator.expovariate(weight) if weight else math.inf for weight in weights]
            return sorted(sorted(range(layers), key=clocks.__getitem__)[: self.count])
        places = [(number * self.count + place) % layers for place in range(self.count)]
        return sorted(places if self.order == "ascending" else [layers - 1 - place for place in places])


def _sampled(
    parts: Parts, steps: float | None, *, always: list[str] | None, total: int | None, every: int, draws: Draws
) -> list[Phase]:
    draws.check(len(parts.layers))
    stay = [*parts.before, *parts.rest, *parts.after] if always is None else always
    steps = steps if total is None else total
    if steps is None:  # what they will train in all, so that the optimizer can be asked to take it
        return [Phase([*stay, *(name for layer in parts.layers for name in layer)], name="draws")]
    if not math.isfinite(steps):
        raise ValueError(
            "layerwise_sampling() cannot know how many optimizer steps there are to draw for: limit the fit by "
            "max_epochs or max_steps, give preview() and plot() steps_per_epoch, or say total_steps=…."
        )
    last = max(1, math.ceil(steps / every))
    return [
        Phase(
            [*stay, *(name for place in draws.layers(number, len(parts.layers)) for name in parts.layers[place])],
            name=f"draw {number + 1}",
            steps=every if number + 1 < last else None,
        )
        for number in range(last)
    ]
