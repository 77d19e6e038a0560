"""Patterns over dotted names, and what one that matches nothing may have been meant to be."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from lightning_freeze.words import closest

_SPECIAL = re.compile(r"[\\()|^$+]")  # what a glob has no use for
_SLICE = re.compile(r"\[(-?\d+|-?\d*:-?\d*(?::-?[1-9]\d*)?)\]")


def expressions(pattern: str, shown: str) -> list[re.Pattern[str]]:
    r"""Return what names have to match in full; a later expression counts where no name matches an earlier one.

    A name stands for what is below it too. A ``"re:…"`` that is no regular expression is an error, which shows it as
    ``shown``.

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


def sliced(pattern: str, lists: Mapping[str, Sequence[str]], shown: str) -> list[str]:
    """Return what a pattern with indices or slices of lists stands for; nothing if it has none.

    Brackets behind what is no list are a glob's: without a list ``layer``, ``layer[12]`` is ``layer1`` and ``layer2``.
    ``lists`` has the names of lists of modules, each with those of its members. What a list has not is an error, which
    shows the pattern as ``shown``.

    Example:
        >>> sliced("net.blocks[::-1].*.bias", {"net.blocks": ["net.blocks.0", "net.blocks.1"]}, "")
        ['net.blocks.1.*.bias', 'net.blocks.0.*.bias']
    """
    for match in _SLICE.finditer(pattern):
        before, after = pattern[: match.start()], pattern[match.end() :]
        globs = re.compile("|".join(map(fnmatch.translate, (before, before.removeprefix("*.")))))
        if names := [name for name in lists if globs.fullmatch(name)]:
            picked = [f"{one}{after}" for name in names for one in _members(name, lists[name], match[1], shown)]
            return [one for name in picked for one in sliced(name, lists, shown) or [name]]
    return []


def split_slice(pattern: str) -> tuple[str, str]:
    """Return what is before the first index or slice of a pattern, and the rest, empty if there is none."""
    match = _SLICE.search(pattern)
    return (pattern[: match.start()], pattern[match.start() :]) if match else (pattern, "")


def _members(name: str, members: Sequence[str], picked: str, shown: str) -> Sequence[str]:
    """Return the members of a list that an index or a slice picks."""
    count, bounds = len(members), [int(bound) if bound else None for bound in picked.split(":")]
    last = count if len(bounds) > 1 else count - 1
    found: Sequence[str] = []
    if all(bound is None or -count <= bound <= last for bound in bounds):
        found = members[slice(*bounds)] if len(bounds) > 1 else [members[int(picked)]]
    if not found:
        raise ValueError(
            f'{shown}: [{picked}] picks nothing or is out of range. "{name}" has {count} modules: '
            f"[0] to [{count - 1}], from the end [-1] to [-{count}]."
        )
    return found


def nearest(pattern: str, known: Collection[str]) -> list[str]:
    """Return what a pattern that matches no known name may have been meant to be, at most two."""
    if pattern.startswith("re:"):
        # Without everything that stands for something else.
        text = re.sub(r"(?<!\\)\.[*+?]?|\\\w|[][(){}^$|?*+]", "", pattern.removeprefix("re:"))
        return closest(text.replace("\\", "").strip("."), known, most=2)
    before, after = split_slice(pattern)
    if after:
        return [] if before in known else [name + after for name in nearest(before, known)]
    wrapped = re.compile(rf"(.+?)\.(?:{fnmatch.translate(pattern)})")
    if below := dict.fromkeys(f"{match[1]}.{pattern}" for name in known if (match := wrapped.fullmatch(name))):
        return list(below)[:2]
    if (inside := pattern.partition(".")[2]) in known:
        return [inside]
    with suppress(re.error):  # a regular expression, as in the schedules of finetuning-scheduler
        ends = set(known) - {name.rpartition(".")[0] for name in known}
        if _SPECIAL.search(pattern) and any(map(re.compile(pattern).fullmatch, ends)):
            return [f"re:{pattern}"]
    if (fixed := _fixed(pattern, known)) != pattern:
        matches = any(one.fullmatch(name) for one in expressions(fixed, fixed) for name in known)
        return [fixed] if matches else nearest(fixed, known)
    return [] if _is_glob(pattern) else closest(pattern, known, most=2)


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


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
