"""Phases and plateaus, as users write them: plain data."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

from lightning_freeze.selectors import Selector, as_patterns, selector_text
from lightning_freeze.words import one_of, suggestion, whole_number

Mode = Literal["min", "max"]
T = TypeVar("T")


def _with_plain_errors(cls: type[T]) -> type[T]:
    """Have the constructor of a dataclass say what would be right, where Python's own error does not."""
    make = cls.__init__
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names, unnamed = [field.name for field in fields], [field.name for field in fields if not field.kw_only]

    @functools.wraps(make)
    def checked(self: T, *args: Any, **options: Any) -> None:
        if len(args) > len(unnamed):
            raise TypeError(
                f"{cls.__name__}({', '.join(map(repr, args))}): only {', '.join(unnamed)} can be positional. Write "
                f"other options by name: {', '.join(names)}."
            )
        if unknown := [key for key in options if key not in names]:
            raise TypeError(_unknown(cls.__name__, unknown[0], names))
        make(self, *args, **options)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls


@_with_plain_errors
@dataclass(frozen=True)
class Plateau:
    """The end of a phase: a metric has stopped getting better.

    A value is taken after each validation run that logs the metric, or after each training epoch if validation does
    not log it. A value that is not finite is no improvement.

    Args:
        monitor: The name of a logged metric, as in ``trainer.callback_metrics``.
        patience: After how many values without improvement the phase ends, at least 1.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        min_delta: By how much a value has to be better, in the metric's own unit, at least 0.

    Raises:
        TypeError: If ``patience`` or ``min_delta`` is no number.
        ValueError: If an argument is out of range.

    Example:
        >>> Plateau("val_loss", patience=2)
        Plateau(monitor='val_loss', patience=2, mode='min', min_delta=0.0)
    """

    monitor: str
    patience: int = 3
    mode: Mode = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ValueError(f"Plateau(monitor={self.monitor!r}): name a logged metric, for example 'val_loss'.")
        object.__setattr__(self, "patience", whole_number("Plateau", "patience", self.patience))
        one_of("Plateau", "mode", self.mode, get_args(Mode))
        shown = f"Plateau(min_delta={self.min_delta!r}): min_delta"
        object.__setattr__(self, "min_delta", _number(shown, self.min_delta))
        if not self.min_delta >= 0:
            raise ValueError(f"{shown} is 0 or more; mode says which direction is better.")

    def better(self, value: float, best: float | None) -> bool:
        """Return whether a value improves on the best one so far.

        Example:
            >>> Plateau("acc", mode="max", min_delta=0.1).better(0.55, 0.5)
            False
        """
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


@_with_plain_errors
@dataclass(frozen=True)
class Phase:
    """A part of a fit in which a set of parameters trains and every other one is frozen.

    It lasts ``epochs`` epochs, ``steps`` optimizer steps, or until a :class:`Plateau`, whichever comes first. An epoch
    in the middle of which the phase begins is its first.

    Args:
        train: What trains, see :func:`select_parameters`; everything else is frozen. ``"*"`` is everything that was
            trainable when the fit began, and what came frozen and a phase of the schedule names.
        name: The name in logs; the selector if not given.
        epochs: How many epochs it lasts, at least 1.
        steps: How many optimizer steps it lasts, at least 1, as ``trainer.global_step`` counts them: with several
            optimizers each one's step counts.
        until: The plateau that ends it.
        lr_scale: A factor on the learning rate that your optimizer and scheduler set, for everything that trains or, as
            ``{selector: factor}``, for a part of it; where selectors overlap, the last one counts. A tuple is a list
            of selectors: ``{("*", "!head"): 0.1}``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range.

    Example:
        >>> Phase("head", epochs=2).label
        'head'
        >>> Phase(["head", "backbone.layer4"], steps=500, lr_scale={"backbone": 0.1}).label
        'head, backbone.layer4'
    """

    train: Selector
    _: dataclasses.KW_ONLY
    name: str | None = None
    epochs: int | None = None
    steps: int | None = None
    until: Plateau | None = None
    # Keys are selectors; a Mapping of them would refuse a variable that is a dict[str, float].
    lr_scale: float | Mapping[Any, float] | None = None

    def __post_init__(self) -> None:
        for end in ("epochs", "steps"):
            if getattr(self, end) is not None:
                object.__setattr__(self, end, whole_number("Phase", end, getattr(self, end)))
        if self.until is not None and not isinstance(self.until, Plateau):
            raise TypeError(f"Phase(until={self.until!r}): until is a Plateau, for example Plateau('val_loss').")
        if not self.train or not (isinstance(self.train, str | Sequence) or callable(self.train)):
            raise ValueError(
                f"Phase(train={self.train!r}): say what trains, for example 'head', ['head', 'neck'] or '*'."
            )
        as_patterns(self.train)
        for select, factor in self.scales.items():
            as_patterns(select)
            shown = f"Phase(lr_scale={self.lr_scale!r}): a factor"
            factor = _number(shown, factor)
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(f"{shown} is above 0 and finite. What shall not train, leave out of `train`.")

    @property
    def scales(self) -> Mapping[Selector, float]:
        """``lr_scale`` as ``{selector: factor}``."""
        if self.lr_scale is None:
            return {}
        return self.lr_scale if isinstance(self.lr_scale, Mapping) else {"*": self.lr_scale}

    @property
    def has_end(self) -> bool:
        """Whether anything ends the phase."""
        return any(end is not None for end in (self.epochs, self.steps, self.until))

    @property
    def label(self) -> str:
        """The name of the phase, or what it trains."""
        return self.name if self.name is not None else selector_text(self.train)

    def is_over(self, begin: tuple[int, int], epoch: int, step: int) -> bool:
        """Return whether its epochs or steps are over, if it began at ``begin = (epoch, optimizer step)``.

        Example:
            >>> Phase("*", epochs=2, steps=100).is_over((0, 0), epoch=1, step=100)
            True
        """
        by_epochs = self.epochs is not None and epoch - begin[0] >= self.epochs
        return by_epochs or (self.steps is not None and step - begin[1] >= self.steps)


