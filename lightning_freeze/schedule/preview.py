"""A schedule as a table and as a picture, without training."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

from lightning_freeze.freezing.batchnorm import every_module, has_running_statistics, held_affine, is_held
from lightning_freeze.functional import scalars
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.plan import FrozenMode, held_modules, phase_scales, phase_trains, without_held
from lightning_freeze.selectors import named_unique_parameters, selector_text, unwrapped
from lightning_freeze.words import Table, percent, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FROZEN, _TRAINS = "#d8dee9", "#2f6f9f"


def phase_spans(
    phases: Sequence[Phase], max_epochs: int, steps_per_epoch: int | None = None
) -> list[tuple[float, float] | None]:
    """Give from which to which epoch each phase lasts, as fractions; None for one that the fit never reaches.

    A plateau cannot be foreseen: a phase that only a plateau ends is drawn as if it lasted an equal share of what is
    left of the fit.

    Raises:
        TypeError: If a number is no whole one.
        ValueError: If a phase lasts a number of steps and ``steps_per_epoch`` is not given, or a number is below 1.

    Example:
        >>> phase_spans([Phase("a", steps=15), Phase("b", epochs=9), Phase("c")], 4, steps_per_epoch=10)
        [(0.0, 1.5), (1.5, 4.0), None]
    """
    max_epochs = whole_number("preview", "max_epochs", max_epochs)
    if steps_per_epoch is not None:
        steps_per_epoch = whole_number("preview", "steps_per_epoch", steps_per_epoch)
    # Thirds of an epoch have to add up to whole ones.
    begin, spans = Fraction(0), list[tuple[float, float] | None]()
    for index, phase in enumerate(phases):
        ends = [Fraction(max_epochs)]
        if index < len(phases) - 1:
            if phase.epochs is not None:
                ends.append(Fraction(int(begin) + phase.epochs))
            if phase.steps is not None:
                if steps_per_epoch is None:
                    raise ValueError(f"Phase {phase.label!r} lasts {phase.steps} steps: give steps_per_epoch.")
                ends.append(begin + Fraction(phase.steps, steps_per_epoch))
            if len(ends) == 1:
                ends.append(begin + (max_epochs - begin) / (len(phases) - index))
        end = min(ends)
        spans.append((float(begin), float(end)) if begin < max_epochs else None)
        begin = end
    return spans


def preview_table(
    phases: Sequence[Phase], model: nn.Module, max_epochs: int, steps_per_epoch: int | None, frozen_mode: FrozenMode
) -> Table:
    """Give a row for each phase: when, what trains, how much that is, how many BatchNorm are frozen, at which rate."""
    model = unwrapped(model)
    total = sum(scalars(parameter) for parameter in named_unique_parameters(model).values())
    layers = [layer for layer in every_module(model) if has_running_statistics(layer)]
    by_hand = {layer for layer in layers if is_held(layer)}
    rows = []
    for number, (phase, span) in enumerate(zip(phases, phase_spans(phases, max_epochs, steps_per_epoch)), 1):  # noqa: B905
        trains = _trains(model, phase)
        phase_scales(model, phase)
        held = by_hand.union(held_modules(model, {id(parameter) for parameter in trains.values()}, frozen_mode))
        count = sum(scalars(parameter) for parameter in trains.values())
        rows.append(
            (
                number,
                phase.label,
                _epochs(phase, span, last=number == len(phases)),
                f"{count:,}",
                percent(count, total),
                f"{sum(map(has_running_statistics, held))}/{len(layers)}",
                ", ".join(f"{selector_text(select)}: {factor:g}" for select, factor in phase.scales.items()) or "1",
            )
        )
    return Table(("phase", "trains", "epochs", "parameters", "share", "BatchNorm frozen", "lr scale"), rows)


def plot_schedule(phases: Sequence[Phase], model: nn.Module, max_epochs: int, steps_per_epoch: int | None) -> Figure:
    """Give a figure with what :func:`draw_schedule` draws."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install 'lightning-freeze[plot]'.") from error
    rows = len({name.split(".")[0] for name in named_unique_parameters(unwrapped(model))})
    figure = Figure(figsize=(9, 1.6 + 0.42 * rows), layout="constrained")
    draw_schedule(figure.add_subplot(), phases, model, max_epochs, steps_per_epoch)
    return figure


def draw_schedule(
    axes: Axes, phases: Sequence[Phase], model: nn.Module, max_epochs: int, steps_per_epoch: int | None = None
) -> None:
    """Draw a bar for each top-level module: dark while it trains, by the share of it that does; pale while frozen."""
    spans = phase_spans(phases, max_epochs, steps_per_epoch)
    parameters = named_unique_parameters(unwrapped(model))
    tops = list(dict.fromkeys(name.split(".")[0] for name in parameters))
    for phase, span in zip(phases, spans, strict=True):
        if span is None:
            continue
        trains, scales = _trains(model, phase), phase_scales(model, phase)
        begin, end = span
        for row, top in enumerate(tops):
            own = {name: p for name, p in parameters.items() if name.split(".")[0] == top}
            active = {name: p for name, p in own.items() if name in trains}
            share = sum(scalars(p) for p in active.values()) / max(1, sum(scalars(p) for p in own.values()))
            axes.barh(row, end - begin, left=begin, color=_FROZEN, edgecolor="white", height=0.8)
            axes.barh(row, end - begin, left=begin, color=_TRAINS, alpha=share, edgecolor="white", height=0.8)
            factors = sorted({scales.get(id(p), 1.0) for p in active.values()} - {1.0})
            words = [f"{share:.0%}"] if 0 < share < 1 else []
            words += [f"lr ×{factor:g}" for factor in factors]
            if words:
                colour = "white" if share > 0.4 else "black"
                middle = (begin + end) / 2
                axes.text(middle, row, ", ".join(words), ha="center", va="center", fontsize=8, color=colour)
        axes.axvline(begin, color="black", linewidth=0.8)
        axes.annotate(
            phase.label if phase.until is None else f"{phase.label} (until {phase.until.monitor} plateaus)",
            (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 4), textcoords="offset points", fontsize=9,
            parse_math=False,
        )  # fmt: skip
    axes.set_yticks(range(len(tops)), tops, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, max_epochs)
    axes.set_xlabel("epoch")
    axes.spines[["top", "right"]].set_visible(False)


def _trains(model: nn.Module, phase: Phase) -> dict[str, nn.Parameter]:
    """Give what a phase trains: what it selects, but for the affine part of BatchNorm that is frozen by hand."""
    return without_held(phase, phase_trains(model, phase), held_affine(model))


def _epochs(phase: Phase, span: tuple[float, float] | None, *, last: bool) -> str:
    if span is None:
        return "never"
    begin, end = span
    first, final = int(begin), max(int(begin), -int(-end // 1) - 1)
    text = f"{first}-{final}" if final > first else f"{first}"
    if phase.until is None or last:
        return text
    return f"{text}, or until {phase.until.monitor} plateaus"
