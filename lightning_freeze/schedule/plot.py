"""A schedule as a picture: what trains when, and how fast."""

from __future__ import annotations

import io
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_freeze.functional import scalars
from lightning_freeze.names import branches, runs
from lightning_freeze.schedule.forecast import Forecast, forecast_rates
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.plan import Factor, Plan
from lightning_freeze.schedule.preview import selected_text
from lightning_freeze.schedule.rates import Ramp
from lightning_freeze.tables import shortened

try:
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plot() needs matplotlib: pip install 'lightning-freeze[plot]'.") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

Course = tuple[Factor | None, ...]
Piece = tuple[float, float, tuple[float, float]]

FROZEN = "#e4e4e4"
_ROWS = 32  # more than these are drawn only where layers of the first level differ
_LABEL = 30  # characters
_SLICES = 48  # of a rate that moves


class Picture(Figure):
    """A figure that notebooks show, with pyplot or without it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


@dataclass(frozen=True)
class Row:
    """Layers that do the same throughout a fit, or of which parts do."""

    layers: list[str]  # their names
    courses: Counter[Course]  # what they do, phase by phase, and how many scalars do that

    @property
    def label(self) -> str:
        """The names of the layers, in short."""
        parts = " (in parts)" if len(self.courses) > 1 else ""
        together, *apart = runs(self.layers)
        if not apart:
            return _cut(together) + parts
        first, last = self.layers[0], self.layers[-1]
        parent = first.rpartition(".")[0]  # said once
        last = _cut(last.removeprefix(f"{parent}.") if parent else last, _LABEL // 2)
        return f"{_cut(first, _LABEL - len(last))}{', ' if len(self.layers) == 2 else ' … '}{last}{parts}"


@dataclass(frozen=True)
class Colours:
    """The colours of learning rate scales, from the lowest to the highest: the darker, the faster."""

    scales: list[float]  # that there are, sorted; of one that moves its ends

    @classmethod
    def of(cls, plan: Plan) -> Colours:
        """Return the colours for what a plan trains."""
        factors = {factor for part in plan.reached for factor in part.factors.values()}
        ends = ([one.start, one.end] if isinstance(one, Ramp) else [one] for one in factors)
        return cls(sorted(set(chain.from_iterable(ends))))

    def __call__(self, factor: float) -> str:
        """Return the colour of a scale, of what is frozen for NaN."""
        if math.isnan(factor):
            return FROZEN
        high, low = self.scales[-1], min(scale for scale in self.scales if scale > 0)
        if self.scales[0] == 0:
            low = min(low, high / 100)
        place = math.log(max(factor, low) / low) / math.log(high / low) if high > low else 1.0
        return to_hex(colormaps["viridis_r"](0.2 + 0.7 * place))


def plot_schedule(plan: Plan) -> Figure:
    """Return a figure with what :func:`draw_schedule` draws, and the learning rates below if any is scaled."""
    height, rates = 0.24 * max(4, len(rows_of(plan))), forecast_rates(plan)
    scaled = Colours.of(plan).scales != [1.0] or (rates is not None and len(set(rates.rates)) > 1)
    figure = Picture(figsize=(9, 0.6 + height + 1.7 * scaled), layout="constrained")
    if scaled:
        bars, below = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.5])
        draw_rates(below, plan, rates)
        bars.tick_params(axis="x", bottom=False)
    else:
        bars = figure.add_subplot()
    draw_schedule(bars, plan)
    if scaled:
        bars.set_xlabel("")
    names = max(text.get_window_extent().height for text in bars.texts)
    figure.set_figheight(figure.get_figheight() + names / figure.dpi)
    return figure


def draw_schedule(axes: Axes, plan: Plan) -> None:
    """Draw a row for each run of layers that do the same throughout: pale while frozen, the darker the faster."""
    rows, colours, size = rows_of(plan), Colours.of(plan), plan.length.size
    for place, row in enumerate(rows):
        # The few that train among many that do not are still to be seen.
        shares = [max(0.15, count / row.courses.total()) for count in row.courses.values()]
        top = place - 0.42
        for course, share in zip(row.courses, shares, strict=True):
            height, pieces = 0.84 * share / sum(shares), list(_pieces(plan, course))
            axes.broken_barh(
                [(begin / size, (end - begin) / size) for begin, end, *_ in pieces], (top, height),
                facecolors=[colours(sum(ends) / 2) for *_, ends in pieces], linewidth=0, antialiased=False,
            )  # fmt: skip
            top += height
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], parse_math=False, fontsize=8)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    _draw_time(axes, plan, color="white")
    scales = colours.scales
    shown = [scales[round(step * (len(scales) - 1) / 6)] for step in range(7)]  # all of them, or seven
    handles = [Patch(color=colours(one), label=f"lr ×{one:.2g}") for one in dict.fromkeys(reversed(shown))]
    if scales == [1.0]:
        handles[0].set_label("trains")
    handles.append(Patch(color=FROZEN, label="frozen"))
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=8, borderaxespad=0,
    )  # fmt: skip
    _draw_phases(axes, plan)


def draw_rates(axes: Axes, plan: Plan, rates: Forecast | None = None) -> None:
    """Draw the learning rate of what trains over the fit; where the optimizer's is not known, the factor on it."""
    colours, known, drawn = Colours.of(plan), rates or Forecast([1.0], each=math.inf), list[float]()
    for course in dict.fromkeys(map(plan.course, plan.parameters)):
        points = np.array([point for piece in _pieces(plan, course) for point in _curve(piece, known)])
        lines = np.stack([points[:-1, :2], points[1:, :2]], axis=1) / (plan.length.size, 1)
        colors = [colours(factor) for factor in (points[:-1, 2] + points[1:, 2]) / 2]
        axes.add_collection(LineCollection([*lines], colors=colors, linewidths=1.8))
        drawn += points[:, 1].tolist()
    high, scales = np.nanmax(drawn), colours.scales
    if scales[0] > 0 and scales[-1] / scales[0] > 5:
        low = max(np.nanmin(drawn), high * scales[0] / scales[-1] / 30)  # many schedulers end at nothing
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1000 else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, high * 1.1)
    axes.set_ylabel("learning rate" if rates is not None else "factor on the\nlearning rate", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _draw_time(axes, plan, color=FROZEN, zorder=0)


def rows_of(plan: Plan) -> list[Row]:
    """Return the rows of a picture, from input to output: split as deep as layers differ and rows are not too many."""
    courses = {name: plan.course(name) for name in plan.parameters}
    deepest = max(name.count(".") for name in courses) + 1
    for depth in range(deepest, 0, -1):
        if len(rows := _rows(plan, courses, depth)) <= _ROWS:
            break
    return rows


def _rows(plan: Plan, courses: Mapping[str, Course], depth: int) -> list[Row]:
    rows: list[Row] = []
    for layer, inside in branches(courses, depth=depth, alike=3, leaves=False):
        counted: Counter[Course] = Counter()
        for name in inside:
            counted[courses[name]] += max(1, scalars(plan.parameters[name]))
        if rows and rows[-1].courses.keys() == counted.keys():
            rows[-1] = Row([*rows[-1].layers, layer], rows[-1].courses + counted)
        else:
            rows.append(Row([layer], counted))
    return rows


def _pieces(plan: Plan, course: Course) -> Iterator[Piece]:
    """Yield from which step to which a scale holds, with its value at both: NaN while frozen."""
    for part, factor in zip(plan.reached, course, strict=True):
        if not isinstance(factor, Ramp):
            yield part.begin, part.end, (math.nan if factor is None else factor,) * 2
            continue
        plan.length.check(f"{factor} takes", epochs=factor.epochs, steps=factor.steps)
        until = min(part.end, part.begin + (part.lasts.of(factor) or 0))
        by_steps = until - part.begin <= _SLICES
        edges = [*range(part.begin, math.ceil(until) + 1)] if by_steps else np.linspace(part.begin, until, _SLICES + 1)
        for one, other in pairwise([*edges, *([part.end] if edges[-1] < part.end else [])]):
            value = part.at(factor, one)
            yield one, other, (value, value if by_steps else part.at(factor, other))


def _curve(piece: Piece, rates: Forecast) -> Iterator[tuple[float, float, float]]:
    """Yield points of a scale: the step, the rate that it makes of the optimizer's, and the scale."""
    begin, end, (one, other) = piece
    for left, right in pairwise(rates.edges(begin, end)):
        for step in (left, right):
            factor = one + (other - one) * (step - begin) / (end - begin)
            yield step, rates.at(left) * factor, factor


def _draw_time(axes: Axes, plan: Plan, **line: Any) -> None:
    """Draw the axis, and a ``line`` where a phase takes over from another."""
    for part in plan.reached[1:]:
        axes.axvline(part.begin / plan.length.size, linewidth=1.0, **line)
    axes.set_xlim(0, plan.end / plan.length.size)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=8)
    unit = "epoch" if plan.length.unit == "epoch" else "optimizer step"
    axes.set_xlabel(f"{unit}, as the fit went" if plan.happened else unit, fontsize=8)


