"""Patterns over dotted names, and what one that matches nothing may have been meant to be."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

from lightning_freeze.words import closest


def expressions(pattern: str, shown: str) -> list[re.Pattern[str]]:
    r"""Return what names have to match in full; a later expression counts where no name matches an earlier one.

    Args:
        pattern: A name, which stands for what is below it too, a glob, or ``"re:…"``.
        shown: How an error shows the pattern.

    Raises:
        ValueError: If it is no regular expression.

    Example:
        >>> exact, glob = expressions("head.*", "")
        >>> exact.fullmatch("head.bias") is None, glob.fullmatch("head.bias") is None
        (True, False)
    """
    if pattern.startswith("re:"):
        try:
            return [re.compile(pattern.removeprefix("re:"))]
        except re.error as error:
            raise ValueError(f"{shown} is no regular expression: {error}.") from error
    # A leading "*." also stands for no module at all, so that "*.bias" finds the bias of a bare layer.
    globs = [f"{glob}{below}" for glob in (pattern, pattern.removeprefix("*.")) for below in ("", ".*")]
    # First without wildcards: a key of a ParameterDict can have brackets in it.
    return [re.compile(rf"{re.escape(pattern)}(\..*)?"), re.compile("|".join(map(fnmatch.translate, globs)))]


def nearest(pattern: str, known: Collection[str]) -> list[str]:
    """Return what a pattern that matches no known name may have been meant to be, at most two.

    Example:
        >>> nearest("hed.*", ["head.weight", "neck.weight"]), nearest("fc", ["model", "model.fc", "model.fc.bias"])
        (['head.*'], ['model.fc'])
    """
    if pattern.startswith("re:"):
        return closest(_literal(pattern.removeprefix("re:")), known, most=2)
    below = [name for name in known if name.endswith(f".{pattern}")]
    if below:
        return below[:2]
    fixed = _fixed(pattern, known)
    if fixed != pattern and any(one.fullmatch(name) for one in expressions(fixed, fixed) for name in known):
        return [fixed]
    return [] if _is_glob(pattern) else closest(pattern, known, most=2)


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _literal(expression: str) -> str:
    """Return a regular expression without everything in it that stands for something else."""
    text = re.sub(r"(?<!\\)\.[*+?]?|\\\w|[][(){}^$|?*+]", "", expression)
    return text.replace("\\", "").strip(".")


def _fixed(pattern: str, known: Collection[str]) -> str:
    """Return a pattern with each literal segment that occurs nowhere replaced by the closest one that does."""
    segments = sorted({segment for name in known for segment in name.split(".")})

    def fixed(text: str) -> str:
        return text if text in segments else next(iter(closest(text, segments)), text)

    def fixed_segment(segment: str) -> str:
        if not _is_glob(segment):
            return fixed(segment)
        if any(fnmatch.fnmatchcase(one, segment) for one in segments):
            return segment
        return re.sub(r"[^*?[\]]+", lambda literal: fixed(literal[0]), segment)

    return ".".join(map(fixed_segment, pattern.split(".")))
