from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze import GradientAudit, NormLogger, Phase, Plateau, TargetNetwork
from lightning_freeze.tables import Table

# Where users give a number of times: the class, the argument, and an object with it.
TAKERS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("Phase", "epochs", lambda n: Phase("*", epochs=n)),
    ("Plateau", "patience", lambda n: Plateau("loss", patience=n)),
    ("NormLogger", "every_n_steps", lambda n: NormLogger(every_n_steps=n)),
    ("TargetNetwork", "every_n_steps", lambda n: TargetNetwork("a", "b", every_n_steps=n)),
    ("GradientAudit", "every_n_epochs", lambda n: GradientAudit(every_n_epochs=n)),
    ("GradientAudit", "first_n_steps", lambda n: GradientAudit(first_n_steps=n)),
]


@pytest.mark.parametrize(("where", "name", "make"), TAKERS, ids=[f"{where}-{name}" for where, name, _ in TAKERS])
def test_counts_accept_numpy_and_refuse_others_in_one_sentence(
    where: str, name: str, make: Callable[[Any], Any]
) -> None:
    taken = getattr(make(np.int64(2)), name)
    assert (type(taken), taken) == (int, 2)
    for wrong in (2.0, True, "2"):
        with pytest.raises(TypeError, match=rf"^{where}\({name}={wrong!r}\): {name} is a whole number\.$"):
            make(wrong)
    with pytest.raises(ValueError, match=rf"^{where}\({name}=0\): {name} is at least 1\.$"):
        make(0)


def test_tau_accepts_a_number_of_numpy() -> None:
    tau = TargetNetwork("a", "b", tau=np.float32(0.5)).tau
    assert (type(tau), tau) == (float, 0.5)


words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.lists(words, min_size=n, max_size=n)))))
def test_table_columns_line_up(shape: tuple[int, list[list[str]]]) -> None:
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


def test_table_aligns_numbers_right() -> None:
    table = Table(("name", "share", "rate"), [("a", "9.0 %", "×0.1"), ("bb", "10.0 %", "1,000")])
    assert str(table).splitlines()[2:] == ["a      9.0 %   ×0.1", "bb    10.0 %  1,000"]


def test_table_without_rows_shows_its_headings() -> None:
    assert str(Table(("a", "b"), [])) == "a  b\n-  -"


def test_a_table_in_a_notebook_shows_cells_in_full_and_no_markup_of_theirs() -> None:
    table = Table(("name", "share"), [("<b>a</b> & $x$" + "b" * 30, "9.0 %")], ("1 < 2",), width=20)
    html = table._repr_html_()
    assert "&lt;b&gt;a&lt;/b&gt; &amp; $x$" + "b" * 30 in html
    assert "<p>1 &lt; 2</p>" in html
    assert 'right">9.0 %<' in html
    assert "tex2jax_ignore" in html  # no formula
    assert max(map(len, str(table).splitlines())) == 20
