"""Which phase a fit is in: pure data, without a Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_freeze.schedule.phases import Phase, Plateau, describe


@dataclass
class PlateauWatch:
    """How far a metric is from its plateau; the caller decides when to take a value.

    Args:
        best: The best value so far.
        bad: How many values since then were no better.
        ended_at: The optimizer steps taken when the plateau was reached, None before.
    """

    best: float | None = None
    bad: int = 0
    ended_at: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the plateau is reached."""
        return self.ended_at is not None

    def look(self, until: Plateau, value: float, step: int) -> None:
        """Take one value of the metric, after ``step`` optimizer steps.

        Example:
            >>> watch = PlateauWatch()
            >>> for step, loss in enumerate((1.0, 0.5, 0.6, 0.7)):
            ...     watch.look(Plateau("loss", patience=2), loss, step)
            >>> watch
            PlateauWatch(best=0.5, bad=2, ended_at=3)
        """
        if until.better(value, self.best):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.ended_at is None and self.bad >= until.patience:
            self.ended_at = step


@dataclass
class Progress:
    """Where in its schedule a fit is.

    Args:
        history: Where each phase began: ``(epoch, optimizer step, index)``.
        plateau: How far the current phase's metric is from its plateau.
        unlooked: The metric's value of an epoch that is over, which the next epoch's start takes.
        uncounted: Optimizer steps that ``trainer.global_step`` has missed.

    Example:
        >>> phases = [Phase("head", steps=3), Phase("*")]
        >>> progress = Progress()
        >>> progress.advance(phases, epoch=0, step=2), progress.advance(phases, epoch=0, step=3), progress.history
        (False, True, [(0, 0, 0), (0, 3, 1)])
    """

    history: list[tuple[int, int, int]] = field(default_factory=lambda: [(0, 0, 0)])
    plateau: PlateauWatch = field(default_factory=PlateauWatch)
    unlooked: float | None = None
    uncounted: int = 0

    @property
    def index(self) -> int:
        """The index of the current phase."""
        return self.history[-1][2]

    def is_due(self, phases: Sequence[Phase], step: int) -> bool:
        """Return whether the current phase may be over between two steps of an epoch."""
        _, begin, index = self.history[-1]
        steps = phases[index].steps
        return self.plateau.ended or (steps is not None and step - begin >= steps)

    def advance(self, phases: Sequence[Phase], epoch: int, step: int, *, plateau: bool = True) -> bool:
        """Begin the next phase if this one is over, and so on; return whether one began.

        Args:
            phases: The schedule.
            epoch: The current epoch.
            step: Optimizer steps taken.
            plateau: Whether a plateau may end the current phase now.
        """
        before = self.index
        while self.index + 1 < len(phases):
            by_plateau = plateau and self.plateau.ended
            if not (by_plateau or phases[self.index].is_over(self.history[-1][:2], epoch, step)):
                break
            self.history.append((epoch, step, self.index + 1))
            self.plateau, self.unlooked = PlateauWatch(), None
        return self.index != before

    def state_dict(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Return the progress as plain data, and the schedule, by which a checkpoint recognises it."""
        return {
            "history": [list(begin) for begin in self.history],
            "plateau": dataclasses.asdict(self.plateau),
            "unlooked": self.unlooked,
            "uncounted": self.uncounted,
            "schedule": describe(phases),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Return what :meth:`state_dict` saved, also that of version 0.1.0."""
        history = [(epoch, step, index) for epoch, step, index in state["history"]]
        return cls(history, PlateauWatch(**state["plateau"]), state.get("unlooked"), state.get("uncounted", 0))


def walk(
    phases: Sequence[Phase], epoch: int, step: int, steps_per_epoch: float | None, *, passed: int = 0
) -> list[tuple[int, int, int]]:
    """Return where each phase began in a fit that is at an epoch and a step: ``(epoch, optimizer step, index)``.

    Args:
        phases: The schedule.
        epoch: The epoch that is about to begin or has begun, from 0.
        step: Optimizer steps taken.
        steps_per_epoch: Optimizer steps an epoch takes; None if unknown, then ends in the unknown unit are not reached.
        passed: How many phases count as over though only a plateau, which nobody can foresee, ends them.

    Example:
        >>> walk([Phase("a", epochs=2), Phase("b", steps=15), Phase("c")], 9, 90, steps_per_epoch=10)
        [(0, 0, 0), (2, 20, 1), (3, 35, 2)]
    """
    begins = [(0, 0, 0)]
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
        begins.append((end_epoch, end_step, index + 1))
    return begins


def begin_or_go_on(
    phases: Sequence[Phase],
    before: Progress | None,
    saved: Mapping[str, Any] | None,
    at: tuple[int, int],
    steps_per_epoch: Callable[[], float | None],
) -> Progress:
    """Return the progress of a fit: resumed, resumed from another schedule, going on after another fit, or fresh.

    Args:
        phases: The schedule.
        before: The progress of the fit that this one goes on from, None if there is none.
        saved: The state of a checkpoint, None without one.
        at: The epoch and the optimizer steps taken.
        steps_per_epoch: Returns the optimizer steps of an epoch, None if unknown.
    """
    if saved is not None and saved["schedule"] == describe(phases):
        return Progress.from_state(saved)
    if before is not None and before.history[-1][:2] <= at:  # else a checkpoint without a schedule went back
        return before
    passed = saved["history"][-1][2] if saved is not None and saved["history"] else 0
    return Progress(walk(phases, *at, steps_per_epoch(), passed=passed))
