"""Arguments that users write into phases: which there are, and what to say of the others."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from types import FunctionType
from typing import Any, TypeVar

from lightning_freeze.words import suggestion

T = TypeVar("T")

# What people bring from elsewhere, and what it is here.
_ELSEWHERE = {
    "params": "finetuning-scheduler's 'params' is 'train' here.",
    "max_transition_epoch": "finetuning-scheduler counts epochs of the fit; here 'epochs' are those of the phase.",
    "lr": "The learning rate stays your optimizer's; lr_scale=0.1 multiplies it.",
    "_target_": "Build what Hydra's '_target_' names first, hydra.utils.instantiate(config), or leave the key out.",
}


def plain_options(cls: type[T]) -> type[T]:
    """Have a dataclass of options say what would be right where Python's error does not, and show no defaults."""
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

    def shown(self: T) -> str:
        return f"{cls.__name__}({', '.join(f'{name}={shown_value(v)}' for name, v in without_defaults(self).items())})"

    cls.__init__ = checked  # type: ignore[assignment]
    cls.__repr__ = shown  # type: ignore[assignment]
    return cls


def built(cls: Callable[..., T], options: Mapping[str, Any], where: str, needs: tuple[str, str]) -> T:
    """Return a dataclass from a mapping of its arguments, as YAML has them.

    Args:
        cls: The dataclass.
        options: Its arguments.
        where: What the mapping is, for errors.
        needs: An argument that has to be there, and what it says.

    Raises:
        ValueError: If an argument is unknown or the needed one is not there.
    """
    names, options = [field.name for field in dataclasses.fields(cls)], unpacked(options)  # type: ignore[arg-type]
    if unknown := [key for key in options if key not in names]:
        raise ValueError(_unknown(where, unknown[0], names))
    name, says = needs
    if name not in options:
        raise ValueError(f"{where}={dict(options)!r} does not say {says}: add {name!r}.")
    return cls(**options)


def unpacked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments in a mapping, also if they stand under ``init_args``, beside a ``class_path``."""
    return options.get("init_args") or {} if "class_path" in options else options


def shown_value(value: object) -> str:
    """Return a value as code: a function by its name."""
    return value.__qualname__ if isinstance(value, FunctionType) else repr(value)


def number(shown: str, value: object) -> float:
    """Return a number as a float, also if it is NumPy's.

    Raises:
        TypeError: If it is none; ``shown`` begins the sentence.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):  # YAML 1.1 wants a point in a number
            hint = f" YAML takes {value} for text: write {value.replace('e', '.0e', 1)}."
        raise TypeError(f"{shown} is a number.{hint}")
    return float(value)


def as_layers(argument: str, layers: Any) -> list[list[str]]:
    """Return layers, each as its names."""
    example = "for example ['backbone.layer4', 'head']"
    if isinstance(layers, str):
        raise TypeError(f"{argument}={layers!r}: give names, {example}, or layers_of(model, {layers!r}).")
    if not isinstance(layers, Iterable):
        raise TypeError(f"{argument}={layers!r}: give names, {example}.")
    found = [list(layer) if isinstance(layer, list | tuple) else [layer] for layer in layers]
    if not found or not all(layer and all(isinstance(name, str) and name for name in layer) for layer in found):
        raise ValueError(f"{argument}={layers!r}: give at least one name, {example}.")
    return found


def without_defaults(instance: Any, *always: str) -> dict[str, Any]:
    """Return the fields of a dataclass as a dict: those named, and of the others what is not the default.

    So what a checkpoint describes stays the same when an option is added.
    """
    return {
        field.name: getattr(instance, field.name)
        for field in dataclasses.fields(instance)
        if field.name in always or getattr(instance, field.name) != field.default
    }


def _unknown(where: str, key: str, names: Sequence[str]) -> str:
    """Return what to say of an argument that is not there."""
    hint = f" {_ELSEWHERE[key]}" if key in _ELSEWHERE else suggestion(key, names)
    return f"{where} has no option {key!r}.{hint} The options are {', '.join(names)}."
