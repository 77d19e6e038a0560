"""Stands in front of modules and answers from memory, as far as they are frozen, and leaves nothing behind.

The modules are one whole, or links of a chain: each runs on what the one before gave, and may be given beside it what
the first link was given, such as a mask. Of a chain, as many links are remembered as are frozen from its start, and
what the last of them gave is kept.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.optim import Optimizer
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from lightning_freeze.feature_cache.features import is_plain, tensor_digest, why_no_key
from lightning_freeze.feature_cache.interceptor import Run, StandIn, is_compiled
from lightning_freeze.feature_cache.memory import Counts, FeatureMemory, autocast_states
from lightning_freeze.feature_cache.state import Conditions, Weights, structure_text, why_not_reusable
from lightning_freeze.feature_cache.stores import Budget, Folder

_WHOLE = -1
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
class _Look:
    """What can be remembered in one set of modes, which includes the program of modules that torch.fx made."""

    whole: bool
    depth: int
    why: str | None
    program: str = ""


@dataclass
class _Lane:
    """What the calls of one stage have come to, and for how many whole epochs something was known."""

    counts: Counts = field(default_factory=Counts)
    known: int = 0
    samples: int = 0
    epochs: int = 0
    off: str | None = None


@dataclass
class Kept:
    """What a chain leaves for another."""

    budget: Budget
    memories: dict[tuple[str, ...], FeatureMemory] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)


class _Given:
    """What the first link was given in one call, and the autocast state it ran in."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]) -> None:
        self.args, self.kwargs, self.leaves = args, kwargs, leaves
        self._tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self._versions = self._read_versions()
        self._autocast = autocast_states(leaves)

    def written(self) -> bool:
        """Whether something in it has been written to since. In inference mode that cannot be seen."""
        return self._versions != self._read_versions()

    def content(self) -> list[bytes | None]:
        """Give a hash of each tensor in it, None for those that no key can be made of."""
        return [tensor_digest(tensor) if why_no_key(tensor) is None else None for tensor in self._tensors]

    def other_autocast(self) -> bool:
        """Whether autocast is not what it was: what runs now is computed in another dtype."""
        return self._autocast != autocast_states(self.leaves)

    @contextmanager
    def circumstances(self) -> Iterator[None]:
        """Run with autocast as it was, and without gradients, which nothing that is frozen needs."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind, on, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on))
            yield

    def _read_versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors if not tensor.is_inference()]


@dataclass(frozen=True)
class _Beside:
    """What a link is given beside the output of the one before: tensors that the first link got, and plain values.

    Args:
        spec: How the leaves stand in ``(args, kwargs)``.
        leaves: For each the place among the first link's leaves, or -1; its type; and its value if that is plain.
    """

    spec: TreeSpec
    leaves: tuple[tuple[int, type, Any], ...]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], given: _Given) -> _Beside | None:
        """Describe arguments; None if they are not of this kind."""
        if not args and not kwargs:
            return _NOTHING
        flat, spec = tree_flatten((args, kwargs))
        leaves: list[tuple[int, type, Any]] = []
        for leaf in flat:
            place = next((i for i, known in enumerate(given.leaves) if known is leaf), -1)
            if not is_plain(leaf) and not (isinstance(leaf, Tensor) and place >= 0):
                return None
            leaves.append((-1, type(leaf), leaf) if is_plain(leaf) else (place, type(leaf), None))
        return _Beside(spec, tuple(leaves))

    def fill(self, given: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the arguments that are meant, out of those of the first link."""
        leaves = [value if place < 0 else given[place] for place, _, value in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


_NOTHING = _Beside(tree_flatten(((), {}))[1], ())


@dataclass
class _Watched:
    """What link ``index`` has just given, and all that the next one may be given with it."""

    index: int
    output: Tensor
    digest: bytes
    given: _Given
    content: list[bytes | None]


@dataclass
class _Answered:
    """A call whose output, that of link ``depth - 1``, is there already."""

    depth: int
    output: Any
    given: _Given
    memory: FeatureMemory


class FeatureChain:
    """Remembers what modules gave for each sample while they are frozen; see :class:`FeatureMemory`.

    Args:
        whole: The name and the module whose outputs are wanted; None for links alone.
        links: Modules that run one after the other, by name. If there is a whole, they are all that runs in it.
        limit: The most bytes to keep.
        folder: Keep them there, not in memory.
        dtype: Keep wider floating numbers in this dtype.
        kept: What another chain has left for this one; it has its own budget.
        stage: Gives what the calls are for now: whether samples come back is judged apart for training and validation.
        say: Is given each sentence about what is off and why, once.
        compiled_around: Whether the modules run in something that is compiled; see :class:`StandIn`.

    Raises:
        ValueError: When it is entered, if another chain stands in front of one of the modules.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 300), nn.ReLU()).requires_grad_(False)
        >>> x = torch.randn(4, 2)
        >>> with FeatureChain(("net", net), sequential_links("net", net), limit=100_000) as chain:
        ...     outputs = [net(x) for _ in range(3)]
        >>> torch.equal(outputs[0], outputs[2]), chain.stats().hits
        (True, 4)
        >>> "forward" in vars(net)
        False
    """

    def __init__(
        self,
        whole: tuple[str, nn.Module] | None,
        links: Mapping[str, nn.Module],
        *,
        limit: int,
        folder: Folder | None = None,
        dtype: torch.dtype | None = None,
        kept: Kept | None = None,
        stage: Callable[[], str] = lambda: "",
        say: Callable[[str], None] = lambda sentence: None,
        compiled_around: bool = False,
    ) -> None:
        self._whole = whole
        self._links = dict(links)
        self._names = list(links)
        self._folder = folder
        self._dtype = dtype
        self._stage = stage
        self._tell = say
        self._compiled_around = compiled_around
        self._said: set[str] = set()
        self._kept = kept or Kept(Budget(limit))
        self._budget = self._kept.budget
        self._lanes: defaultdict[str, _Lane] = defaultdict(_Lane)
        for stage_name, counts in self._kept.counts.items():
            done = counts.hits + counts.misses
            self._lanes[stage_name] = _Lane(counts, known=counts.known, samples=done)
        self._memories: dict[tuple[str, ...], FeatureMemory] = {}
        self._last: _Look | None = None
        self._stand_ins: list[StandIn] = []
        self._inside = False
        self._suspicious = False
        self._first = 0 if whole is None else _WHOLE
        self._called = False
        self._idle: str | None = None
        # How many links are known to run one on the output of the other; what the next one should get.
        self._follow = 1
        self._linked = len(self._links)
        self._watched: _Watched | None = None
        # The link that has given a stand-in last, that stand-in, and the call that both belong to.
        self._passed: tuple[int, Later, _Answered] | None = None
        # What stands for outputs between links, as far as somebody may still hold it.
        self._laters: list[weakref.ref[Later]] = []
        # What each link gets beside the output of the one before, as far as they are known to follow.
        self._beside: dict[int, _Beside] = {}
        if folder is not None:
            self._budget.used = folder.size()
        self._look_anew()

    def __enter__(self) -> FeatureChain:
        """Stand in front of the modules."""
        modules = [] if self._whole is None else [(_WHOLE, self._whole[1])]
        modules += list(enumerate(self._links.values()))
        try:
            for index, module in modules:
                call = partial(self._call, index)
                self._stand_ins.append(StandIn(module, call, compiled_around=self._compiled_around))
        except ValueError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Step aside; what is remembered stays until :meth:`close`."""
        self._passed = None
        self.settle()
        for stand_in in self._stand_ins:
            stand_in.remove()
        self._stand_ins = []
        self._watched = None

    def stands_before(self, module: nn.Module) -> bool:
        """Whether it answers the calls of a module, now."""
        return any(stand_in.module is module for stand_in in self._stand_ins)

    def close(self) -> None:
        """Forget everything; what lies in a folder stays there."""
        for memory in (*self._memories.values(), *self._kept.memories.values()):
            memory.close()
        self._memories.clear()
        self._kept.memories.clear()
        self._restart_trials()

    def _restart_trials(self) -> None:
        """Samples of which nothing is known any more cannot come back."""
        for lane in self._lanes.values():
            lane.epochs = -1 if lane.counts.hits + lane.counts.misses > lane.samples else 0

    def leave(self) -> Kept:
        """Give what another chain for the same modules can go on with. It knows the weights, and does not hold them."""
        if self._folder is not None:
            self.close()
        for memory in self._memories.values():
            memory.rest()
        memories = {**self._kept.memories, **self._memories}
        return Kept(self._budget, memories, {stage: lane.counts for stage, lane in self._lanes.items()})

    def suspect(self) -> None:
        """Read all weights before the next answer, to see also what does not count as written to, and all functions."""
        self._suspicious = True
        for memory in self._memories.values():
            memory.suspect()

    def suspect_step(self, optimizer: Optimizer) -> None:
        """Do so if an optimizer is about to change a weight: fused ones do not count what they write."""
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(id(parameter) in self._parameters and parameter.grad is not None for parameter in held):
            self.suspect()

    def exchange(self) -> None:
        """Exchange rows with other ranks that use the same folder."""
        for memory in self._memories.values():
            memory.refresh()

    def settle(self) -> None:
        """Compute what stands for outputs between links and is still held by somebody, who may read it at any time."""
        laters, self._laters = self._laters, []
        for reference in laters:
            if (later := reference()) is not None:
                later.value()

    def end_epoch(self, stage: str) -> Counts:
        """Judge whether the samples of a stage come back; give what has been done for it so far."""
        lane = self._lanes[stage]
        counts = lane.counts
        samples = counts.hits + counts.misses - lane.samples
        known = counts.known - lane.known
        lane.samples, lane.known = counts.hits + counts.misses, counts.known
        if lane.epochs >= 1 and samples and known < _WORTH * samples:
            refused = [memory.refused for memory in self._memories.values() if memory.refused and not memory.rows]
            lane.off = (
                refused[0]
                if refused
                else f"only {known:,} of the {samples:,} samples of the last {stage} epoch had been there before: they "
                "are augmented at random, or there is too little room for them"
            )
            self._say(f"{self._name}: off for {stage}, because {lane.off}.")
            self.close()
        lane.epochs += samples > 0
        return counts

    def notice_idleness(self, epoch: int) -> None:
        """Say so if calls would be answered now, and an epoch of training has passed without any so far."""
        if self._called or self._idle is not None or not self._covers(self._look()):
            return
        self._idle = f"it was never called in training epoch {epoch}"
        self._say(
            f"{self._name}: of no use, because {self._idle}: only calls of the module itself are answered, not of its "
            "other methods or of modules in it. Name the modules that are called."
        )

    def stats(self) -> FeatureStats:
        """Give what has been done, and whether outputs are remembered now."""
        look = self._last if self._last is not None and not self._stand_ins else self._look()
        covers = self._covers(look)
        lanes = self._lanes.values()
        memory = self._memories.get(covers)
        why = look.why if memory is None or memory.broken is None else memory.broken
        used = [lane for stage, lane in self._lanes.items() if lane.counts.misses and not stage.startswith("sanity")]
        training = [lane for stage, lane in self._lanes.items() if stage.startswith("train") and lane.counts.misses]
        off = [lane.off for lane in training or used]
        if off and all(off):
            why = off[0]
        broken = (memory is not None and memory.broken is not None) or (bool(off) and all(off))
        if self._idle is not None and not self._called and covers:
            why, broken = self._idle, True
        return FeatureStats(
            active=bool(covers) and not broken,
            why=why,
            covers=() if broken else covers,
            hits=sum(lane.counts.hits for lane in lanes),
            misses=sum(lane.counts.misses for lane in lanes),
            samples=sum(memory.rows for memory in self._memories.values()),
            bytes=sum(memory.size for memory in self._memories.values()),
            seconds_saved=sum(lane.counts.seconds_saved for lane in lanes),
            difference=max((lane.counts.difference for lane in lanes), default=0.0),
        )

    # What holds

    @property
    def _name(self) -> str:
        return self._whole[0] if self._whole is not None else self._names[0]

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._tell(sentence)

    def _look_anew(self) -> None:
        modules = [self._whole[1]] if self._whole is not None else []
        self._conditions = Conditions([*modules, *self._links.values()])
        self._trains = self._conditions.trains()
        self._parameters = {id(p) for module in (*modules, *self._links.values()) for p in module.parameters()}
        self._looks: dict[tuple[Any, ...], _Look] = {}

    def _look(self) -> _Look:
        """Look at the modules, and forget what is no longer true."""
        holds = self._conditions.hold() and not (self._suspicious and self._conditions.rewritten())
        self._suspicious = False
        if not holds or self._conditions.trains() != self._trains:
            self.close()
            self._look_anew()
        self._modes = self._conditions.modes()
        look = self._looks.get(self._modes)
        if look is None:
            look = self._looks[self._modes] = replace(self._examine(), program=self._conditions.program())
        self._last = look
        return look

    def _examine(self) -> _Look:
        why = None
        if self._whole is not None:
            why = why_not_reusable(*self._whole)
            if why is None:
                return _Look(True, 0, None)
        depth = 0
        for name, module in self._links.items():
            reason = why_not_reusable(name, module)
            if reason is not None:
                why = reason
                break
            depth += 1
        if depth == 0:
            self._say(f"{self._name}: off, because {why}.")
        elif why is not None:
            self._say(f"{self._name}: cached up to {self._names[depth - 1]}, because {why}.")
        return _Look(False, depth, why)

    def _covers(self, look: _Look) -> tuple[str, ...]:
        if look.whole:
            return (self._name,)
        return tuple(self._names[: min(look.depth, self._linked)])

    def _memory(self, covers: tuple[str, ...], modules: Iterable[nn.Module]) -> FeatureMemory:
        memory = self._memories.get(covers)
        if memory is None:
            modules = list(modules)
            beside = [self._beside[i] for i in range(1, len(covers)) if self._beside[i] is not _NOTHING]
            weights, structure = Weights(modules), f"{structure_text(modules)}{beside or ''}"
            memory = self._kept.memories.pop(covers, None)
            if memory is None or not memory.wake(weights, structure, self._say):
                if memory is not None:
                    memory.close()
                memory = FeatureMemory(
                    covers[-1],
                    weights,
                    structure=structure,
                    budget=self._budget,
                    folder=self._folder,
                    dtype=self._dtype,
                    say=self._say,
                )
            self._memories[covers] = memory
        memory.counts = self._lanes[self._stage()].counts
        return memory

    # Calls

    def _call(self, index: int, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == self._first:
            self._called = True
        if self._inside or _is_special():
            return run(*args, **kwargs)
        if index > 0:
            return self._go_on(index, run, args, kwargs)
        self._passed = None
        if self._lanes[self._stage()].off:
            return run(*args, **kwargs)
        begin = time.perf_counter()
        look = self._look()
        if look.whole:
            if index != _WHOLE:
                return run(*args, **kwargs)
            assert self._whole is not None
            answer = self._recall(look, [self._whole[1]], run, args, kwargs, begin)
            return run(*args, **kwargs) if answer is None else answer[0]
        if index == _WHOLE:
            output = run(*args, **kwargs)
            self._passed = None
            self.settle()  # nobody but those who keep it holds what was between links now
            return output
        self._called = True  # layers of a whole that trains in part are answered by themselves, too
        depth = min(look.depth, self._linked)
        if depth > self._follow:
            return self._watch(run, args, kwargs)
        if depth == 0:
            return run(*args, **kwargs)
        answer = self._recall(look, list(self._links.values())[:depth], self._run_to(depth), args, kwargs, begin)
        if answer is None:
            return run(*args, **kwargs)
        output, leaves = answer
        memory = self._memories[self._covers(look)]
        return self._hand_on(0, _Answered(depth, output, _Given(args, kwargs, leaves), memory))

    def _recall(
        self,
        look: _Look,
        modules: list[nn.Module],
        run: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        begin: float,
    ) -> tuple[Any, list[Any]] | None:
        """Give the output and the arguments' leaves; None if the modules have to run as if nothing stood before."""
        memory = self._memory(self._covers(look), modules)
        if memory.broken is None and memory.check():
            self._restart_trials()
        call = memory.read(args, kwargs) if memory.broken is None else None
        if call is None:
            self._say_broken(memory)
            return None
        self._inside = True
        try:
            output = memory.recall(run, call, self._modes, look.program)
        finally:
            self._inside = False
            memory.counts.all_seconds += time.perf_counter() - begin
        self._say_broken(memory)
        return output, call.leaves

    def _say_broken(self, memory: FeatureMemory) -> None:
        if memory.broken is not None:
            self._say(f"{memory.name}: off, because {memory.broken}.")

    def _run_to(self, depth: int) -> Run:
        """Give what runs so many links."""
        first = 0 if self._whole is None else 1
        runs = [stand_in.plain for stand_in in self._stand_ins[first : first + depth]]
        return partial(_one_by_one, runs, [self._beside[i] for i in range(1, depth)])

    def _hand_on(self, index: int, call: _Answered) -> Any:
        """Give what link ``index`` returns when the output of the last link is already there."""
        if index == call.depth - 1:
            self._passed = None
            return call.output
        given = call.given

        def compute() -> Tensor:
            self._unlink(index, f"something other than {self._names[index + 1]} reads what {self._names[index]} gives")
            if given.written() or call.memory.check():
                raise RuntimeError(
                    f"FeatureCache: what {self._names[0]} was given, or its weights, have been written to before "
                    f"something other than {self._names[index + 1]} read what {self._names[index]} gives, so that "
                    f"cannot be computed any more. Name no module after {self._names[index]} in the FeatureCache."
                )
            self._inside = True
            try:
                with given.circumstances():
                    value: Tensor = self._run_to(index + 1)(*given.args, **given.kwargs)
            finally:
                self._inside = False
            return value

        later = Later.of(compute)
        self._laters.append(weakref.ref(later))
        self._passed = index, later, call
        return later

    def _go_on(self, index: int, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for a link that is not the first."""
        if self._passed is not None:
            before, later, call = self._passed
            given = call.given
            follows = index == before + 1 and bool(args) and args[0] is later and not later.is_there
            follows = follows and not given.written() and not given.other_autocast()
            if follows and _Beside.of(args[1:], kwargs, given) == self._beside[index]:
                return self._hand_on(index, call)
            # Code such as nn.MultiheadAttention's takes another way, with other bits, for tensors of other classes.
            args, kwargs = _real((args, kwargs))
        watched, self._watched = self._watched, None
        if watched is not None and index == watched.index + 1:
            beside = self._follows(watched, args, kwargs)
            if beside is not None and self._beside.setdefault(index, beside) == beside:
                self._follow = index + 1
                return self._watch(run, args, kwargs, index, watched)
            self._unlink(
                watched.index, f"{self._names[index]} does not run on just what {self._names[watched.index]} gave"
            )
        return run(*args, **kwargs)

    @staticmethod
    def _follows(watched: _Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Beside | None:
        """Give what a link gets beside what the one before gave; None if it does not get just that."""
        if not args or args[0] is not watched.output or tensor_digest(watched.output) != watched.digest:
            return None
        if watched.given.other_autocast():
            return None
        beside = _Beside.of(args[1:], kwargs, watched.given)
        return beside if beside is _NOTHING or watched.given.content() == watched.content else None

    def _watch(
        self,
        run: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int = 0,
        watched: _Watched | None = None,
    ) -> Any:
        """Run a link, and note what it gave, so that it can be seen whether the next one gets just that."""
        if watched is None:
            given = _Given(args, kwargs, tree_flatten((args, kwargs))[0])
            content = given.content()
        else:
            given, content = watched.given, watched.content
        if self._watched is not None:
            before = self._watched.index
            self._unlink(before, f"{self._names[before + 1]} did not run after it")
            self._watched = None
        output = run(*args, **kwargs)
        if index + 1 < self._linked:
            if type(output) is Tensor:
                self._watched = _Watched(index, output, tensor_digest(output), given, content)
            else:
                self._unlink(index, f"{self._names[index]} gives a {type(output).__name__}")
        return output

    def _unlink(self, index: int, why: str) -> None:
        """Take link ``index`` for the last one."""
        if index + 1 < self._linked:
            self._linked = index + 1
            self.close()
            self._say(f"{self._name}: cached up to {self._names[index]}, because {why}.")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A FeatureChain belongs to the modules of one process.")


class Later(Tensor):
    """A tensor that is computed when somebody looks at it."""

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def of(compute: Callable[[], Tensor]) -> Later:
        """Give a stand-in for what ``compute`` gives."""
        later: Later = Tensor._make_subclass(Later, torch.empty(0, device="meta"))
        later._compute = compute
        later._value = None
        return later

    @property
    def is_there(self) -> bool:
        """Whether it has been computed."""
        return self._value is not None

    def value(self) -> Tensor:
        """Give the tensor itself."""
        if self._value is None:
            assert self._compute is not None
            self._value, self._compute = self._compute(), None
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take every stand-in for what it stands for."""
        args, kwargs = _real((args, kwargs or {}))
        return func(*args, **kwargs)


def _real(nest: Any) -> Any:
    return tree_map(lambda leaf: leaf.value() if type(leaf) is Later else leaf, nest)


def sequential_links(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Give the modules that run in an ``nn.Sequential`` one after the other, also in those inside it; else nothing.

    Example:
        >>> list(sequential_links("net", nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU()))))
        ['net.0', 'net.1.0', 'net.1.1']
    """
    links: dict[str, nn.Module] = {}
    for child_name, child in module.named_children() if _is_sequential(module) else ():
        below = f"{name}.{child_name}"
        plain = not (child._forward_hooks or child._forward_pre_hooks)
        links |= (plain and sequential_links(below, child)) or {below: child}
    return links if len(set(links.values())) == len(links) else {}


def _is_sequential(module: nn.Module) -> bool:
    own = getattr(type(module), "forward", None) is nn.Sequential.forward and "forward" not in vars(module)
    children = [child for child in module._modules.values() if child is not None]
    return own and len(set(children)) == len(children) > 0 and not is_compiled(module)


def _one_by_one(runs: list[Run], besides: list[_Beside], *args: Any, **kwargs: Any) -> Any:
    given = tree_flatten((args, kwargs))[0] if any(beside is not _NOTHING for beside in besides) else []
    output = runs[0](*args, **kwargs)
    for run, beside in zip(runs[1:], besides, strict=True):
        rest, options = beside.fill(given)
        output = run(output, *rest, **options)
    return output


def _is_special() -> bool:
    """Whether somebody traces, exports, counts or transforms what runs: then everything has to run."""
    return bool(
        torch._C._get_tracing_state() is not None
        or torch.compiler.is_exporting()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )
