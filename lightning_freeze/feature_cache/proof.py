"""What is known of a module's calls: whether rows may be the answer, by what has been computed a second time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_freeze.feature_cache.attributes import Known
from lightning_freeze.feature_cache.outputs import OutputForm
from lightning_freeze.feature_cache.rows import Entry

ENOUGH = 256  # numbers that have to be equal, over all comparisons, before bits count as the same
_FIRST_PROOF, _RARER = 128, 4  # the batch answered from memory that is computed all the same, and the growth of that


@dataclass
class Family:
    """What is known of calls that have all in common but samples and the size of the batch."""

    proven: set[int]  # fits whose rows were seen to be right
    wrong: set[int] = field(default_factory=set)  # and to be wrong, as its code has changed
    batches: dict[int, Batches] = field(default_factory=dict)  # by size
    alike: set[int] = field(default_factory=set)  # sizes whose rows are the same, bit by bit, and serve each other
    pads: int = 0
    answers: int = 0
    next_proof: int = _FIRST_PROOF

    def right(self, found: list[Entry | None]) -> list[Entry | None]:
        """Return entries without those that are wrong."""
        if self.wrong:
            return [None if entry is None or entry.fit in self.wrong else entry for entry in found]
        return found


@dataclass
class Batches:
    """What is known of batches of one size, by what has been computed a second time."""

    family: Family
    size: int
    form: OutputForm | None = None
    row_bytes: int = 0
    written: Known = field(default_factory=dict)
    same: int = 0  # numbers that were equal when a batch was computed again
    mixed: float = 0  # and when samples were computed in another batch than before; -inf if some were not
    alike: float = 0  # and in a larger batch; -inf if one was not

    @property
    def sizes(self) -> set[int]:
        """The sizes of batches whose rows serve these."""
        return self.family.alike if self.size in self.family.alike else {self.size}

    def are_together(self, found: Sequence[Entry | None]) -> bool:
        """Whether rows are those of one batch, in its order."""
        first = found[0].batch if found[0] is not None else 0
        return all(e is not None and e[:3] == (first, place, self.size) for place, e in enumerate(found))

    def write(self) -> None:
        """Put into attributes what a run would have put there."""
        for (owner, name), (one, value, _) in self.written.items():
            if one.is_same:
                setattr(owner, name, value)

    def are_served(self, found: Sequence[Entry | None]) -> bool:
        """Whether rows are known to be what the module gives in the batch that they make up now."""
        family, mixed = self.family, [self.family.batches[size].mixed for size in self.sizes]
        is_known = self.same >= ENOUGH and self.are_together(found)
        if not is_known and (max(mixed) < ENOUGH or min(mixed) < 0):
            return False
        if not {entry.fit for entry in found if entry is not None} <= family.proven:
            return False
        family.answers += 1
        is_proof = family.answers >= family.next_proof
        family.next_proof *= _RARER if is_proof else 1
        return not is_proof
