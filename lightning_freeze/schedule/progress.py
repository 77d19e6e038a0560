"""Which phase a fit is in: pure data, without a Trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.serialization import add_safe_globals

from lightning_freeze.schedule.phases import Phase, describe
from lightning_freeze.schedule.plateau import Plateau
from lightning_freeze.words import counted


class Begin(tuple[int, int, int]):
    """Where a phase began, ``(epoch, optimizer step, index)``; ``why`` says what ended the one before it.

    Example:
        >>> begin = Begin(2, 20, 1, "2 epochs")
        >>> begin == (2, 20, 1), begin.why
        (True, '2 epochs')
    """

    why: str

    def __new__(cls, epoch: int, step: int, index: int, why: str = "") -> Begin:
        """Return a tuple of the first three that also has ``why``."""
        begin = super().__new__(cls, (epoch, step, index))
        begin.why = why
        return begin

    def __getnewargs__(self) -> tuple[int, int, int, str]:
        """Return what copies and pickles are made of."""
        return (*self, self.why)


add_safe_globals([Begin])  # what a user saves the history in loads with weights_only=True


@dataclass
class PlateauWatch:
    """How far a metric is from its plateau; the caller decides when to take a value.

    Args:
        best: The best value so far.
        bad: How many values since then were no better.
        why: How the plateau was reached, empty before.
        kept: Weights and buffers of the best value, if they shall come back.
    """

    best: float | None = None
    bad: int = 0
    why: str = ""
    kept: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def look(self, until: Plateau, value: float, *, early: bool = False) -> bool:
        """Take one value of the metric; return whether it is the best so far.

        What is reached stays so, but while it is ``early``, before ``min_epochs``, a later value can take it back.

        Example:
            >>> watch = PlateauWatch()
            >>> [watch.look(Plateau("loss", patience=2), loss) for loss in (1.0, 0.5, 0.6, 0.7)]
            [True, True, False, False]
            >>> watch.why
            'loss had no better value than 0.5 for 2 looks'
        """
        better = until.better(value, self.best)
        if better:
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if early:
            self.why = ""
        if not self.why:
            self.why = self._reached(until, value)
        return better

    def _reached(self, until: Plateau, value: float) -> str:
        if math.isfinite(value) and until.reaches(value):
            return f"{until.monitor} reached {value:.4g}"
        if self.bad < until.patience:
            return ""
        than = "" if self.best is None else f" better value than {self.best:.4g}"
        return f"{until.monitor} had no{than or ' finite value'} for {counted(self.bad, 'look')}"


@dataclass
class Progress:
    """Where in its schedule a fit is.

    Args:
        history: Where each phase began, and why.
        plateau: How far the current phase's metric is from its plateau.
        unlooked: The metric's value of an epoch that is over, which the next epoch's start takes.
        uncounted: Optimizer steps that ``trainer.global_step`` has missed.
        seen: The optimizer steps that were taken when the last batch, or an epoch after it, began.
        asked: Whether somebody has asked for the next phase.
        told: Whether ``on_phase_start`` has been called for the current phase, and its end is still to come.
        total: The optimizer steps that the fit takes, where a phase lasts a share of them.
        ended: Why the last phase, and with it the fit, has ended; empty before.
        phases: The schedule, as :func:`planned` returns it; it is not saved.

    Example:
        >>> progress = Progress(phases=[Phase("head", steps=3), Phase("*")])
        >>> progress.over(epoch=0, step=2), progress.over(epoch=0, step=3)
        ('', '3 steps')
        >>> progress.begin_next(0, 3, "3 steps")
        >>> progress.history
        [(0, 0, 0), (0, 3, 1)]
    """

    history: list[Begin] = field(default_factory=lambda: [Begin(0, 0, 0)])
    plateau: PlateauWatch = field(default_factory=PlateauWatch)
    unlooked: float | None = None
    uncounted: int = 0
    seen: int = -1
    asked: bool = False
    told: bool = False
    total: int | None = None
    ended: str = ""
    phases: Sequence[Phase] = field(default=(), compare=False, repr=False)

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
        by_function = phase.until is not None and phase.plateau is None
        return phase.steps is not None or by_function or bool(self.plateau.why or self.asked or self.ended)

    def over(self, epoch: int, step: int, asked: str = "") -> str:
        """Return why the current phase is over, an empty text while it is not.

        Args:
            epoch: The current epoch.
            step: Optimizer steps taken.
            asked: Who has asked for the next phase, empty if nobody has.
        """
        begin_epoch, begin_step, _ = self.history[-1]
        phase, why = self.phase, self.plateau.why
        if why and (phase.plateau is None or epoch - begin_epoch >= phase.plateau.min_epochs):
            return why
        return asked or _counted_out(phase, epoch - begin_epoch, step - begin_step)

    def look(self, until: Plateau, value: float, epoch: int) -> bool:
        """Take a value of the current phase's metric, logged in an epoch; return whether it is the best so far."""
        return self.plateau.look(until, value, early=epoch - self.history[-1][0] < until.min_epochs)

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


