"""Answers a module's calls from rows where every sample of a batch is known, and proves that these are the same bits.

The size of the batch is in the key, so that an output is a memory image of its rows. What is left is looked at: the
first batch that comes back is computed and compared, and the first that is put together anew, then ever fewer. A short
batch is computed in the usual size, too, so that its samples are known in that when they come back; if all bits are
equal, both sizes serve each other, but never in half precision, whose rounding hides where kernels differ.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_freeze.feature_cache.effects import generators, marks_of
from lightning_freeze.feature_cache.folder import FolderRows
from lightning_freeze.feature_cache.interceptor import tree_leaves
from lightning_freeze.feature_cache.keys import Keys, NotPerSample, is_half
from lightning_freeze.feature_cache.outputs import difference, encode
from lightning_freeze.feature_cache.proof import ENOUGH, Batches, Family
from lightning_freeze.feature_cache.rows import Entry, MemoryRows
from lightning_freeze.feature_cache.state import State
from lightning_freeze.feature_cache.stats import Counts

Rows: TypeAlias = MemoryRows | FolderRows

_ROUNDING = 16  # machine epsilons, of the largest number, by which a kernel may differ from itself
_KEPT_STATES, _MOST_STATES, _MOST_PADS = 4, 8, 4


@dataclass
class Call:
    """One call of a module."""

    keys: Keys
    # With a number, on so many samples, of which some are there twice; the output, and the tensors that were given.
    run: Callable[[int | None], tuple[Any, Sequence[Tensor]]]
    given: Sequence[Tensor]
    states: Sequence[State]  # of the module and of those before it in a chain: what outputs depend on beside arguments
    counts: Counts  # what has been done in this stage

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(self.keys.samples)


class Memory:
    """Remembers what a module gave for each sample."""

    def __init__(self, rows: Rows, dtype: torch.dtype | None, say: Callable[[str], None]) -> None:
        self.broken: str | None = None
        self._rows, self._dtype, self._say = rows, dtype, say
        self._states: dict[bytes, dict[bytes, Family]] = {}
        self._moves = 0  # states since the last answer
        self._batch = secrets.randbits(31) << 32

    def answer(self, call: Call) -> Any:
        """Return the output, from memory if every sample is known."""
        batches = self._batches(call)
        if self.broken is not None:
            return call.run(None)[0]
        found = self._find(call, batches)
        there = call.size - found.count(None)
        call.counts.known += there
        if there < call.size or not batches.are_served(found):
            return self._compute(call, batches, found)
        call.counts.hits += call.size
        self._moves = 0
        batches.write()
        form: Any = batches.form
        return form.decode(self._rows.read(found, form.tensors[0].device), call.given)  # type: ignore[arg-type]

    def refuse(self, counts: Counts, reason: NotPerSample) -> None:
        """Note that such calls are not cached, and why."""
        counts.refused = str(reason)
        self._say(f"such calls are not cached: {reason}.")

    def close(self, *, keep: int = 0) -> None:
        """Forget everything but what was given in so many states, the last that were asked for."""
        while len(self._states) > keep:
            for family in self._states.pop(next(iter(self._states))):
                self._rows.free(family)

    def _batches(self, call: Call) -> Batches:
        state = call.states[-1].key
        if state not in self._states:
            self._moves += 1
            call.counts.restart()
            if self._moves > _MOST_STATES:
                self._break("its weights or attributes are written to again and again")
            self.close(keep=_KEPT_STATES - 1)
        families = self._states[state] = self._states.pop(state, {})
        family = families.setdefault(call.keys.family, Family({self._batch >> 32}))
        return family.batches.setdefault(call.size, Batches(family, call.size))

    def _find(self, call: Call, batches: Batches) -> list[Entry | None]:
        if batches.form is None:
            return [None] * call.size
        find = partial(self._rows.find, call.keys.family, call.keys.samples, row_bytes=batches.row_bytes)
        found = find(batches.size)
        for size in batches.sizes - {batches.size} if None in found else ():
            found = [one or other for one, other in zip(found, find(size), strict=True)]
        return batches.family.right(found)

    def _compute(self, call: Call, batches: Batches, found: list[Entry | None]) -> Any:
        marks, numbers = marks_of(call.given, call.states[-1].hashing), generators(call.given, call.states)
        begin = time.perf_counter()
        output, given = call.run(None)
        call.counts.run_seconds += time.perf_counter() - begin
        call.counts.misses += call.size
        if marks_of(call.given, call.states[-1].hashing) != marks:
            return self._break("it writes into what it is given", output)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            why = "what it gives requires grad though no parameter in it does: something else trains with it"
            return self._break(why, output)
        if generators(call.given, call.states) != numbers:
            return self._break("it draws random numbers", output)
        for state in call.states:
            if effect := state.parts.attributes.effect(batches.written, is_first=batches.form is None):
                return self._break(effect, output)
        try:
            form, rows = encode(output, call.size, self._dtype, given)
        except NotPerSample as reason:
            self.refuse(call.counts, reason)
            return output
        if self._dtype is not None:
            rounded = form.decode(rows.clone(), given)
            if difference(output, rounded) == math.inf:
                return self._break(f"what it gives is too large for {self._dtype}", output)
            output = rounded
        if batches.form is None:
            batches.form, batches.row_bytes = form, rows.shape[1]
            found = self._find(call, batches)
        elif form != batches.form:
            return self._break("the shape of what it gives, or a plain value in it, depends on the batch", output)
        found = self._compare(call, batches, found, rows)
        if self.broken is None:
            self._keep(call, rows, found)
            self._pad(call, batches, rows)
        return output

    def _compare(self, call: Call, batches: Batches, found: list[Entry | None], rows: Tensor) -> list[Entry | None]:
        """Learn from samples that were there before and have been computed again; return those that are right."""
        family, entries = batches.family, {i: entry for i, entry in enumerate(found) if entry is not None}
        if not entries:
            return found
        old = rows.clone()
        old[list(entries)] = self._rows.read(list(entries.values()), rows.device)
        same = (old == rows).all(1).tolist()
        if wrong := {entry.fit for i, entry in entries.items() if not same[i]} - family.proven:
            self._say("features of an earlier fit are not what it gives now, and are computed anew.")
            family.wrong |= wrong
            return family.right(found)
        family.proven |= {entry.fit for entry in entries.values()}
        is_again = batches.are_together(found)
        if not all(same):
            self._note_difference(call, batches, old, rows, is_again=is_again)
        numbers = _numbers(rows[list(entries)])
        if is_again:
            batches.same += numbers
        else:
            batches.mixed += numbers
        return found

    def _note_difference(self, call: Call, batches: Batches, old: Tensor, new: Tensor, *, is_again: bool) -> None:
        """Say by how much two computations of the same differ; if not as kernels do, nothing is remembered any more."""
        form: Any = batches.form
        worst = difference(form.decode(old, call.given), form.decode(new, call.given))
        call.counts.difference = max(call.counts.difference, worst)
        epsilons = [torch.finfo(one.dtype).eps for one in form.tensors if one.dtype.is_floating_point]
        rounding = f"differ by rounding, up to {worst:.1e} of the largest"
        if worst > min(0.01, _ROUNDING * max(epsilons, default=0.0)):
            self._break(
                f"it gave other outputs for samples that had been there before, by {worst:.1e} of the largest: "
                "they are random, depend on the batch, or come from code that has changed"
            )
        elif is_again:
            self._say(f"outputs for the same batch {rounding}; those computed first are kept.")
        else:
            batches.mixed = -math.inf
            call.counts.refused = f"outputs for the same samples in other places of a batch {rounding}"
            self._say(f"{call.counts.refused}: only whole batches are answered.")

    def _pad(self, call: Call, batches: Batches, rows: Tensor) -> None:
        """Compute a short batch in the size of others, too, and find out whether its bits are the same there."""
        family = batches.family
        largest = max((one for one in family.batches.values() if one.form is not None), key=lambda one: one.size)
        form: Any = largest.form
        if largest.size in batches.sizes or family.pads >= _MOST_PADS:
            return
        weights = [tensor for state in call.states for tensor in state.parts.tensors]
        narrowest = min(min(one.dtype.itemsize, one.stored.itemsize) for one in form.tensors)
        if call.keys.is_rounded or any(map(is_half, weights)) or narrowest < 4:
            batches.alike = -math.inf  # rounding hides where kernels differ
        found = self._find(call, largest)
        if batches.alike < 0 and None not in found:
            return
        family.pads += 1
        with suppress(Exception):  # nobody but us has asked for such a batch
            output, given = call.run(largest.size)
            padded_form, padded = encode(output, largest.size, self._dtype, given)
            if padded_form == form:
                self._keep(call, padded, found)
                batches.alike += _numbers(rows) if torch.equal(padded[: call.size], rows) else -math.inf
                family.alike |= {batches.size, largest.size} if batches.alike >= ENOUGH else set()
        batches.write()

    def _keep(self, call: Call, rows: Tensor, found: list[Entry | None]) -> None:
        """Keep the rows of samples that are not there."""
        new = [i for i, entry in enumerate(found) if entry is None]
        self._batch += 1
        kept = self._rows.put(call.keys.family, call.keys.samples, self._batch, rows, new) if new else 0
        call.counts.left_out += len(new) - kept
        if self._rows.error is not None and not self._rows.count:
            self._break(f"the folder cannot be written to: {self._rows.error}")
        elif self._rows.error is not None:
            self._say(
                f"the folder cannot be written to ({self._rows.error}): what was there serves on, and the rest is "
                "computed."
            )
        elif kept < len(new):
            self._say(
                f"the cache is full with {self._rows.count:,} samples in {self._rows.bytes_taken:,} "
                f"bytes; what is not all in it is computed. More max_bytes, {self._rows.remedy} would make room."
            )

    def _break(self, why: str, output: Any = None) -> Any:
        self.broken = why
        self.close()
        self._say(f"off, because {why}.")
        return output


def _numbers(rows: Tensor) -> int:
    """Return how many numbers there are, about; zeros are equal everywhere."""
    return int(torch.count_nonzero(rows)) // 4