def as_phases(phases: Sequence[Phase | Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Return phases from phases, or from dicts of their arguments, as YAML has them.

    Raises:
        TypeError: If an element is neither.
        ValueError: If the schedule is empty, a key is unknown, or a phase before the last has no end.

    Example:
        >>> as_phases([{"train": "head", "epochs": 2}, {"train": "*"}])[0]
        Phase(train='head', name=None, epochs=2, steps=None, until=None, lr_scale=None)
    """
    if isinstance(phases, Phase | Mapping | str) or not isinstance(phases, Sequence):
        raise TypeError(
            f"A schedule is a list of phases, not {phases!r}: FreezeSchedule([Phase('head', epochs=2), …])."
        )
    if not phases:
        raise ValueError("FreezeSchedule([]) has no phases. Give at least one, for example [Phase('head')].")
    built = tuple(_phase(phase, index) for index, phase in enumerate(phases))
    for index, phase in enumerate(built[:-1]):
        if not phase.has_end:
            raise ValueError(
                f"Phase {index + 1} of {len(built)} ({phase.label!r}) has no end, so the next one never begins. "
                "Give it epochs=…, steps=… or until=Plateau(…); only the last phase may be open-ended."
            )
    return built


def describe(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Return a schedule as plain data, by which a checkpoint recognises it."""
    return [
        {
            "train": selector_text(phase.train),
            "name": phase.name,
            "epochs": phase.epochs,
            "steps": phase.steps,
            "until": dataclasses.asdict(phase.until) if phase.until else None,
            "lr_scale": {selector_text(select): float(factor) for select, factor in phase.scales.items()},
        }
        for phase in phases
    ]


def _phase(phase: Phase | Mapping[str, Any], index: int) -> Phase:
    """Return a phase from a phase or a dict of its arguments."""
    if isinstance(phase, Phase):
        return phase
    if not isinstance(phase, Mapping):
        raise TypeError(f"Phase {index + 1} is {phase!r}: a phase is a Phase or a dict of its arguments.")
    options = _known(Phase, dict(phase), f"Phase {index + 1}")
    if "train" not in options:
        raise ValueError(f"Phase {index + 1}, {dict(phase)!r}, does not say what trains: add 'train'.")
    if isinstance(options.get("until"), Mapping):
        until = _known(Plateau, dict(options["until"]), f"Phase {index + 1}: until")
        if "monitor" not in until:
            raise ValueError(f"Phase {index + 1}: until={until!r} does not say which metric: add 'monitor'.")
        options["until"] = Plateau(**until)
    return Phase(**options)


def _known(cls: Callable[..., Any], options: dict[str, Any], where: str) -> dict[str, Any]:
    """Return options unchanged if a dataclass has all of them."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if unknown := [key for key in options if key not in names]:
        raise ValueError(_unknown(where, unknown[0], names))
    return options


def _unknown(where: str, key: str, names: Sequence[str]) -> str:
    """Return what to say of an argument that is not there."""
    return f"{where} has no option {key!r}.{suggestion(key, names)} The options are {', '.join(names)}."


def _number(shown: str, value: object) -> float:
    """Return a number as a float, also if it is NumPy's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):  # YAML 1.1 wants a point in a number
            hint = f" YAML takes {value} for text: write {value.replace('e', '.0e', 1)}."
        raise TypeError(f"{shown} is a number.{hint}")
    return float(value)
