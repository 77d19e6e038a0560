"""Which phase a fit is in: pure data, without a Trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor
from torch.serialization import add_safe_globals

from lightning_freeze.schedule.phases import Phase, Plateau, describe
from lightning_freeze.words import counted

#: The optimizer step and the epoch at which a phase ends, and what ends it: "2 epochs".
End: TypeAlias = tuple[int, int, str]


class Begin(tuple[int, int, int]):
    """Where a phase began, ``(epoch, optimizer step, index)``; ``why`` says what ended the one before it."""

    why: str

    def __new__(cls, epoch: int, step: int, index: int, why: str = "") -> Begin:
        """Return a tuple of the first three that also has ``why``."""
        begin = super().__new__(cls, (epoch, step, index))
        begin.why = why
        return begin

    def __getnewargs__(self) -> tuple[int, int, int, str]:
        return (*self, self.why)


add_safe_globals([Begin])  # what a user saves the history in loads with weights_only=True


@dataclass
class PlateauWatch:
    """How far a metric is from its plateau; the caller decides when to take a value."""

    best: float | None = None
    bad: int = 0  # how many values since the best were no better
    why: str = ""  # how the plateau was reached
    kept: dict[str, Tensor] = field(default_factory=dict, compare=False)  # the best value's, if they shall come back

    def look(self, until: Plateau, value: float, *, early: bool = False) -> bool:
        """Take one value of the metric; return whether it is the best so far.

        What is reached stays so, but while it is ``early``, before ``min_epochs``, a later value can take it back.
        """
        sign, is_finite = 1 if until.mode == "min" else -1, math.isfinite(value)
        better = is_finite and (self.best is None or sign * value < sign * self.best - until.min_delta)
        if better:
            self.best = value
        self.bad = 0 if better else self.bad + 1
        if self.why and not early:
            return better
        self.why = ""
        if is_finite and until.threshold is not None and sign * value <= sign * until.threshold:
            self.why = f"{until.monitor} reached {value:.4g}"
        elif self.bad >= until.patience:
            than = "finite value" if self.best is None else f"better value than {self.best:.4g}"
            self.why = f"{until.monitor} had no {than} for {counted(self.bad, 'look')}"
        return better


@dataclass
class Progress:
    """Where in its schedule a fit is."""

    history: list[Begin] = field(default_factory=lambda: [Begin(0, 0, 0)])
    plateau: PlateauWatch = field(default_factory=PlateauWatch)  # of the current phase
    last_epoch: int = -1  # that has ended
    logged: list[str] = field(default_factory=list)  # metrics of plateaus that had been logged when this was saved
    unlooked: float | None = None  # the metric of an epoch that is over, which the next epoch's start takes
    uncounted: int = 0  # optimizer steps that `trainer.global_step` has missed
    seen: int = -1  # optimizer steps taken when the last batch, or an epoch after it, began
    asked: bool = False  # whether somebody has asked for the next phase
    told: bool = False  # whether `on_phase_start` has been called for the current phase, and its end is still to come
    total: int | None = None  # the optimizer steps that the fit takes, where a phase lasts a share of them
    ended: str = ""  # why the last phase, and with it the fit, has ended
    phases: Sequence[Phase] = field(default=(), compare=False, repr=False)  # as planned() returns them; not saved

    @property
    def index(self) -> int:
        """The index of the current phase."""
        return self.history[-1][2]

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.index]

    @property
    def is_last(self) -> bool:
        """Whether the current phase is the last."""
        return self.index + 1 == len(self.phases)

    @property
    def may_end_in_epoch(self) -> bool:
        """Whether the current phase may be over between two batches of an epoch; cheap enough for each."""
        phase = self.phase
        return phase.steps is not None or callable(phase.until) or bool(self.plateau.why or self.asked or self.ended)

    def over(self, epoch: int, step: int, asked: str = "") -> str:
        """Return why the current phase is over at an epoch and an optimizer step, an empty text while it is not.

        ``asked`` is who has asked for the next phase, empty if nobody has.
        """
        phase, why, begin = self.phase, self.plateau.why, self.history[-1]
        if why and (phase.plateau is None or epoch - begin[0] >= phase.plateau.min_epochs):
            return why
        if asked:
            return asked
        return next((end for at, in_epoch, end in counted_ends(phase, begin) if at <= step and in_epoch <= epoch), "")

    def begin_next(self, epoch: int, step: int, why: str) -> None:
        """Begin the next phase."""
        self.history.append(Begin(epoch, step, self.index + 1, why))
        self.plateau, self.unlooked, self.asked, self.told = PlateauWatch(), None, False, False

    def state_dict(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return the progress as plain data, and the schedule, by which a checkpoint recognises it."""
        fields = {name: value for name, value in vars(self).items() if name != "phases"}
        return {
            **fields,
            "history": [list(begin) for begin in self.history],
            "why": [begin.why for begin in self.history],
            "plateau": dict(vars(self.plateau)),
            "schedule": describe(phases),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Return what :meth:`state_dict` saved, also that of version 0.1.0."""
        whys = state.get("why", [""] * len(state["history"]))
        history = [Begin(epoch, step, i, why) for (epoch, step, i), why in zip(state["history"], whys, strict=True)]
        watch, old = dict(state["plateau"]), "why" not in state
        if watch.pop("ended_at", None) is not None:  # as 0.1.0 said it
            watch["why"] = "its plateau"
        fields = {one.name: state[one.name] for one in dataclasses.fields(cls) if one.name in state}
        return cls(**{"told": old, **fields, "history": history, "plateau": PlateauWatch(**watch)})


def numbered(phases: Sequence[Phase], index: int) -> str:
    """Return how logs name a phase."""
    return f"phase {index + 1}/{len(phases)} {phases[index].label!r}"


def planned(phases: Sequence[Phase], total: int | None = None, *, dry_run: bool = False) -> tuple[Phase, ...]:
    """Return a schedule as one fit goes through it: fractions as steps; in a dry run each phase lasts a step.

    Fractions of a fit of which nobody knows how many steps it takes, ``total=None``, stay fractions.
    """
    if dry_run:
        ends = [1] * (len(phases) - 1) + [None]
        return tuple(
            dataclasses.replace(phase, epochs=None, fraction=None, until=None, steps=steps)
            for phase, steps in zip(phases, ends, strict=True)
        )
    plan, share = list[Phase](), 0.0
    for phase in phases:
        if phase.fraction is not None and total is not None:
            # Borders are rounded, not lengths: thirds of ten steps are ten steps.
            before, share = share, share + phase.fraction
            steps = max(1, round(share * total) - round(before * total))
            phase = dataclasses.replace(phase, fraction=None, steps=min(steps, phase.steps or steps))
        plan.append(phase)
    return tuple(plan)


def counted_ends(phase: Phase, begin: Sequence[int], per_epoch: float | None = None) -> Iterator[End]:
    """Yield where its epochs, and where its steps, end a phase that begins at ``begin = (epoch, step)``.

    Without ``per_epoch``, the optimizer steps of an epoch, one counts epochs only and the other steps only: what is
    unknown of an end is as at the beginning.

    Example:
        >>> list(counted_ends(Phase("*", epochs=2, steps=25), (3, 32), per_epoch=10))
        [(50, 5, '2 epochs'), (57, 5, '25 steps')]
    """
    if phase.epochs is not None:
        epoch = begin[0] + phase.epochs
        yield round(epoch * per_epoch) if per_epoch else begin[1], epoch, counted(phase.epochs, "epoch")
    if phase.steps is not None:
        step = begin[1] + phase.steps
        yield step, int(step / per_epoch) if per_epoch else begin[0], counted(phase.steps, "step")


def walk(
    phases: Sequence[Phase],
    epoch: float,
    step: float,
    per_epoch: float | None,
    guess: Callable[[Begin], End | None] = lambda begin: None,
) -> list[Begin]:
    """Return where each phase began in a fit that is at an epoch, from 0, and an optimizer step.

    Without ``per_epoch``, the steps of an epoch, ends in the unknown unit are not reached. ``guess`` returns where a
    phase ends that only ends by what nobody can foresee, None if it has not ended.

    Example:
        >>> walk([Phase("a", epochs=2), Phase("b", steps=15), Phase("c")], 9, 90, per_epoch=10)
        [(0, 0, 0), (2, 20, 1), (3, 35, 2)]
    """
    begins = [Begin(0, 0, 0)]
    for index, phase in enumerate(phases[:-1]):
        ends: list[End | None] = [*counted_ends(phase, begins[-1], per_epoch)] or [guess(begins[-1])]
        reached = [end for end in ends if end is not None and end[0] <= step and end[1] <= epoch]
        if not reached:
            break
        end_step, end_epoch, why = min(reached, key=lambda end: end[:2])
        begins.append(Begin(end_epoch, end_step, index + 1, why))
    return begins


def begin_or_go_on(
    phases: Sequence[Phase],
    before: Progress | None,
    saved: Mapping[str, Any] | None,
    at: tuple[int, int],
    per_epoch: float | None,
    total: int | None = None,
    dry_run: bool = False,
) -> Progress:
    """Return the progress of a fit: resumed, resumed from another schedule, going on after another fit, or fresh.

    ``before`` is the progress of the fit that this one goes on from, ``saved`` the state of a checkpoint, ``at`` the
    epoch and the optimizer steps taken; of the ``total`` of steps, what was saved comes first.
    """
    if saved is not None and saved["schedule"] == describe(phases):
        progress = Progress.from_state(saved)
    elif before is not None and before.history[-1][:2] <= at:  # else a checkpoint without a schedule went back
        progress = before
    else:
        # Of ends that nobody can foresee, those count as passed that another schedule had passed.
        passed = saved["history"][-1][2] if saved is not None and saved["history"] else 0
        guess = lambda begin: (begin[1], begin[0], "") if begin[2] < passed else None  # noqa: E731
        progress = Progress(walk(planned(phases, total), *at, per_epoch, guess))
    if progress.total is None:
        progress.total = total
    progress.phases = planned(phases, progress.total, dry_run=dry_run)
    return progress
