"""Words for errors and logs: suggestions, short lists of names, shares, checks of arguments."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any


def closest(word: object, known: Iterable[str], *, most: int = 1) -> list[str]:
    """Return the known words that are most like a word, whatever their case."""
    folded = {name.casefold(): name for name in known}
    return [folded[name] for name in difflib.get_close_matches(str(word).casefold(), folded, n=most)]


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return a sentence with the known word that is most like a word; an empty text if none is."""
    return "".join(f" Did you mean {name!r}?" for name in closest(word, known))


def listed(names: Iterable[str], separator: str = ", ", *, most: int = 5) -> str:
    """Return names as text, of many the first few.

    Example:
        >>> listed(["a", "b", "c", "d", "e", "f", "g"])
        'a, b, c, d, e and 2 more'
    """
    names = list(names)
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quoted(names: Sequence[str]) -> str:
    """Return names as they stand in a list of selectors, at most three of them."""
    return ", ".join(f'"{name}"' for name in names[:3]) + (", …" if len(names) > 3 else "")


def counted(number: int, unit: str) -> str:
    """Return a number of units as text: ``1 epoch``, ``3 steps``."""
    return f"{number:,} {unit}{'s' * (number != 1)}"


def percent(part: int, whole: int) -> str:
    """Return a share as text, such as ``75.0 %``."""
    return f"{100 * part / whole if whole else 0.0:.1f} %"


def whole_number(where: str, name: str, value: object) -> int:
    """Return a count as an int, also if it is NumPy's, which a checkpoint could not hold; raise if it is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{where}({name}={value!r}): {name} is a whole number.")
    if value < 1:
        raise ValueError(f"{where}({name}={value}): {name} is at least 1.")
    return int(value)


def one_of(where: str, name: str, value: object, allowed: Sequence[str]) -> Any:
    """Return a value unchanged if it is allowed; raise if it is not.

    Example:
        >>> one_of("Plateau", "mode", "mim", ["min", "max"])
        Traceback (most recent call last):
        ValueError: Plateau(mode='mim'): mode is 'min' or 'max'. Did you mean 'min'?
    """
    if value not in allowed:
        choices = list(map(repr, allowed))
        shown = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        meant = next((one for one in allowed if str(value).startswith(one)), value)  # "validation" for "val"
        raise ValueError(f"{where}({name}={value!r}): {name} is {shown}.{suggestion(meant, allowed)}")
    return value


def some_of(where: str, name: str, values: Iterable[object], allowed: Sequence[str]) -> tuple[Any, ...]:
    """Return values as a tuple, each once; raise if one is not allowed, there is none, or a string was given."""
    if isinstance(values, str):
        raise TypeError(f"{where}({name}={values!r}): it is a tuple. Write {name}=({values!r},).")
    chosen = tuple(dict.fromkeys(one_of(where, name, value, allowed) for value in values))
    if not chosen:
        raise ValueError(f"{where}({name}=()) logs nothing: give one of {', '.join(map(repr, allowed))}.")
    return chosen


def check_takes(shown: str, function: Callable[..., object], *arguments: str) -> None:
    """Raise a TypeError for a function that does not take as many arguments as it will be called with."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise TypeError(f"{shown} is called with ({given}), which it does not take: {error}.") from None
    except ValueError:  # some C code does not tell
        pass
