"""Phases, as users write them: plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch.optim import Optimizer

from lightning_freeze._lightning import LightningModule, Trainer
from lightning_freeze.schedule.arguments import built, number, plain_options, unpacked, without_defaults
from lightning_freeze.schedule.rates import Ramp
from lightning_freeze.selectors import Selector, as_patterns, selector_text
from lightning_freeze.words import check_takes, one_of

# A scheduler, or what configure_optimizers may return in its place: {"scheduler": …, "interval": "epoch"}.
SchedulerFactory: TypeAlias = Callable[[Optimizer, int], Any]
Mode: TypeAlias = Literal["min", "max"]


@plain_options
@dataclass(frozen=True)
class Plateau:
    """The end of a phase: a metric has stopped getting better, or is good enough.

    A value is taken after each validation run that logs the metric or, if none does, after each training epoch that
    logs it; with several processes it is their mean. A value that is not finite is no improvement, and a warning
    tells of it. ``EarlyStopping`` beside it counts anew in each phase.

    Args:
        monitor: The name of a logged metric, as in ``trainer.callback_metrics``.
        patience: After how many values without improvement the phase ends, at least 1.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        min_delta: By how much a value has to be better, in the metric's own unit, at least 0.
        min_epochs: How many epochs the phase lasts at least; values are taken from its first on.
        threshold: A value at which the phase ends at once, without patience.
        restore_best: Whether weights and buffers come back as they were at the best value, when the plateau ends the
            phase; if epochs or steps end it first, they stay as they are. A copy of what can have moved in the phase
            is kept on the CPU and in checkpoints. The optimizer's state stays as it is.

    Raises:
        TypeError: If a number or a flag is of another type.
        ValueError: If an argument is out of range.

    Example:
        >>> Plateau("val_loss", patience=2).patience
        2
    """

    monitor: str
    patience: int = 3
    mode: Mode = "min"
    min_delta: float = 0.0
    min_epochs: int = 0
    threshold: float | None = None
    restore_best: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ValueError(f"Plateau(monitor={self.monitor!r}): name a logged metric, for example 'val_loss'.")
        one_of("Plateau", "mode", self.mode, get_args(Mode))
        if not self.min_delta >= 0:
            shown = f"Plateau(min_delta={self.min_delta!r}): min_delta"
            raise ValueError(f"{shown} is 0 or more; mode says which direction is better.")
        if not isinstance(self.restore_best, bool):
            raise TypeError(f"Plateau(restore_best={self.restore_best!r}): restore_best is True or False.")


@plain_options
@dataclass(frozen=True)
class Phase:
    """A part of a fit in which a set of parameters trains and every other one is frozen.

    It lasts until the first of its ends comes; an epoch in the middle of which the phase begins is its first. If the
    last phase of a schedule has an end, the fit ends there.

    Args:
        train: What trains, see :func:`select_parameters`; everything else is frozen. ``"*"`` is everything that was
            trainable when the fit began, and what came frozen and a phase of the schedule names.
        name: The name in logs; the selector if not given.
        epochs: How many epochs it lasts, at least 1.
        steps: How many optimizer steps it lasts, at least 1, as ``trainer.global_step`` counts them: with several
            optimizers each one's step counts.
        fraction: Which share of the fit's optimizer steps it lasts, above 0 and at most 1; fixed when the fit begins.
        until: What else ends it: a :class:`Plateau`, or a function ``(trainer, pl_module) -> bool``, which is asked
            before each optimizer step of the phase but the first and at each epoch's start; with several processes it
            ends the phase if it says so in one.
        lr_scale: A factor on the learning rate that your optimizer and scheduler set, or a :class:`Ramp` of it, for
            everything that trains or, as ``{selector: factor}``, for a part of it; where selectors overlap, the last
            one counts. A tuple is a list of selectors: ``{("*", "!head"): 0.1}``.
        lr_scheduler: A scheduler of the phase's own, made by a function of the optimizer and of the optimizer steps
            that the phase lasts at most. The function returns a scheduler, or a dict as ``configure_optimizers`` may:
            ``{"scheduler": …, "interval": "epoch"}``; without that it goes on each step. A class works too, and in YAML
            a mapping with ``class_path``, ``init_args`` and such options; the steps are filled in where it takes them.
            It begins from the rates that the optimizer was given. The scheduler of ``configure_optimizers`` rests
            meanwhile, and goes on, from the rates that it had set, in the next phase without a scheduler of its own.
            ``"restart"``: that scheduler begins anew with the phase.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range.

    Example:
        >>> Phase("head", epochs=2).label
        'head'
        >>> Phase(["head", "backbone.layer4"], steps=500, lr_scale={"backbone": Ramp(0.01, 0.1)}).label
        'head, backbone.layer4'
    """

    train: Selector
    _: dataclasses.KW_ONLY
    name: str | None = None
    epochs: int | None = None
    steps: int | None = None
    fraction: float | None = None
    until: Plateau | Callable[[Trainer, LightningModule], bool] | None = None
    # Keys are selectors; a Mapping of them would refuse a variable that is a dict[str, float].
    lr_scale: float | Ramp | Mapping[Any, float | Ramp] | None = None
    lr_scheduler: Mapping[str, Any] | Literal["restart"] | SchedulerFactory | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            shown = f"Phase(fraction={self.fraction!r}): fraction"
            raise ValueError(f"{shown} is a share of the fit: above 0 and at most 1.")
        if callable(self.until) and not isinstance(self.until, type):
            check_takes(f"Phase(until={function_name(self.until)})", self.until, "trainer", "pl_module")
        elif not (self.until is None or isinstance(self.until, Plateau)):
            raise TypeError(
                f"Phase(until={self.until!r}): until is a Plateau, for example Plateau('val_loss'), or a function "
                "(trainer, pl_module) -> bool."
            )
        if not self.train or not (isinstance(self.train, str | Sequence) or callable(self.train)):
            raise ValueError(
                f"Phase(train={self.train!r}): say what trains, for example 'head', ['head', 'neck'] or '*'."
            )
        as_patterns(self.train)
        for select, factor in self.scales.items():
            as_patterns(select)
            shown = f"Phase(lr_scale={self.lr_scale!r}): a factor"
            kind = "a number, a Ramp, or {selector: factor}"
            if not isinstance(factor, Ramp) and not 0 < number(shown, factor, kind) < math.inf:
                raise ValueError(f"{shown} is above 0 and finite. What shall not train, leave out of `train`.")
        own = self.lr_scheduler
        if not (own in (None, "restart") or callable(own) or (isinstance(own, Mapping) and "class_path" in own)):
            raise TypeError(
                f"Phase(lr_scheduler={own!r}): lr_scheduler is 'restart' or a function, for example "
                "lambda optimizer, steps: OneCycleLR(optimizer, 1e-3, total_steps=steps), or a mapping with class_path."
            )

    @property
    def scales(self) -> Mapping[Selector, float | Ramp]:
        """``lr_scale`` as ``{selector: factor}``."""
        if self.lr_scale is None:
            return {}
        return self.lr_scale if isinstance(self.lr_scale, Mapping) else {"*": self.lr_scale}

    @property
    def plateau(self) -> Plateau | None:
        """``until``, if it is a plateau."""
        return self.until if isinstance(self.until, Plateau) else None

    @property
    def has_end(self) -> bool:
        """Whether anything ends the phase."""
        return any(end is not None for end in (self.epochs, self.steps, self.fraction, self.until))

    @property
    def label(self) -> str:
        """The name of the phase, or what it trains."""
        return self.name if self.name is not None else selector_text(self.train)


def as_phases(phases: Sequence[Phase | Mapping[str, Any]], *others: Any) -> tuple[Phase, ...]:
    """Return phases from a list of phases, or of dicts of their arguments, as YAML has them; refuse ``others``."""
    if others or isinstance(phases, Phase | Mapping | str) or not isinstance(phases, Sequence):
        given = ", ".join(map(repr, (phases, *others)))
        is_numbered = isinstance(phases, Mapping) and all(isinstance(one, Phase | Mapping) for one in phases.values())
        right = "list(phases.values())" if is_numbered else "[Phase('head', epochs=2), …]"
        raise TypeError(f"A schedule is a list of phases, not {given}: FreezeSchedule({right}).")
    if not phases:
        raise ValueError("FreezeSchedule([]) has no phases. Give at least one, for example [Phase('head')].")
    schedule = tuple(_phase(phase, index) for index, phase in enumerate(phases))
    for index, phase in enumerate(schedule[:-1]):
        if not phase.has_end:
            raise ValueError(
                f"Phase {index + 1} of {len(schedule)} ({phase.label!r}) has no end, so the next one never begins. "
                "Give it epochs=…, steps=…, fraction=… or until=…; only the last phase may be open-ended."
            )
    shares = [phase.fraction for phase in schedule if phase.fraction is not None]
    if sum(shares) > 1 + 1e-9:
        raise ValueError(
            f"The fractions of the phases, {' + '.join(f'{share:g}' for share in shares)}, are {sum(shares):g} of the "
            "fit: together they are at most 1."
        )
    return schedule


def describe(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Return a schedule as plain data, by which a checkpoint recognises it."""
    return [_described(phase) for phase in phases]


