"""A memory of outputs: a sample that was there before gets what it got then, bit for bit.

The bits of an output can depend on the circumstances, above all on the size of the batch, because kernels are chosen by
shape. So each row is kept with a mark of its circumstances, and serves others only after both were seen to give the
same bits for the same samples. That holds for the same circumstances, too: the first samples that come back are
computed a second time, and the first that come back in the company of others, which shows a module that is random or
looks at the whole batch. Later on that is repeated ever more seldom.
"""

from __future__ import annotations

import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from operator import is_
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_freeze.feature_cache.features import (
    Bytes,
    Call,
    NotPerSample,
    OutputForm,
    TensorForm,
    encode,
    read_call,
    tensor_digest,
)
from lightning_freeze.feature_cache.interceptor import Run
from lightning_freeze.feature_cache.state import Weights
from lightning_freeze.feature_cache.stores import Budget, Damaged, Folder, Shelf, Slots

_ENOUGH = 256  # numbers that have to be equal, over all comparisons, before two circumstances count as alike
_ROUNDING = 16  # machine epsilons, of the largest number, by which a kernel may differ from itself
_FIRST_PROOF, _RARER = 128, 4  # the batch answered from memory that is computed all the same, and the growth of that
_MOST_FORMS = 512
_MOST_WRITES = 8


@dataclass
class Counts:
    """What has been done.

    Args:
        hits: Samples whose output was there.
        misses: Samples whose output was computed.
        known: Samples that had been there before, whether or not what was there could serve.
        run_seconds: Time in the module for the misses.
        all_seconds: Time in all, keys and checks included.
        difference: The largest difference between two computations of the same, in parts of the largest number.
    """

    hits: int = 0
    misses: int = 0
    known: int = 0
    run_seconds: float = 0.0
    all_seconds: float = 0.0
    difference: float = 0.0

    @property
    def seconds_saved(self) -> float:
        """Time that computing the hits would have taken, less what keys, checks and copies took."""
        if self.misses == 0:
            return 0.0
        return self.hits * self.run_seconds / self.misses - (self.all_seconds - self.run_seconds)


@dataclass
class _Form:
    """Outputs for arguments of one form.

    Args:
        form: Of the outputs.
        shelf: Their bytes.
        inherited: Whether rows are there that come from another fit or run, and none of them has been proved yet.
        rounds: Whether numbers are rounded to half precision on the way, which hides most of what circumstances change:
            that some were seen to be equal then says nothing of the others.
        equal: For two marks, how many numbers were seen to be equal in both; -1 after one that was not.
        mixed: For each mark, how many numbers were seen to be equal in batches that were put together anew.
        begins: The first slots of batches that were kept whole.
        fits: For each mark, whether outputs had this form.
    """

    form: OutputForm
    shelf: Shelf
    inherited: bool
    rounds: bool
    equal: dict[tuple[int, int], int] = field(default_factory=dict)
    mixed: dict[int, int] = field(default_factory=dict)
    begins: set[int] = field(default_factory=set)
    fits: dict[int, bool] = field(default_factory=dict)

    def alike(self, a: int, b: int) -> bool:
        """Whether the bits of two circumstances are the same."""
        return not self.unlike(a, b) and self.equal.get((min(a, b), max(a, b)), 0) >= _ENOUGH

    def unlike(self, a: int, b: int) -> bool:
        """Whether they have been seen to differ, or may do so unseen."""
        return (self.rounds and a != b) or self.equal.get((min(a, b), max(a, b)), 0) < 0

    def note(self, a: int, b: int, numbers: int) -> None:
        """Take in that so many numbers were equal, or, if negative, that one was not."""
        pair = min(a, b), max(a, b)
        if numbers < 0 or self.equal.get(pair, 0) < 0:
            self.equal[pair] = -1
        else:
            self.equal[pair] = self.equal.get(pair, 0) + numbers

    def usable(self, slots: Slots, mark: int) -> NDArray[np.bool_]:
        """Give which of the slots may serve under ``mark``."""
        usable = slots >= 0
        if usable.any():
            marks = self.shelf.marks[slots]
            for other in {*marks.tolist()}:
                if not self.alike(other, mark):
                    usable &= marks != other
        return usable

    def trusts(self, slots: Slots, mark: int) -> bool:
        """Whether samples that were in other batches are known to have given the same, or these were in one batch."""
        return self.mixed.get(mark, 0) >= _ENOUGH or self.are_together(slots)

    def are_together(self, slots: Slots) -> bool:
        """Whether the slots are those of one batch, in its order."""
        return int(slots[0]) in self.begins and bool((np.diff(slots) == 1).all())

    def look_apart(self, keys: list[bytes], slots: Slots, mark: int) -> bool:
        """Where what is there is known to differ under ``mark``, look under a key of its own; give whether any is."""
        if not (slots >= 0).any():
            return False
        marks = self.shelf.marks[slots].tolist()
        apart = [i for i, slot in enumerate(slots.tolist()) if slot >= 0 and self.unlike(marks[i], mark)]
        for i in apart:
            keys[i] = xxhash.xxh3_128_digest(keys[i] + mark.to_bytes(8, "little"))
        if apart:
            slots[apart] = self.shelf.find([keys[i] for i in apart])
        return bool(apart)


