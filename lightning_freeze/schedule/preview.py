"""A schedule as a table, without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, callbacks_of
from lightning_freeze.freezing.batchnorm import affine_frozen_by_hand, has_running_statistics
from lightning_freeze.freezing.eval_mode import BY_HAND, interceptor
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.freezing.ledger import Ledger, ledger_of
from lightning_freeze.functional import can_train, scalars
from lightning_freeze.schedule.fit import Resolved, resolve_phases
from lightning_freeze.schedule.meaning import FrozenMode
from lightning_freeze.schedule.phases import Phase
from lightning_freeze.schedule.preset import phases_for
from lightning_freeze.selectors import named_unique_parameters, selector_text, unwrapped
from lightning_freeze.words import Table, percent, whole_number

Span = tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """A schedule over a fit of one module.

    Args:
        phases: The schedule.
        model: The module, without wrappers.
        max_epochs: How many epochs the fit takes.
        spans: From which to which epoch each phase lasts, None for one that never begins.
        resolved: What each phase means for the module.
        held_layers: The layers that callbacks, or the user by hand, keep in eval mode in every phase.
    """

    phases: Sequence[Phase]
    model: nn.Module
    max_epochs: int
    spans: list[Span | None]
    resolved: Resolved
    held_layers: set[nn.Module]

    @classmethod
    def of(
        cls,
        phases: Sequence[Phase],
        model: nn.Module,
        max_epochs: int,
        steps_per_epoch: int | None,
        mode: FrozenMode,
        callbacks: Sequence[Callback] | None = None,
    ) -> Plan:
        """Return the plan of a schedule; ``callbacks`` are the Trainer's, else those of the model's own Trainer."""
        model = unwrapped(model)
        parameters, trainer = named_unique_parameters(model), _trainer(model)
        if callbacks is None:
            callbacks = callbacks_of(trainer) if trainer is not None else []
        holds = {one.state_key: one.holds(model) for one in callbacks if isinstance(one, Holder)}
        held = {key: who for who, hold in holds.items() for key in hold.frozen}
        layers = [layer for layer in model.modules() if has_running_statistics(layer)]
        held |= dict.fromkeys(affine_frozen_by_hand(layers), BY_HAND)
        came_frozen = _came_frozen(parameters.values(), ledger_of(trainer) if trainer is not None else None)
        steps = max_epochs * steps_per_epoch if steps_per_epoch else math.inf
        phases = phases_for(phases, model, {*came_frozen, *held}, steps)
        spans = phase_spans(phases, max_epochs, steps_per_epoch)
        resolved = resolve_phases(
            model,
            parameters,
            phases,
            came_frozen=came_frozen,
            held=held,
            mode=mode,
            left_alone={module for hold in holds.values() for module in hold.own},
        )
        by_others = {module for hold in holds.values() for module in hold.eval_mode}
        by_hand = {one for one in layers if (stay := interceptor(one)) is not None and BY_HAND in stay.holders}
        return cls(phases, model, max_epochs, spans, resolved, by_others | by_hand)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters, by name."""
        return named_unique_parameters(self.model)


def phase_spans(phases: Sequence[Phase], max_epochs: int, steps_per_epoch: int | None = None) -> list[Span | None]:
    """Return from which to which epoch each phase lasts, as fractions; None for one that never begins.

    When a plateau comes, nobody knows: a phase that only a plateau ends is shown with an equal share of the rest of the
    fit.

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
    begin, spans = Fraction(0), list[Span | None]()
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


def preview_table(plan: Plan) -> Table:
    """Return a row for each phase: what trains, when, how much that is, frozen BatchNorm, learning rate scales."""
    total = sum(map(scalars, plan.parameters.values()))
    layers = {layer for layer in plan.model.modules() if has_running_statistics(layer)}
    rows = []
    for index, phase in enumerate(plan.phases):
        held = plan.held_layers.union(plan.resolved.holds[index].eval_mode)
        count = sum(map(scalars, plan.resolved.trains[index].values()))
        rows.append(
            (
                index + 1,
                phase.label,
                _epochs(phase, plan.spans[index], last=index == len(plan.phases) - 1),
                f"{count:,}",
                percent(count, total),
                f"{len(held & layers)}/{len(layers)}",
                ", ".join(f"{selector_text(select)}: {factor:g}" for select, factor in phase.scales.items()) or "1",
            )
        )
    return Table(("phase", "trains", "epochs", "parameters", "share", "BatchNorm frozen", "lr scale"), rows)


def _epochs(phase: Phase, span: Span | None, *, last: bool) -> str:
    """Return the epochs of a phase as text."""
    if span is None:
        return "never"
    begin, end = span
    first, final = int(begin), max(int(begin), -int(-end // 1) - 1)
    text = f"{first}-{final}" if final > first else f"{first}"
    if phase.plateau is None or last:
        return text
    return f"{text}, or until {phase.plateau.monitor} plateaus"


def _trainer(model: nn.Module) -> Trainer | None:
    """Return the Trainer that a LightningModule is attached to."""
    try:
        return model.trainer if isinstance(model, LightningModule) else None
    except RuntimeError:  # it is attached to none
        return None


def _came_frozen(parameters: Iterable[nn.Parameter], ledger: Ledger | None) -> set[int]:
    """Return the identities of what a fit finds frozen, or has found if one is running."""
    if ledger is not None:
        return ledger.came_frozen
    return {id(parameter) for parameter in parameters if can_train(parameter) and not parameter.requires_grad}