def _described(phase: Phase) -> dict[str, Any]:
    plain = without_defaults(phase, "name", "epochs", "steps", "until", "lr_scale")
    plain["train"] = selector_text(phase.train)
    plain["lr_scale"] = {
        selector_text(select): dataclasses.asdict(factor) if isinstance(factor, Ramp) else float(factor)
        for select, factor in phase.scales.items()
    }
    if phase.plateau is not None:
        plain["until"] = without_defaults(phase.plateau, "monitor", "patience", "mode", "min_delta")
    return {key: function_name(value) if callable(value) else value for key, value in plain.items()}


def function_name(function: object) -> str:
    """Return the name of a function, or of the class of what is called."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _phase(phase: Phase | Mapping[str, Any], index: int) -> Phase:
    """Return a phase from a phase or a dict of its arguments."""
    where = f"Phase {index + 1}"
    if isinstance(phase, Phase):
        return phase
    if not isinstance(phase, Mapping):
        raise TypeError(
            f"{where} is {phase!r}: a phase is a Phase, as Phase('head', epochs=2), or a dict of its arguments. "
            "Those of a preset or another list are put in by a star: [*phases, …]."
        )
    options = dict(unpacked(phase))
    if isinstance(until := options.get("until"), Mapping):
        options["until"] = built(Plateau, until, f"{where}: until", ("monitor", "which metric"))
    if isinstance(scale := options.get("lr_scale"), Mapping):
        scale = unpacked(scale)
        if "_target_" in scale or ("start" in scale and scale.keys() <= {one.name for one in dataclasses.fields(Ramp)}):
            scale = {"*": scale}
        ramps = {select: one for select, one in scale.items() if isinstance(one, Mapping)}
        where_ramp, needs = f"{where}: lr_scale", ("start", "where the ramp begins")
        options["lr_scale"] = {**scale, **{one: built(Ramp, ramp, where_ramp, needs) for one, ramp in ramps.items()}}
    return built(Phase, options, where, ("train", "what trains"))
