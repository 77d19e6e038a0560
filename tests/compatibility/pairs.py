"""Covering arrays: few rows in which every two values of different factors come together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def all_pairs(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows, each with a value for every factor; every pair of values is in one of them.

    The two longest factors set the number of rows: each of their pairs needs one of its own.
    """
    longest = sorted(factors, key=lambda name: -len(factors[name]))
    generator = random.Random(seed)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(longest, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    rows = []
    while missing:
        # A pair that is missing, and then, factor by factor, the value that brings the most of what is missing.
        row = dict(min(missing, key=repr))
        for name in longest:
            if name not in row:
                values = generator.sample(list(factors[name]), len(factors[name]))
                row[name] = max(values, key=lambda value: sum(p in missing for p in pairs({**row, name: value}, name)))
        row = {name: row[name] for name in longest}
        missing -= set(itertools.combinations(row.items(), 2))
        rows.append(row)
    return rows


def pairs(row: dict[str, Any], name: str) -> Iterator[Pair]:
    for other in row:
        if other != name:
            yield (other, row[other]), (name, row[name])
            yield (name, row[name]), (other, row[other])
