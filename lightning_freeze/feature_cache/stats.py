"""What a cache has done, stage by stage, and whether it is worth going on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_WORTH = 0.02  # of the samples of an epoch have to come back, or keys cost more than they save


@dataclass(frozen=True)
class FeatureStats:
    """What a cache has done, and whether it works now.

    Args:
        active: Whether outputs are remembered now.
        why: Why not, or why only a part of a chain; None if all is.
        covers: The names of the modules whose outputs are remembered.
        hits: Samples whose features were there.
        misses: Samples whose features were computed.
        samples: Samples that are kept now.
        bytes: Bytes taken for them, in memory or in the folder.
        seconds_saved: Time that computing the hits would have taken, less what keys, checks and copies took.
        difference: The largest difference seen between two computations of the same, in parts of the largest number; 0
            if every bit was the same.
    """

    active: bool = False
    why: str | None = "it has not begun"
    covers: tuple[str, ...] = ()
    hits: int = 0
    misses: int = 0
    samples: int = 0
    bytes: int = 0
    seconds_saved: float = 0.0
    difference: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of samples whose features were there."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass
class Counts:
    """What the calls of one stage have come to."""

    hits: int = 0
    misses: int = 0
    known: int = 0  # samples of this epoch that had been there before, whether or not what was there could serve
    run_seconds: float = 0.0  # in the modules for the misses
    all_seconds: float = 0.0  # keys and checks included
    difference: float = 0.0
    refused: str | None = None  # why some calls are not answered
    off: str | None = None  # why nothing is remembered in this stage any more
    left_out: int = 0  # samples of this epoch for which there was no room
    last_epoch: tuple[int, int] = (0, 0)  # its hits and misses
    _before: tuple[int, int] = (0, 0)  # those until the end of the last epoch
    _restart: int = 0  # samples until nothing was known of any

    @property
    def seconds_saved(self) -> float:
        """Time that computing the hits would have taken, less what keys, checks and copies took."""
        if self.misses == 0:
            return 0.0
        return self.hits * self.run_seconds / self.misses - (self.all_seconds - self.run_seconds)

    def end_epoch(self, stage: str, row_bytes: float) -> str | None:
        """Return why nothing is remembered any more, if samples have not come back though they could have."""
        hits, misses = self.last_epoch = self.hits - self._before[0], self.misses - self._before[1]
        samples, known, left_out = hits + misses, self.known, self.left_out
        self._before, self.known, self.left_out = (self.hits, self.misses), 0, 0
        if self.off is not None or not 0 < 2 * samples <= self.hits + self.misses - self._restart:
            return None
        if known < _WORTH * samples:
            self.off = self.refused or (
                f"only {known:,} of the {samples:,} samples of the last {stage} epoch had been there before: they "
                "are augmented at random, or there is too little room for them"
            )
        elif (left_out or self.refused) and hits < _WORTH * samples:
            self.off = self.refused or (
                f"there is no room for {left_out:,} of the {samples:,} samples of the last {stage} epoch, and a "
                f"batch is answered only if all of its samples are there. All take {samples * row_bytes:,.0f} bytes"
            )
        return self.off

    def restart(self) -> None:
        """Do not count on samples to come back of which nothing is known any more."""
        self._restart = self.hits + self.misses


class Stages(defaultdict[str, Counts]):
    """What has been done in training, validation and so on, as ``name`` says what is going on now."""

    name: Callable[[], str] = str

    def now(self) -> Counts:
        """Return the counts of what is going on now."""
        return self[self.name()]

    def begin(self, name: Callable[[], str]) -> None:
        """Go on in another fit, where samples may come back again."""
        self.name = name
        for counts in self.values():
            counts.off = counts.refused = None
            counts.restart()

    def off(self) -> str | None:
        """Return why nothing is remembered in training any more; without training, in any stage, all calls refused."""
        used = {stage: counts for stage, counts in self.items() if counts.misses and "sanity" not in stage}
        if not used:
            return next((counts.refused for counts in self.values() if counts.refused is not None), None)
        training = [counts.off for stage, counts in used.items() if stage.startswith("train")]
        reasons = training or [counts.off for counts in used.values()]
        return reasons[0] if all(reasons) else None

    def stats(self, **now: Any) -> FeatureStats:
        """Return the sums over all stages, with what holds ``now``."""
        sums = {name: sum(getattr(one, name) for one in self.values()) for name in ("hits", "misses", "seconds_saved")}
        return FeatureStats(difference=max((one.difference for one in self.values()), default=0.0), **sums, **now)
