from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze._tables import Table

words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.lists(words, min_size=n, max_size=n)))))
def test_columns_line_up(shape: tuple[int, list[list[str]]]) -> None:
    count, rows = shape
    text = str(Table(tuple(f"column{index}" for index in range(count)), [tuple(row) for row in rows]))
    heading, rule, *lines = text.splitlines()
    assert len(lines) == len(rows)
    edges = [0]
    for dashes in rule.split("  "):
        edges.append(edges[-1] + len(dashes) + 2)
    for line, row in zip(lines, rows, strict=True):
        cells = [line[begin : end - 2].strip() for begin, end in pairwise(edges)]
        assert cells == row
    assert heading.split() == [f"column{index}" for index in range(count)]


def test_numbers_are_on_the_right() -> None:
    table = Table(("name", "share", "rate"), [("a", "9.0 %", "×0.1"), ("bb", "10.0 %", "1,000")])
    assert str(table).splitlines()[2:] == ["a      9.0 %   ×0.1", "bb    10.0 %  1,000"]


def test_no_rows() -> None:
    assert str(Table(("a", "b"), [])) == "a  b\n-  -"
