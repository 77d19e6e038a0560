"""Well-known schedules as lists of phases."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from lightning_freeze.schedule.phases import Phase
from lightning_freeze.selectors import Selector
from lightning_freeze.words import whole_number


def linear_probe_then_finetune(
    head: str | Sequence[str] = "head", *, probe_epochs: int = 1, backbone_scale: float = 1.0
) -> list[Phase]:
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
    heads = _names("head", head)
    one = heads[0] if len(heads) == 1 else tuple(heads)
    scales: dict[Selector, float] = {} if backbone_scale == 1.0 else {"*": backbone_scale, one: 1.0}
    return [
        Phase(heads, name="linear probe", epochs=probe_epochs),
        Phase("*", name="finetune", lr_scale=scales or None),
    ]


def gradual_unfreezing(layers: Sequence[str], *, epochs_per_phase: int = 1, lr_decay: float = 1.0) -> list[Phase]:
    """Train the last layer first and unfreeze one more, from the last to the first, after each phase.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT), ACL 2018.

    Args:
        layers: The layers from the first, next to the input, to the last.
        epochs_per_phase: Epochs before the next layer joins.
        lr_decay: Each layer's learning rate is its successor's divided by this; ULMFiT takes 2.6.

    Returns:
        One phase a layer; the last one has no end.

    Raises:
        ValueError: If there is no name, or a number is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> for phase in gradual_unfreezing(["embed", "body", "head"], lr_decay=2.0):
        ...     print(phase.train, phase.epochs, dict(phase.scales))
        ['head'] 1 {}
        ['body', 'head'] 1 {'body': 0.5}
        ['embed', 'body', 'head'] None {'embed': 0.25, 'body': 0.5}
    """
    names = _names("layers", layers)
    if not lr_decay > 0:
        raise ValueError(f"gradual_unfreezing(lr_decay={lr_decay!r}): a learning rate is divided by it: above 0.")
    phases = []
    for first in reversed(range(len(names))):
        trains = names[first:]
        scales = {name: lr_decay ** -(len(names) - 1 - names.index(name)) for name in trains[:-1]}
        phases.append(
            Phase(
                trains,
                name=f"from {names[first]}",
                epochs=epochs_per_phase if first else None,
                lr_scale=scales if scales and lr_decay != 1.0 else None,
            )
        )
    return phases


def chain_thaw(layers: Sequence[str], *, epochs_per_phase: int = 1) -> list[Phase]:
    """Train the last layer alone, then each other one alone from the first on, then everything.

    Felbo et al., "Using millions of emoji occurrences to learn any-domain representations for detecting sentiment,
    emotion and sarcasm" (DeepMoji), EMNLP 2017.

    Args:
        layers: The layers from the first, next to the input, to the last, the new one.
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
    *others, last = _names("layers", layers)
    alone = [Phase(name, epochs=epochs_per_phase) for name in [last, *others]]
    return [*alone, Phase("*", name="everything")]


def layerwise_sampling(
    layers: Sequence[str],
    always: str | Sequence[str] = (),
    *,
    total_steps: int,
    count: int = 2,
    every_n_steps: int = 20,
    seed: int = 0,
) -> list[Phase]:
    """Train a few layers at a time, drawn anew every so many optimizer steps.

    It takes the memory of these few layers, if optimizer state is dropped or offloaded when they freeze: Pan et al.,
    "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024.

    Args:
        layers: What is drawn from.
        always: What trains all the time; LISA takes the embedding and the head.
        total_steps: Optimizer steps of the whole fit.
        count: How many layers train at a time.
        every_n_steps: Optimizer steps between two draws.
        seed: Of the draws: the same seed makes the same schedule.

    Returns:
        One phase a draw; the last one has no end.

    Raises:
        ValueError: If there is no name, or a number is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> phases = layerwise_sampling(["l0", "l1", "l2"], ["head"], total_steps=60, count=1)
        >>> len(phases), phases[0].steps, phases[-1].steps
        (3, 20, None)
    """
    names = _names("layers", layers)
    stay = [always] if isinstance(always, str) else list(always)
    total_steps = whole_number("layerwise_sampling", "total_steps", total_steps)
    every_n_steps = whole_number("layerwise_sampling", "every_n_steps", every_n_steps)
    count = whole_number("layerwise_sampling", "count", count)
    if count > len(names):
        raise ValueError(f"layerwise_sampling(count={count}): between 1 and {len(names)}, the number of layers.")
    draw = random.Random(seed)
    draws = [sorted(draw.sample(range(len(names)), count)) for _ in range(-(-total_steps // every_n_steps))]
    return [
        Phase(
            [*stay, *(names[index] for index in chosen)],
            name=f"draw {number}",
            steps=every_n_steps if number < len(draws) else None,
        )
        for number, chosen in enumerate(draws, 1)
    ]


def _names(argument: str, names: str | Sequence[str]) -> list[str]:
    """Return one or more names as a list."""
    example = "for example ['backbone.layer4', 'head']"
    if not isinstance(names, Iterable):
        raise TypeError(f"{argument}={names!r}: give names, {example}.")
    found = [names] if isinstance(names, str) else list(names)
    if not found or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{argument}={names!r}: give at least one name, {example}.")
    return found
