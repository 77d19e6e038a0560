"""Well-known schedules as lists of phases."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from lightning_freeze.schedule.arguments import as_layers, number
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.preset import Layers, Parts, Preset, as_selector
from lightning_freeze.selectors import Selector
from lightning_freeze.words import listed, one_of, whole_number

Order = Literal["random", "ascending", "descending"]


def linear_probe_then_finetune(
    head: str | Sequence[str] = "head", *, probe_epochs: int = 1, backbone_scale: float = 1.0
) -> Preset:
    """Train the head alone, then everything.

    With a head that already fits, the first gradients are small and distort the pretrained features less: Kumar et al.,
    "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022.

    Args:
        head: What the linear probe trains.
        probe_epochs: Epochs of the probe.
        backbone_scale: Factor on the learning rate of all but the head afterwards.

    Returns:
        Two phases, ``"linear probe"`` and ``"finetune"``.

    Raises:
        ValueError: If there is no name, or a number is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> [phase.label for phase in linear_probe_then_finetune("fc", probe_epochs=3)]
        ['linear probe', 'finetune']
    """
    heads = [name for layer in as_layers("head", [head] if isinstance(head, str) else head) for name in layer]
    scales: dict[Selector, float] = {} if backbone_scale == 1.0 else {"*": backbone_scale, as_selector(heads): 1.0}
    probe = Phase(heads, name="linear probe", epochs=probe_epochs)
    finetune = Phase("*", name="finetune", lr_scale=scales or None)
    return Preset("linear_probe_then_finetune", [heads], None, phases=[probe, finetune])


def gradual_unfreezing(layers: Layers, *, epochs_per_phase: int = 1, lr_decay: float = 1.0) -> Preset:
    """Train the last layer first and unfreeze one more, from the last to the first, after each phase.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT), ACL 2018.

    Args:
        layers: The layers from the first, next to the input, to the last: names, and lists of names that are one layer.
            What none of them names joins in a last phase, as the layer before the first. Or the name of one module:
            then its :func:`layers_of` are layers, what the model has after them (its head) is the last, and what it
            has before them (embeddings, a stem) the first.
        epochs_per_phase: Epochs before the next layer joins.
        lr_decay: Each layer's learning rate is its successor's divided by this; ULMFiT takes 2.6.

    Returns:
        One phase a layer; the last one has no end.

    Raises:
        ValueError: If there is no name, or a number is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> for phase in gradual_unfreezing(["embed", "body", ["norm", "head"]], lr_decay=2.0):
        ...     print(phase.train, phase.epochs, dict(phase.scales))
        ['norm', 'head'] 1 {}
        ['body', 'norm', 'head'] 1 {'body': 0.5}
        ['embed', 'body', 'norm', 'head'] None {'embed': 0.25, 'body': 0.5}
    """
    whole_number("gradual_unfreezing", "epochs_per_phase", epochs_per_phase)
    shown = f"gradual_unfreezing(lr_decay={lr_decay!r}): lr_decay"
    if not number(shown, lr_decay) > 0:
        raise ValueError(f"{shown} is above 0: a learning rate is divided by it.")
    build = partial(_gradual, epochs=epochs_per_phase, decay=lr_decay)
    others = "" if isinstance(layers, str) else "they join in the last phase"
    return Preset("gradual_unfreezing", layers, build, others)


def _gradual(parts: Parts, steps: float | None, *, epochs: int, decay: float) -> list[Phase]:
    layers = [layer for layer in [parts.rest + parts.before, *parts.layers, parts.after] if layer]
    phases, last = [], len(layers) - 1
    for first in reversed(range(len(layers))):
        scales = {as_selector(layers[place]): decay ** (place - last) for place in range(first, last) if decay != 1.0}
        trains = "*" if not first and layers != parts.layers else [name for layer in layers[first:] for name in layer]
        phases.append(
            Phase(
                trains,
                name=f"from {listed(layers[first], most=3)}",
                epochs=epochs if first else None,
                lr_scale=scales or None,
            )
        )
    return phases


def chain_thaw(layers: Layers, *, epochs_per_phase: int = 1) -> Preset:
    """Train the last layer alone, then each other one alone from the first on, then everything.

    Felbo et al., "Using millions of emoji occurrences to learn any-domain representations for detecting sentiment,
    emotion and sarcasm" (DeepMoji), EMNLP 2017.

    Args:
        layers: The layers from the first, next to the input, to the last, the new one, as of
            :func:`gradual_unfreezing`. What no name names trains in the last phase only.
        epochs_per_phase: Epochs of each phase but the last.

    Returns:
        One phase a layer and one for everything, which has no end.

    Raises:
        ValueError: If there is no name, or a number is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> [phase.label for phase in chain_thaw(["embed", "body", "head"])]
        ['head', 'embed', 'body', 'everything']
    """
    whole_number("chain_thaw", "epochs_per_phase", epochs_per_phase)
    others = "" if isinstance(layers, str) else "they train in the last phase"
    return Preset("chain_thaw", layers, partial(_chain, epochs=epochs_per_phase), others)


def _chain(parts: Parts, steps: float | None, *, epochs: int) -> list[Phase]:
    *others, last = [layer for layer in [parts.before, *parts.layers, parts.after] if layer]
    return [*(Phase(as_selector(layer), epochs=epochs) for layer in [last, *others]), Phase("*", name="everything")]


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
    others = "they train all the time" if always is None else "what `always` does not name either never trains"
    return Preset(where, layers, build, others, () if total_steps is None else None)


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

    def drawn(self, number: int, layers: Sequence[Sequence[str]]) -> list[str]:
        """Return the names of what is drawn of the layers the ``number``-th time, from 0."""
        if self.order == "random":
            generator = random.Random(f"{self.seed} {number}")
            weights = [1.0] * len(layers) if self.weights is None else self.weights
            # The first of several exponential clocks to ring is each with a probability that is its rate.
            clocks = [generator.expovariate(weight) if weight else math.inf for weight in weights]
            places = sorted(range(len(layers)), key=clocks.__getitem__)[: self.count]
        else:
            first = number * self.count if self.order == "ascending" else -(number + 1) * self.count
            places = [(first + place) % len(layers) for place in range(self.count)]
        return [name for place in sorted(places) for name in layers[place]]


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
            [*stay, *draws.drawn(number, parts.layers)],
            name=f"draw {number + 1}",
            steps=every if number + 1 < last else None,
        )
        for number in range(last)
    ]
