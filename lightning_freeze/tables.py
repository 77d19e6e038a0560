"""Tables: text in which columns line up, and HTML for notebooks."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_NUMBER = re.compile(r"[-+×]?\d[\d,.]*( ?(%|[kMGT]?B))?")


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; print it for plain text in which they line up.

    Args:
        columns: The column headings.
        rows: One sequence of cells a row, as many as there are columns.
        notes: Sentences below the rows.
        width: How many characters a line may have: the widest columns of text are cut; without it none is cut.

    Example:
        >>> print(Table(("phase", "epochs"), [("head", 2), ("everything", 10)], width=15))
        phase    epochs
        -------  ------
        head          2
        eve…ing      10
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]
    notes: Sequence[str] = ()
    width: int | None = None

    def __str__(self) -> str:
        (lines, numeric), most = self._cells(), self.width or sys.maxsize
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [index for index, right in enumerate(numeric) if not right]
        too_long = sum(widths) + 2 * len(widths) - 2 - most
        for _ in range(too_long if texts else 0):
            widest = max(texts, key=widths.__getitem__)
            widths[widest] = max(1, widths[widest] - 1)
        rows = [[shortened(cell, width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        rows.insert(1, ["-" * width for width in widths])
        pads = [str.rjust if right else str.ljust for right in numeric]
        text = "\n".join(
            "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)).rstrip()
            for row in rows
        )
        notes = [textwrap.fill(note, most, break_long_words=False, break_on_hyphens=False) for note in self.notes]
        return "\n".join([text, *([""] if notes else []), *notes])

    def _repr_html_(self) -> str:
        """Return what notebooks show: the cells in full."""
        (heading, *rows), numeric = self._cells()
        sides = ["right" if right else "left" for right in numeric]

        def line(tag: str, cells: Sequence[str]) -> str:
            shown = (
                f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{''.join(shown)}</tr>"

        body = "\n".join(line("td", row) for row in rows)
        notes = "".join(f"\n<p>{escape(note)}</p>" for note in self.notes)
        # A name with a dollar sign in it is no formula.
        return (
            f'<div class="tex2jax_ignore mathjax_ignore">\n<table>\n<thead>{line("th", heading)}</thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table>{notes}\n</div>"
        )

    def _cells(self) -> tuple[list[list[str]], list[bool]]:
        """Return the headings and all rows as text, and which columns are of numbers."""
        rows = [[str(cell) for cell in row] for row in self.rows]
        numeric = [all(_NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(self.columns))]
        return [list(self.columns), *rows], numeric


def shortened(text: str, most: int) -> str:
    """Return a text cut to a number of characters, with an ellipsis for its middle.

    Example:
        >>> shortened("backbone.layer4", 10)
        'backb…yer4'
    """
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def in_bytes(count: int) -> str:
    """Return a number of bytes as text.

    Example:
        >>> in_bytes(1_234), in_bytes(102_228_128)
        ('1,234 B', '102 MB')
    """
    if count < 10_000:
        return f"{count:,} B"
    power = min(4, (len(str(count)) - 1) // 3)
    size = count / 1000**power
    return f"{size:.{max(0, 3 - len(str(int(size))))}f} {' kMGT'[power]}B"
