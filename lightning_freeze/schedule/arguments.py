"""Arguments that users write into phases: which there are, and what to say of the others."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

from lightning_freeze.words import suggestion, whole_number

T = TypeVar("T")

# What people bring from elsewhere, and what it is here.
_ELSEWHERE = {
    "params": "finetuning-scheduler's 'params' is 'train' here.",
    "max_transition_epoch": "finetuning-scheduler counts epochs of the fit; here 'epochs' are those of the phase.",
    "lr": "The learning rate stays your optimizer's; lr_scale=0.1 multiplies it.",
    "_target_": "Build what Hydra's '_target_' names first, hydra.utils.instantiate(config), or leave the key out.",
}


def plain_options(cls: type[T]) -> type[T]:
    """Have a dataclass of options check its numbers, say what would be right, and show no defaults.

    What is annotated as an ``int`` or a ``float`` becomes one, also if it is NumPy's; an ``int`` is at least 1, or 0 if
    that is the default.
    """
    make = cls.__init__
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unnamed = [field.name for field in fields.values() if not field.kw_only]

    def as_number(name: str, value: Any) -> Any:
        kind, default = str(fields[name].type), fields[name].default
        if kind.removesuffix(" | None") not in ("int", "float") or (value is None and kind.endswith("None")):
            return value
        if value == default == 0:
            return default
        shown = f"{cls.__name__}({name}={value!r}): {name}"
        return number(shown, value) if kind.startswith("float") else whole_number(cls.__name__, name, value)

    @functools.wraps(make)
    def checked(self: T, *args: Any, **options: Any) -> None:
        if len(args) > len(unnamed):
            raise TypeError(
                f"{cls.__name__}({', '.join(map(repr, args))}): only {', '.join(unnamed)} can be positional. Write "
                f"other options by name: {', '.join(fields)}."
            )
        if unknown := [key for key in options if key not in fields]:
            raise TypeError(_unknown(cls.__name__, unknown[0], list(fields)))
        make(self, *map(as_number, unnamed, args), **{name: as_number(name, one) for name, one in options.items()})

    def shown(self: T) -> str:
        return f"{cls.__name__}({', '.join(f'{name}={shown_value(v)}' for name, v in without_defaults(self).items())})"

    cls.__init__ = checked  # type: ignore[assignment]
    cls.__repr__ = shown  # type: ignore[assignment]
    return cls


def built(cls: Callable[..., T], options: Mapping[str, Any], where: str, needs: tuple[str, str]) -> T:
    """Return a dataclass from a mapping of its arguments, as YAML has them.

    ``where`` begins what a ValueError says of an argument that is unknown, or that ``needs`` to be there: its name, and
    what it says.
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


def number(shown: str, value: object, kind: str = "a number") -> float:
    """Return a number as a float, or raise a TypeError: ``shown``, the argument, is ``kind``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):  # YAML 1.1 wants a point in a number
            hint = f" YAML takes {value} for text: write {value.replace('e', '.0e', 1)}."
        raise TypeError(f"{shown} is {kind}.{hint}")
    return float(value)


def as_layers(argument: str, layers: Any) -> list[list[str]]:
    """Return layers, each as its names."""
    example = "for example ['backbone.layer4', 'head']"
    if isinstance(layers, str):
        raise TypeError(f"{argument}={layers!r}: give names, {example}, or layers_of(model, {layers!r}).")
    if not isinstance(layers, Iterable) or isinstance(layers, nn.Module):
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
