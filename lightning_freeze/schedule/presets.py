"""Well-known schedules as lists of phases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lightning_freeze.schedule.arguments import as_layers, number
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.preset import Layers, Parts, Preset, as_selector, preset
from lightning_freeze.selectors import Selector
from lightning_freeze.words import listed, whole_number


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
    return Preset(None, [heads], "linear_probe_then_finetune", (), [probe, finetune])


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
    return preset(build, "gradual_unfreezing", layers, rest="they join in the last phase")


def _gradual(parts: Parts, steps: float | None, *, epochs: int, decay: float) -> list[Phase]:
    layers = [layer for layer in [parts.rest + parts.before, *parts.layers, parts.after] if layer]
    phases = []
    for first in reversed(range(len(layers))):
        distance = {as_selector(layer): len(layers) - 1 - place for place, layer in enumerate(layers) if place >= first}
        scales = {layer: decay**-far for layer, far in distance.items() if far}
        trains = "*" if not first and layers != parts.layers else [name for layer in layers[first:] for name in layer]
        phases.append(
            Phase(
                trains,
                name=f"from {listed(layers[first], most=3)}",
                epochs=epochs if first else None,
                lr_scale=scales if scales and decay != 1.0 else None,
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
    build = partial(_chain, epochs=epochs_per_phase)
    return preset(build, "chain_thaw", layers, rest="they train in the last phase")


def _chain(parts: Parts, steps: float | None, *, epochs: int) -> list[Phase]:
    *others, last = [layer for layer in [parts.before, *parts.layers, parts.after] if layer]
    return [*(Phase(as_selector(layer), epochs=epochs) for layer in [last, *others]), Phase("*", name="everything")]
