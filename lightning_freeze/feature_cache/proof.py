"""What is known of a module's calls: whether rows may be the answer, by what has been computed a second time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_freeze.feature_cache.outputs import OutputForm
from lightning_freeze.feature_cache.rows import Entry

ENOUGH = 256  # numbers that have to be equal, over all comparisons, before bits count as the same
_FIRST_PROOF, _RARER = 128, 4  # the batch answered from memory that is computed all the same, and the growth of that
_MOST_PADS = 4  # batches that are computed in a larger size, too


@dataclass
class Batches:
    """What is known of batches of one size."""

    size: int
    form: OutputForm | None = None
    row_bytes: int = 0
    same: int = 0  # numbers that were equal when a batch was computed again
    mixed: int = 0  # and when samples were computed in another batch than before
    alike: int = 0  # and in a larger batch; less than none if one was not
    runs: int = 0

    def are_together(self, found: Sequence[Entry | None]) -> bool:
        """Whether rows are those of one batch, in its order."""
        first = found[0].batch if found[0] is not None else 0
        return all(e is not None and e[:3] == (first, place, self.size) for place, e in enumerate(found))


@dataclass
class Family:
    """What is known of calls that have all in common but samples and the size of the batch."""

    proven: set[int]  # fits whose rows were seen to be right
    batches: dict[int, Batches] = field(default_factory=dict)  # by size
    alike: set[int] = field(default_factory=set)  # sizes whose rows are the same, bit by bit, and serve each other
    pads: int = 0
    answers: int = 0
    next_proof: int = _FIRST_PROOF

    def serves(self, batches: Batches, found: Sequence[Entry | None]) -> bool:
        """Whether rows are known to be what the module gives in the batch that they make up now."""
        group = [self.batches[size] for size in self.alike] if batches.size in self.alike else [batches]
        is_mixed = any(one.mixed >= ENOUGH for one in group)
        if not is_mixed and not (batches.same >= ENOUGH and batches.are_together(found)):
            return False
        if not {entry.batch >> 32 for entry in found if entry is not None} <= self.proven:
            return False
        self.answers += 1
        if self.answers < self.next_proof:
            return True
        self.next_proof *= _RARER
        return False

    def larger(self, batches: Batches) -> Batches | None:
        """Return the largest batches, if these may be computed in their size, too."""
        largest = max((one for one in self.batches.values() if one.form is not None), key=lambda one: one.size)
        is_one = largest.size <= batches.size or {largest.size, batches.size} <= self.alike
        return None if is_one or self.pads >= _MOST_PADS else largest

    def compare(self, batches: Batches, other: Batches, numbers: int) -> None:
        """Note that so many numbers of both sizes are equal; less than none if one was not."""
        batches.alike = batches.alike + numbers if min(batches.alike, numbers) >= 0 else -1
        if batches.alike >= ENOUGH:
            self.alike |= {batches.size, other.size}