def _draw_phases(axes: Axes, plan: Plan) -> None:
    """Write the names of phases above them: across where there is room, else upright, as many as there is."""
    figure = axes.figure.figure  # the whole, also around a subfigure
    texts = [
        axes.annotate(
            _phase_text(plan, part.phase), ((part.begin + part.end) / 2 / plan.length.size, 1), xytext=(0, 3),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="bottom", fontsize=8,
            parse_math=False,
        )
        for part in plan.reached
    ]  # fmt: skip
    figure.draw_without_rendering()  # how wide the axes are is known when they have been laid out
    pixels, right = axes.get_window_extent().width / plan.end, -math.inf
    for part, text in zip(plan.reached, texts, strict=True):
        _fit(text, (part.end - part.begin) * pixels - 8)
        box = text.get_window_extent()
        if box.x0 < right:
            text.remove()
        else:
            right = box.x1


def _fit(text: Annotation, room: float) -> None:
    """Break a text into at most three lines of so many pixels, or set it upright."""
    words, width = text.get_text(), text.get_window_extent().width
    if width > room:
        letters = max(1, int(room / width * len(words)))
        text.set_text(textwrap.fill(words, letters, break_long_words=False))
        if text.get_window_extent().width > room or text.get_text().count("\n") > 2:
            text.set(rotation=90, text=shortened(words, _LABEL))


def _phase_text(plan: Plan, phase: Phase) -> str:
    text = phase.name if phase.name is not None else selected_text(phase.train)
    return text if plan.happened or phase.plateau is None else f"{text} (until {phase.plateau.monitor} plateaus)"


def _cut(text: str, most: int = _LABEL) -> str:
    """Return a name cut at its beginning: its end tells more."""
    return text if len(text) <= most else f"…{text[1 - most :]}"