def planned(phases: Sequence[Phase], total: int | None = None, *, dry_run: bool = False) -> tuple[Phase, ...]:
    """Return a schedule as one fit goes through it: fractions as steps; in a dry run each phase lasts a step.

    Args:
        phases: The schedule.
        total: The optimizer steps that the fit takes; None if unknown, then fractions do not end.
        dry_run: Whether each phase shall only be tried.

    Example:
        >>> planned([Phase("a", fraction=0.25), Phase("b", fraction=0.5), Phase("c")], 10)[:2]
        (Phase(train='a', steps=2), Phase(train='b', steps=6))
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


def walk(
    phases: Sequence[Phase], epoch: int, step: int, steps_per_epoch: float | None, *, passed: int = 0
) -> list[Begin]:
    """Return where each phase began in a fit that is at an epoch and a step.

    Args:
        phases: The schedule, as :func:`planned` returns it.
        epoch: The epoch that is about to begin or has begun, from 0.
        step: Optimizer steps taken.
        steps_per_epoch: Optimizer steps an epoch takes; None if unknown, then ends in the unknown unit are not reached.
        passed: How many phases count as over though only what nobody can foresee ends them.

    Example:
        >>> walk([Phase("a", epochs=2), Phase("b", steps=15), Phase("c")], 9, 90, steps_per_epoch=10)
        [(0, 0, 0), (2, 20, 1), (3, 35, 2)]
    """
    begins = [Begin(0, 0, 0)]
    for index, phase in enumerate(phases[:-1]):
        begin_epoch, begin_step, _ = begins[-1]
        ends = []
        if phase.epochs is not None:
            end_epoch = begin_epoch + phase.epochs
            ends.append((end_epoch, round(end_epoch * steps_per_epoch) if steps_per_epoch else begin_step))
        if phase.steps is not None:
            end_step = begin_step + phase.steps
            ends.append((int(end_step / steps_per_epoch) if steps_per_epoch else begin_epoch, end_step))
        if not ends and index < passed:
            ends.append((begin_epoch, begin_step))
        reached = [(end_step, end_epoch) for end_epoch, end_step in ends if end_epoch <= epoch and end_step <= step]
        if not reached:
            break
        end_step, end_epoch = min(reached)
        why = _counted_out(phase, end_epoch - begin_epoch, end_step - begin_step)
        begins.append(Begin(end_epoch, end_step, index + 1, why))
    return begins


def begin_or_go_on(
    phases: Sequence[Phase],
    before: Progress | None,
    saved: Mapping[str, Any] | None,
    at: tuple[int, int],
    steps_per_epoch: Callable[[], float | None],
    total: int | None = None,
    dry_run: bool = False,
) -> Progress:
    """Return the progress of a fit: resumed, resumed from another schedule, going on after another fit, or fresh.

    Args:
        phases: The schedule.
        before: The progress of the fit that this one goes on from, None if there is none.
        saved: The state of a checkpoint, None without one.
        at: The epoch and the optimizer steps taken.
        steps_per_epoch: Returns the optimizer steps of an epoch, None if unknown.
        total: The optimizer steps that the fit takes, None if unknown; what was saved of it comes first.
        dry_run: Whether each phase shall only be tried.
    """
    if saved is not None and saved["schedule"] == describe(phases):
        progress = Progress.from_state(saved)
    elif before is not None and before.history[-1][:2] <= at:  # else a checkpoint without a schedule went back
        progress = before
    else:
        passed = saved["history"][-1][2] if saved is not None and saved["history"] else 0
        progress = Progress(walk(planned(phases, total), *at, steps_per_epoch(), passed=passed))
    if progress.total is None:
        progress.total = total
    progress.phases = planned(phases, progress.total, dry_run=dry_run)
    return progress


def _counted_out(phase: Phase, epochs: int, steps: int) -> str:
    """Return which of its epochs or steps are over in a phase that has lasted so long, empty if neither."""
    if phase.epochs is not None and epochs >= phase.epochs:
        return counted(phase.epochs, "epoch")
    return counted(phase.steps, "step") if phase.steps is not None and steps >= phase.steps else ""
