"""A schedule as a picture: what trains when, and how fast."""

from __future__ import annotations

import io
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING

from lightning_freeze.functional import scalars
from lightning_freeze.names import branches, runs
from lightning_freeze.schedule.forecast import Forecast, Point, curve, forecast_rates
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

    low: float
    high: float

    @classmethod
    def of(cls, plan: Plan) -> Colours:
        """Return the colours for what a plan trains."""
        values = _scales(plan)
        low, high = min(value for value in values if value > 0), max(values)
        return cls(min(low, high / 100) if 0 in values else low, high)

    def __call__(self, factor: float | None) -> str:
        """Return the colour of a scale, of what is frozen for None."""
        if factor is None:
            return FROZEN
        span = math.log(self.high / self.low)
        place = math.log(max(factor, self.low) / self.low) / span if span else 1.0
        return to_hex(colormaps["viridis_r"](0.2 + 0.7 * place))


def plot_schedule(plan: Plan) -> Figure:
    """Return a figure with what :func:`draw_schedule` draws, and the learning rates below if any is scaled."""
    height, rates = 0.24 * max(4, len(rows_of(plan))), forecast_rates(plan)
    scaled = _scales(plan) != [1.0] or (rates is not None and rates.moves)
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
    rows, colours = rows_of(plan), Colours.of(plan)
    for place, row in enumerate(rows):
        # The few that train among many that do not are still to be seen.
        shares = [max(0.15, count / row.courses.total()) for count in row.courses.values()]
        top = place - 0.42
        for course, share in zip(row.courses, shares, strict=True):
            height = 0.84 * share / sum(shares)
            pieces = list(_pieces(plan, course))
            axes.broken_barh(
                [(begin, end - begin) for (begin, _), (end, _) in pieces], (top, height),
                facecolors=[colours(_mean(one, other)) for one, other in pieces], linewidth=0, antialiased=False,
            )  # fmt: skip
            top += height
    for begin in _borders(plan):
        axes.axvline(begin, color="white", linewidth=1.0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], parse_math=False, fontsize=8)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    _draw_time(axes, plan)
    scales = _scales(plan)
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
    colours, scales, drawn = Colours.of(plan), _scales(plan), list[float]()
    for course in dict.fromkeys(map(plan.course, plan.parameters)):
        for trains, group in groupby(_pieces(plan, course), key=lambda piece: piece[0][1] is not None):
            if trains:
                points = list(curve(group, rates))
                lines = list(pairwise((place, rate) for place, rate, _ in points))
                colors = [colours((one[2] + other[2]) / 2) for one, other in pairwise(points)]
                axes.add_collection(LineCollection(lines, colors=colors, linewidths=1.8))
                drawn += [rate for _, rate, _ in points]
    high = max(drawn)
    if scales[0] > 0 and scales[-1] / scales[0] > 5:
        low = max(min(drawn), high * scales[0] / scales[-1] / 30)  # many schedulers end at nothing
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1000 else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, high * 1.1)
    for begin in _borders(plan):
        axes.axvline(begin, color=FROZEN, linewidth=1.0, zorder=0)
    axes.set_ylabel("learning rate" if rates is not None else "factor on the\nlearning rate", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _draw_time(axes, plan)


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


def _pieces(plan: Plan, course: Course) -> Iterator[tuple[Point, Point]]:
    """Yield from where to where a scale holds, with its value at both ends: None while frozen."""
    for (index, (begin, end)), factor in zip(plan.reached.items(), course, strict=True):
        if not isinstance(factor, Ramp):
            yield (begin, factor), (end, factor)
            continue
        until, step = min(end, plan.ramp_end(index, factor)), 1 / plan.length.size
        if by_steps := until - begin <= _SLICES * step:
            edges = [begin + step * number for number in range(math.ceil((until - begin) / step - 1e-6) + 1)]
        else:
            edges = [begin + (until - begin) * number / _SLICES for number in range(_SLICES + 1)]
        edges += [end] * (edges[-1] < end)
        for one, other in pairwise(edges):
            value = plan.at(index, factor, one)
            yield (one, value), (other, value if by_steps else plan.at(index, factor, other))


def _mean(one: Point, other: Point) -> float | None:
    return None if one[1] is None or other[1] is None else (one[1] + other[1]) / 2


def _scales(plan: Plan) -> list[float]:
    """Return all learning rate scales that there are, sorted; of one that moves its ends."""
    factors = {factor for index in plan.reached for factor in plan.factors[index].values()}
    ends = ([one.start, one.end] if isinstance(one, Ramp) else [one] for one in factors)
    return sorted(set(chain.from_iterable(ends)))


def _borders(plan: Plan) -> list[float]:
    """Return where a phase takes over from another."""
    return [begin for begin, _ in plan.reached.values()][1:]


def _draw_time(axes: Axes, plan: Plan) -> None:
    axes.set_xlim(0, plan.end)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=8)
    unit = "epoch" if plan.length.unit == "epoch" else "optimizer step"
    axes.set_xlabel(f"{unit}, as the fit went" if plan.happened else unit, fontsize=8)


def _draw_phases(axes: Axes, plan: Plan) -> None:
    """Write the names of phases above them: across where there is room, else upright, as many as there is."""
    figure = axes.figure.figure  # the whole, also around a subfigure
    texts = {
        index: axes.annotate(
            _phase_text(plan, index), ((begin + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize=8, parse_math=False,
        )
        for index, (begin, end) in plan.reached.items()
    }  # fmt: skip
    figure.draw_without_rendering()  # how wide the axes are is known when they have been laid out
    pixels = axes.get_window_extent().width / plan.end
    right = -math.inf
    for index, text in texts.items():
        begin, end = plan.reached[index]
        _fit(text, (end - begin) * pixels - 8)
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


def _phase_text(plan: Plan, index: int) -> str:
    phase = plan.phases[index]
    text = phase.name if phase.name is not None else selected_text(phase.train)
    return text if plan.happened or phase.plateau is None else f"{text} (until {phase.plateau.monitor} plateaus)"


def _cut(text: str, most: int = _LABEL) -> str:
    """Return a name cut at its beginning: its end tells more."""
    return text if len(text) <= most else f"…{text[1 - most :]}"
