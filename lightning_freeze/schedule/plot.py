"""A schedule as a picture, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_freeze.freezing.step_view import factor_at
from lightning_freeze.functional import scalars
from lightning_freeze.schedule.preview import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FROZEN, _TRAINS = "#d8dee9", "#2f6f9f"


def plot_schedule(plan: Plan) -> Figure:
    """Return a figure with what :func:`draw_schedule` draws."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install 'lightning-freeze[plot]'.") from error
    rows = len({name.split(".")[0] for name in plan.parameters})
    figure = Figure(figsize=(9, 1.6 + 0.42 * rows), layout="constrained")
    draw_schedule(figure.add_subplot(), plan)
    return figure


def draw_schedule(axes: Axes, plan: Plan) -> None:
    """Draw a bar for each top-level module: the darker, the more of it trains, and pale while it is frozen."""
    tops: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in plan.parameters.items():
        tops.setdefault(name.split(".")[0], {})[name] = parameter
    for index, (phase, span) in enumerate(zip(plan.phases, plan.spans, strict=True)):
        if span is None:
            continue
        for row, own in enumerate(tops.values()):
            _draw_bar(axes, row, span, own, plan, index)
        axes.axvline(span[0], color="black", linewidth=0.8)
        axes.annotate(
            phase.label if phase.plateau is None else f"{phase.label} (until {phase.plateau.monitor} plateaus)",
            (span[0], 1.0), xycoords=("data", "axes fraction"), xytext=(3, 4), textcoords="offset points", fontsize=9,
            parse_math=False,
        )  # fmt: skip
    axes.set_yticks(range(len(tops)), list(tops), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, plan.max_epochs)
    axes.set_xlabel("epoch")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bar(
    axes: Axes, row: int, span: tuple[float, float], own: dict[str, nn.Parameter], plan: Plan, index: int
) -> None:
    """Draw the bar of one module in one phase."""
    begin, end = span
    active = {name: p for name, p in own.items() if name in plan.resolved.trains[index]}
    share = sum(map(scalars, active.values())) / max(1, sum(map(scalars, own.values())))
    axes.barh(row, end - begin, left=begin, color=_FROZEN, edgecolor="white", height=0.8)
    axes.barh(row, end - begin, left=begin, color=_TRAINS, alpha=share, edgecolor="white", height=0.8)
    scales = plan.resolved.scales[index]
    factors = sorted({factor_at(scales.get(id(p), 1.0), done=1.0) for p in active.values()} - {1.0})
    words = ([f"{share:.0%}"] if 0 < share < 1 else []) + [f"lr ×{factor:g}" for factor in factors]
    if words:
        colour = "white" if share > 0.4 else "black"
        axes.text((begin + end) / 2, row, ", ".join(words), ha="center", va="center", fontsize=8, color=colour)
