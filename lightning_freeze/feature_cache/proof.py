"""What is known of a module's calls: whether rows may be the answer, by what has been computed a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_freeze.feature_cache.outputs import OutputForm
from lightning_freeze.feature_cache.rows import Entry

ENOUGH = 256  # numbers that have to be equal, over all comparisons, before bits count as the same
_FIRST_PROOF, _RARER = 128, 4  # the batch answered from memory that is computed all the same, and the growth of that
_MOST_PROBES = 4  # sizes of batches that are tried beside what is asked for, and how often


@dataclass
class Batches:
    """What is known of batches of one size.

    Args:
        size: How many samples they have.
        like: Sizes whose rows are the same, bit by bit, this one included.
        form: Of the outputs.
        row_bytes: Of one sample.
        same: How many numbers were equal when a batch was computed again.
        mixed: How many were when samples were computed in another batch than before.
        runs: How often the module ran.
    """

    size: int
    like: set[int]
    form: OutputForm | None = None
    row_bytes: int = 0
    same: int = 0
    mixed: int = 0
    runs: int = 0

    def trusts(self, found: Sequence[Entry | None]) -> bool:
        """Whether rows are known to be what the module gives in the batch that they make up now."""
        return self.mixed >= ENOUGH or (self.same >= ENOUGH and self.are_together(found))

    def are_together(self, found: Sequence[Entry | None]) -> bool:
        """Whether rows are those of one batch, in its order."""
        first = found[0].batch if found[0] is not None else 0
        return all(e is not None and e[:3] == (first, place, self.size) for place, e in enumerate(found))


@dataclass
class Family:
    """What is known of calls that have all in common but samples and the size of the batch.

    Args:
        batches: By size.
        proven: In which fits rows were computed that were seen to be right.
        probes: Sizes that were tried, and how often.
        answers: Batches answered from memory.
        next_proof: The one that is computed all the same.
    """

    batches: dict[int, Batches] = field(default_factory=dict)
    proven: set[int] = field(default_factory=set)
    probes: Counter[tuple[int, int]] = field(default_factory=Counter)
    answers: int = 0
    next_proof: int = _FIRST_PROOF

    def serves(self, batches: Batches, found: Sequence[Entry | None]) -> bool:
        """Whether rows may be the answer."""
        if not batches.trusts(found) or not {e.batch >> 32 for e in found if e is not None} <= self.proven:
            return False
        self.answers += 1
        if self.answers < self.next_proof:
            return True
        self.next_proof *= _RARER
        return False

    def _unite(self, one: Batches, other: Batches) -> None:
        """Let the rows of two sizes serve each other."""
        like = one.like | other.like
        for batches in (self.batches[size] for size in like):
            batches.like = like
            batches.same, batches.mixed = max(batches.same, one.same), max(batches.mixed, one.mixed)

    def next_probe(self, batches: Batches) -> Batches | None:
        """Return batches of a smaller size that occurs, too, and may have the same bits."""
        known = max(batches.same, batches.mixed) >= ENOUGH
        smaller = [one for one in self.batches.values() if known and one.size < batches.size and one.form is not None]
        smaller = [one for one in smaller if one.size not in batches.like]
        smaller = [one for one in smaller if self.probes[batches.size, one.size] < _MOST_PROBES]
        other = max(smaller, key=lambda one: one.runs, default=None)
        if other is None or self.probes.total() >= _MOST_PROBES**2:
            return None
        self.probes[batches.size, other.size] += 1
        return other

    def take_in_probe(self, batches: Batches, other: Batches, numbers: int) -> None:
        """Note that so many numbers of both sizes are equal; less than none if one was not."""
        if numbers < 0:
            self.probes[batches.size, other.size] = _MOST_PROBES
        elif numbers >= ENOUGH:
            self._unite(batches, other)
