"""A small table of text: what `trainable_summary` and `FreezeSchedule.preview` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; ``str`` lays them out in plain text.

    Args:
        columns: The column headings.
        rows: One sequence of cells a row, as many as there are columns.

    Example:
        >>> print(Table(("phase", "epochs"), [("head", 2), ("everything", 10)]))
        phase       epochs
        ----------  ------
        head             2
        everything      10
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]

    def __str__(self) -> str:
        cells = [[str(cell) for cell in row] for row in self.rows]
        widths = [max(len(line[i]) for line in [list(self.columns), *cells]) for i in range(len(self.columns))]
        numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [list(self.columns), ["-" * width for width in widths], *cells]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in lines
        )


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("%", "").strip().lstrip("-+×").isdigit()
