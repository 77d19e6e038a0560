"""Arguments that several classes and functions take, and what is wrong with one that does not fit."""

from __future__ import annotations

from numbers import Integral


def whole_number(where: str, name: str, value: object) -> int:
    """Give a number of times as an int, also one of NumPy's, which a checkpoint could not hold.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is below 1.

    Example:
        >>> whole_number("Phase", "epochs", 0)
        Traceback (most recent call last):
        ValueError: Phase(epochs=0): epochs is at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{where}({name}={value!r}): {name} is a whole number.")
    if value < 1:
        raise ValueError(f"{where}({name}={value}): {name} is at least 1.")
    return int(value)