class FeatureMemory:
    """Remembers what a module, or several one after the other, gave for each sample.

    Args:
        name: How the modules are called in sentences.
        weights: What outputs depend on beside arguments.
        structure: Text that tells modules with the same weights apart.
        budget: Where memory is taken from, or space on disk.
        counts: What has been done, to be added to.
        folder: Keep rows there, not in memory.
        dtype: Keep wider floating numbers in this dtype; outputs are rounded to it, whether remembered or not.
        say: Is given sentences about what is not remembered and why.

    Example:
        >>> net = torch.nn.Linear(2, 100).requires_grad_(False)
        >>> memory = FeatureMemory("net", Weights([net]), budget=Budget(1_000_000))
        >>> x = torch.randn(4, 2)
        >>> first, second, third = (memory.recall(net.forward, memory.read((x,), {})) for _ in range(3))
        >>> torch.equal(first, third), memory.counts.hits, memory.counts.misses
        (True, 4, 8)
    """

    def __init__(
        self,
        name: str,
        weights: Weights,
        *,
        structure: str = "",
        budget: Budget,
        counts: Counts | None = None,
        folder: Folder | None = None,
        dtype: torch.dtype | None = None,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.broken: str | None = None
        self.refused: str | None = None
        self.counts = counts or Counts()
        self.weights = weights
        self.name = name
        self._structure = structure
        self._budget = budget
        self._folder = folder
        self._dtype = dtype
        self._say = say
        self._forms: dict[str, _Form] = {}
        self._writes = 0
        self._rests = b""
        self._suspicious = False
        self._runs: Counter[tuple[Any, ...]] = Counter()
        self._answered, self._next_proof = 0, _FIRST_PROOF

    @property
    def rows(self) -> int:
        """The number of samples kept."""
        return sum(len(form.shelf) for form in self._forms.values())

    @property
    def size(self) -> int:
        """The bytes that they take."""
        return sum(form.shelf.size for form in self._forms.values())

    def suspect(self) -> None:
        """Read all weights at the next check, to see also what was written through ``tensor.data``."""
        self._suspicious = True

    def check(self) -> bool:
        """Forget everything if weights have changed; give whether they have."""
        changed = self.weights.changed() or (self._suspicious and self.weights.content_changed())
        self._suspicious = False
        if not changed:
            return False
        self.close()
        self.weights.take()
        self._writes += 1
        if self._writes >= _MOST_WRITES:
            self._break("its weights are written to again and again")
        return True

    def refresh(self) -> None:
        """Let other ranks that use the same folder see the rows of this one, and see theirs."""
        for form in self._forms.values():
            form.shelf.refresh()
            self._say_error(form.shelf)

    def rest(self) -> None:
        """Let go of the weights, not of what was remembered with them."""
        self._rests = self.weights.fingerprint()
        self.weights = Weights([])

    def wake(self, weights: Weights, structure: str, say: Callable[[str], None]) -> bool:
        """Go on if weights and structure are the same; give whether they are. What is kept has to prove itself anew."""
        if structure != self._structure or weights.fingerprint() != self._rests:
            return False
        self.weights, self._say, self._writes = weights, say, 0
        for form in self._forms.values():
            form.inherited = True
            form.equal.clear()
            form.mixed.clear()
            form.begins.clear()
        return True

    def close(self) -> None:
        """Forget everything; what lies in a folder stays there, under the weights it belongs to."""
        for form in self._forms.values():
            is_used = len(form.shelf) > 0
            form.shelf.close()
            if is_used:
                self._say_error(form.shelf)
        self._forms.clear()

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Give a call as :meth:`recall` takes it, None if its samples cannot be told apart or need a gradient."""
        try:
            call = read_call(args, kwargs)
            if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in call.leaves):
                raise NotPerSample("its input requires grad")
        except NotPerSample as reason:
            self._say(f"{self.name}: such calls are not cached: {reason}.")
            return None
        return call

    def recall(self, run: Run, call: Call, modes: tuple[Any, ...] = (), program: str = "") -> Any:
        """Give the output for a call, running the modules only on samples that were not there before.

        Args:
            run: The modules.
            call: What :meth:`read` gave.
            modes: Whatever else the bits could depend on.
            program: What is remembered under one does not serve under another.
        """
        return self._answer(call, run, (call.size, torch.is_grad_enabled(), *modes), program)

    def _answer(self, call: Call, run: Run, circumstances: tuple[Any, ...], program: str) -> Any:
        text = f"{_context(call)}|{call.form}{program}"
        form = self._forms.get(text)
        mark = _mark(call.size, circumstances)
        keys = call.keys()
        if form is None:
            return self._begin(call, keys, run, mark, circumstances, text)
        slots = form.shelf.find(keys)
        self.counts.known += int(np.count_nonzero(slots >= 0))
        usable = form.usable(slots, mark)
        if not usable.all() and form.look_apart(keys, slots, mark):
            usable = form.usable(slots, mark)
        missing = call.size - int(np.count_nonzero(usable))
        trusted = missing < call.size and form.trusts(slots[usable], mark)
        if missing == 0 and trusted and not self._is_proof_due():
            self.counts.hits += call.size
            return form.form.decode(torch.from_numpy(form.shelf.read(slots)))
        if 0 < 2 * missing <= call.size and trusted:
            output = self._part(call, keys, run, mark, form, slots, usable, circumstances)
            if output is not None:
                return form.form.decode(output)
        output, rows = self._whole(call, run, form, mark, circumstances)
        if rows is not None:
            if not self._compare(form, slots, rows, mark):
                self._disown(text, form)
            elif self.broken is None:
                if 0 < 2 * missing <= call.size:
                    self._probe(call, run, form, rows, mark, circumstances, missing)
                self._keep(form, keys, slots, rows, mark)
        return output

    def _begin(
        self, call: Call, keys: list[bytes], run: Run, mark: int, circumstances: tuple[Any, ...], text: str
    ) -> Any:
        """Run on the first batch of its form."""
        output, encoded = self._run(call, run, circumstances)
        if encoded is None:
            return output
        if len(self._forms) >= _MOST_FORMS:
            self._say(f"{self.name}: only {_MOST_FORMS} forms of arguments are cached, and there are more.")
            return output
        outputs, rows = encoded
        try:
            shelf = self._shelf(text, outputs)
        except OSError as error:
            shelf = Shelf(outputs.row_bytes, Budget(0))
            shelf.error = error
        form = self._forms[text] = _Form(outputs, shelf, len(shelf) > 0, _rounds(call, outputs), fits={mark: True})
        slots = shelf.find(keys)
        self.counts.known += int(np.count_nonzero(slots >= 0))
        if not self._compare(form, slots, rows, mark):
            self._disown(text, form)
        elif self.broken is None:
            self._keep(form, keys, slots, rows, mark)
        return output

    def _is_proof_due(self) -> bool:
        """Whether to compute a batch although it is there."""
        self._answered += 1
        if self._answered < self._next_proof:
            return False
        self._next_proof *= _RARER
        return True

    def _disown(self, text: str, form: _Form) -> None:
        """Forget what another fit or run has left."""
        del self._forms[text]
        form.shelf.discard()
        self._say(f"{self.name}: features of an earlier fit are not what it gives now, and are computed anew.")

    def _whole(
        self, call: Call, run: Run, form: _Form, mark: int, circumstances: tuple[Any, ...]
    ) -> tuple[Any, Bytes | None]:
        """Run on the whole batch, as it would have been without a memory."""
        output, encoded = self._run(call, run, circumstances)
        if encoded is None:
            return output, None
        fits = encoded[0] == form.form
        if form.fits.setdefault(mark, fits) != fits:
            self._break("the shape of what it gives, or a plain value in it, depends on the batch")
            return output, None
        return output, encoded[1] if fits else None

    def _run(
        self, call: Call, run: Run, circumstances: tuple[Any, ...], picked: list[int] | None = None
    ) -> tuple[Any, tuple[OutputForm, Bytes] | None]:
        """Run; give the output, rounded if a dtype asks for it, and its rows unless they must not be kept.

        Args:
            call: The call.
            run: The modules.
            circumstances: What :meth:`recall` has been given, and the like.
            picked: The samples to run on; all if not given.
        """
        size = call.size if picked is None else len(picked)
        args, kwargs = _whole_args(call) if picked is None else call.pick(picked)
        # In its first run a module may set up what it keeps for good.
        second = self._runs[circumstances[1:]] == 1
        self._runs[circumstances[1:]] += 1
        before = SideEffects((args, kwargs), self.weights if second else None)
        begin = time.perf_counter()
        output = run(*args, **kwargs)
        self.counts.run_seconds += time.perf_counter() - begin
        self.counts.misses += size
        if effect := before.found(output):
            self._break(effect)
            return output, None
        try:
            form, rows = encode(output, size, self._dtype)
        except NotPerSample as reason:
            self.refused = str(reason)
            self._say(f"{self.name}: such calls are not cached: {reason}.")
            return output, None
        if any(isinstance(leaf, TensorForm) and leaf.stored != leaf.dtype for leaf in form.leaves):
            rounded = form.decode(torch.from_numpy(rows.copy()))
            if _fits(output, rounded):
                return rounded, (form, rows)
            self._break(f"what it gives is too large for {self._dtype}")
            return output, None
        return output, (form, rows)

    def _part(
        self,
        call: Call,
        keys: list[bytes],
        run: Run,
        mark: int,
        form: _Form,
        slots: Slots,
        usable: NDArray[np.bool_],
        circumstances: tuple[Any, ...],
    ) -> Tensor | None:
        """Run on what is missing, filled up to a size that is known to give the same bits; None if there is none."""
        missing = np.flatnonzero(~usable)
        size = next(
            (s for s in _sizes(len(missing), call.size) if form.alike(_mark(s, circumstances), mark)),
            None,
        )
        if size is None:
            return None
        picked = np.resize(missing, size).tolist()
        _, encoded = self._run(call, run, circumstances, picked)
        if encoded is None or encoded[0] != form.form:
            return None
        self.counts.misses -= size - len(missing)
        self.counts.hits += call.size - len(missing)
        rows = np.empty((call.size, form.form.row_bytes), np.uint8)
        rows[usable] = form.shelf.read(slots[usable])
        rows[missing] = encoded[1][: len(missing)]
        self._keep(form, keys, slots, rows, mark)
        return torch.from_numpy(rows)

    def _probe(
        self,
        call: Call,
        run: Run,
        form: _Form,
        rows: Bytes,
        mark: int,
        circumstances: tuple[Any, ...],
        missing: int,
    ) -> None:
        """Find out whether a smaller batch would have given the same bits."""
        for size in _sizes(missing, call.size):
            small = _mark(size, circumstances)
            if form.unlike(small, mark):
                continue
            before = self.counts.misses
            try:
                with torch.random.fork_rng():
                    _, encoded = self._run(call, run, circumstances, list(range(size)))
            except Exception:  # nobody but us has asked for such a batch
                form.note(small, mark, -1)
                return
            finally:
                self.counts.misses = before
            if encoded is not None and encoded[0] == form.form:
                same = np.array_equal(encoded[1], rows[:size])
                form.note(small, mark, _numbers(encoded[1]) if same else -1)
            return

    def _compare(self, form: _Form, slots: Slots, rows: Bytes, mark: int) -> bool:
        """Learn from samples that were there before and have been computed again.

        Returns:
            False if that shows that rows from another fit or run are not those of these modules.
        """
        found = np.flatnonzero(slots >= 0)
        if not len(found):
            return True
        kept = form.shelf.read(slots[found])
        same = (kept == rows[found]).all(axis=1)
        marks = form.shelf.marks[slots[found]]
        for other in {*marks.tolist()}:
            here = marks == other
            equal = bool(same[here].all())
            if not equal and other == mark:
                difference, allowed = _difference(form.form, kept[here], rows[found][here])
                equal = difference <= allowed
                if not equal and form.inherited:
                    return False
                self._note_difference(difference, equal)
                if not equal:
                    return True
            form.inherited = form.inherited and not equal
            form.note(other, mark, _numbers(rows[found][here]) if equal else -1)
        if same.all() and not form.are_together(slots[found]):
            form.mixed[mark] = form.mixed.get(mark, 0) + _numbers(rows[found])
        return True

    def _note_difference(self, difference: float, is_rounding: bool) -> None:
        """Say by how much two computations of the same differ; if not as kernels do, nothing is remembered any more."""
        self.counts.difference = max(self.counts.difference, difference)
        if is_rounding:
            self._say(
                f"{self.name}: the same samples in other places of a batch give outputs that differ by rounding, up to "
                f"{difference:.1e} of the largest; those computed first are kept."
            )
        else:
            self._break(
                f"it gave other outputs for samples that had been there before, by {difference:.1e} of the largest: "
                "they are random, depend on the batch, or come from code that has changed"
            )

    def _keep(self, form: _Form, keys: list[bytes], slots: Slots, rows: Bytes, mark: int) -> None:
        """Keep the rows of new samples."""
        new = slots < 0
        if new.all():
            kept = form.shelf.put(keys, mark, rows)
            form.begins.update(form.shelf.find(keys[:1]).tolist())
        elif new.any():
            kept = form.shelf.put(list(compress(keys, new)), mark, rows[new])
        else:
            return
        if form.shelf.error is not None and not self.rows:
            self._break(f"the folder cannot be written to: {form.shelf.error}")
        elif form.shelf.error is not None:
            self._say_error(form.shelf)
        elif kept < np.count_nonzero(new):
            mends = "or dtype=torch.float16,"
            if self._folder is not None:
                mends = "dtype=torch.float16, or removing features of other weights from the folder"
            self._say(
                f"{self.name}: the cache is full with {self.rows:,} samples in {self.size:,} bytes; what is "
                f"not in it is computed. More max_bytes, {mends} would make room."
            )

    def _shelf(self, text: str, form: OutputForm) -> Shelf:
        if self._folder is None:
            return Shelf(form.row_bytes, self._budget)
        identity = f"{self._structure}|{self._dtype}|{text}|{form}|{torch.__version__}|{_machine()}"
        journal = self._folder.journal(self.weights.fingerprint(), xxhash.xxh3_128_digest(identity.encode()))
        try:
            return Shelf(form.row_bytes, self._budget, journal)
        except Damaged as reason:
            self._say(f"{self.name}: features of an earlier run are refused, and computed anew: {reason}.")
            journal.delete()
            return Shelf(form.row_bytes, self._budget, journal)

    def _say_error(self, shelf: Shelf) -> None:
        if shelf.error is not None:
            self._say(
                f"the folder cannot be written to ({shelf.error.strerror}): what was there serves on, and the rest is "
                "computed."
            )

    def _break(self, why: str) -> None:
        self.broken = why
        self.close()


class SideEffects:
    """Sees what a run does beside giving an output, which would be missing where the output comes from memory.

    Args:
        given: All that the run is given.
        weights: Of the modules, to see what they keep aside; None to leave that out.

    Example:
        >>> x = torch.zeros(2)
        >>> before = SideEffects(x, None)
        >>> before.found(torch.nn.functional.dropout(x))
        'it draws random numbers'
    """

    def __init__(self, given: Any, weights: Weights | None) -> None:
        self._given = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        self._weights = weights
        self._written = self._read_given()
        self._generators = self._read_generators()
        self._aside = weights.aside() if weights is not None else {}

    def found(self, output: Any) -> str | None:
        """Say what has happened, None if nothing has."""
        if self._written != self._read_given():
            return "it writes into what it is given"
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            return "what it gives requires grad though no parameter in it does: something else trains with it"
        if self._generators != self._read_generators():
            return "it draws random numbers"
        for name, tensors in (self._weights.aside() if self._weights is not None else {}).items():
            before = self._aside.get(name, [])
            if len(before) != len(tensors) or not all(map(is_, before, tensors)):
                return f"it puts what it computes into {name}, too, where others could look for it"
        return None

    def _read_given(self) -> list[int | bytes]:
        # Tensors made in inference mode do not count what is written to them.
        return [tensor_digest(leaf) if leaf.is_inference() else leaf._version for leaf in self._given]

    def _read_generators(self) -> tuple[Any, ...]:
        devices = {leaf.device for leaf in self._given if leaf.device.type == "cuda"}
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        legacy: Any = np.random.get_state()
        name, numbers, *rest = legacy
        return [state.numpy().tobytes() for state in states], random.getstate(), name, numbers.tobytes(), rest


def _whole_args(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.spec)
    return args, kwargs


def _sizes(missing: int, size: int) -> list[int]:
    """Give batch sizes that hold what is missing and take much less time than the whole batch."""
    sizes = [1 << k for k in range(missing.bit_length() + 4) if missing <= 1 << k]
    return [s for s in sizes if 4 * s <= 3 * size]


@lru_cache(maxsize=4096)
def _mark(size: int, circumstances: tuple[Any, ...]) -> int:
    return xxhash.xxh3_64_intdigest(repr((size, *circumstances[1:])).encode())


def _numbers(rows: Bytes) -> int:
    """Give how many numbers that say something there are, about: zeros are equal everywhere."""
    return int(np.count_nonzero(rows)) // 4


def autocast_states(leaves: Iterable[Any]) -> list[tuple[str, bool, torch.dtype]]:
    """Give each kind of device among the tensors, and the CPU, with whether autocast is on there and its dtype."""
    kinds = sorted({"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))})
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def _rounds(call: Call, outputs: OutputForm) -> bool:
    """Whether something is rounded to less than 32 bits on the way from a call to what is kept of its outputs."""
    dtypes = {leaf.dtype for leaf in call.leaves if isinstance(leaf, Tensor)}
    dtypes |= {dtype for leaf in outputs.leaves if isinstance(leaf, TensorForm) for dtype in (leaf.dtype, leaf.stored)}
    half = any(dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize for dtype in dtypes)
    return half or any(is_on for _, is_on, _ in autocast_states(call.leaves))


def _context(call: Call) -> str:
    """Give, as text, the settings that outputs depend on."""
    autocast = [(kind, dtype) for kind, is_on, dtype in autocast_states(call.leaves) if is_on]
    return (
        f"{autocast}{torch.get_default_dtype()}{torch.get_float32_matmul_precision()}{torch.get_num_threads()}"
        f"{torch.are_deterministic_algorithms_enabled()}"
    )


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {device}"


def _fits(output: Any, rounded: Any) -> bool:
    """Whether rounding has made no number infinite."""
    pairs = zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(rounded), strict=True)
    return all(
        not isinstance(a, Tensor) or not a.is_floating_point() or torch.equal(a.isfinite(), b.isfinite())
        for a, b in pairs
    )


def _difference(form: OutputForm, a: Bytes, b: Bytes) -> tuple[float, float]:
    """Give the largest difference in parts of the largest number, and how much of that rounding can be."""
    worst, allowed = 0.0, 0.0
    first, second = (torch.utils._pytree.tree_leaves(form.decode(torch.from_numpy(rows))) for rows in (a, b))
    for x, y in zip(first, second, strict=True):
        if not isinstance(x, Tensor) or torch.equal(x, y):
            continue
        if not x.is_floating_point() or not x.isfinite().all() or not y.isfinite().all():
            return float("inf"), 0.0
        largest = max(float(x.abs().max()), float(y.abs().max()))
        worst = max(worst, float((x.double() - y.double()).abs().max()) / largest)
        allowed = min(0.01, _ROUNDING * torch.finfo(x.dtype).eps)
    return worst, allowed
