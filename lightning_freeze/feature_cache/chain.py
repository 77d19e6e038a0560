"""Answers the calls of frozen modules: of one whole, or of links of a chain that pass keys on instead of tensors.

A link whose output the next link reads, and nobody else, returns a placeholder that knows its samples' keys; the
deepest frozen link answers. Whoever else reads a placeholder makes the link compute, and be remembered by itself from
then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import (
    Interceptor,
    Run,
    is_observed,
    tree_flatten,
    tree_unflatten,
)
from lightning_freeze.feature_cache.keys import NotPerSample, read_keys
from lightning_freeze.feature_cache.later import Between, Later, keys_of, real
from lightning_freeze.feature_cache.links import Link, Look
from lightning_freeze.feature_cache.memory import Call, Memory
from lightning_freeze.feature_cache.rows import Rows
from lightning_freeze.feature_cache.state import State
from lightning_freeze.feature_cache.stats import FeatureStats, Stages


class FeatureChain:
    """Remembers what modules gave for each sample while they are frozen.

    Args:
        whole: The name and the module whose outputs are wanted; None for links alone.
        links: Modules that run one after the other, by name. If there is a whole, they are all that runs in it.
        rows: Where rows are kept.
        hashing: Hashes tensors; by default on the host.
        dtype: Keep wider floating numbers in this dtype.
        stages: What has been done so far.
        say: Takes each sentence about what is off and why, once.

    Raises:
        ValueError: When it is entered, if another chain answers for one of the modules.

    Example:
        >>> from lightning_freeze.feature_cache.links import sequential_links
        >>> from lightning_freeze.feature_cache.rows import MemoryRows
        >>> net = nn.Sequential(nn.Linear(2, 300), nn.ReLU()).requires_grad_(False)
        >>> x = torch.randn(4, 2)
        >>> with FeatureChain(("net", net), sequential_links("net", net), rows=MemoryRows(100_000)) as chain:
        ...     outputs = [net(x) for _ in range(3)]
        >>> torch.equal(outputs[0], outputs[2]), chain.stats().hits
        (True, 4)
    """

    def __init__(
        self,
        whole: tuple[str, nn.Module] | None,
        links: Mapping[str, nn.Module],
        *,
        rows: Rows,
        hashing: Hash | None = None,
        dtype: torch.dtype | None = None,
        stages: Stages | None = None,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        hashing = Hash() if hashing is None else hashing
        said = lru_cache(maxsize=None)(say)  # each sentence once

        def link(name: str, module: nn.Module) -> Link:
            memory = Memory(name, module, rows, hashing, dtype, said)
            return Link(name, module, State(name, module, hashing), memory)

        self.was_called = False
        self._rows, self._say, self._stages = rows, said, Stages() if stages is None else stages
        self._whole = link(*whole) if whole is not None else None
        self._links = [link(name, module) for name, module in links.items()]
        self._between = Between(hashing)
        self._interceptors: list[Interceptor] = []
        self._look()

    def __enter__(self) -> FeatureChain:
        """Answer the calls of the modules."""
        return self if self._interceptors else self.enter()

    def enter(self, *, compiled_around: bool = False) -> FeatureChain:
        """Answer the calls of the modules, which may run in something compiled; see :class:`Interceptor`."""
        try:
            for link in self._all():
                call = partial(self._call, link)
                self._interceptors.append(Interceptor(link.module, call, compiled_around=compiled_around))
        except ValueError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Let the modules run by themselves; what is remembered stays."""
        self.settle()
        for interceptor in self._interceptors:
            interceptor.remove()
        self._interceptors = []

    def answers_for(self, module: nn.Module) -> bool:
        """Whether it answers the calls of a module, now."""
        return any(interceptor.module is module for interceptor in self._interceptors)

    def recheck(self, written: Iterable[Tensor] | None = None) -> None:
        """Read the weights anew before the next answer; if some are named, only of modules that hold one of them."""
        written = None if written is None else list(written)
        for link in self._all():
            link.state.recheck(written)

    def settle(self) -> None:
        """Compute what is between links and still held by somebody, who may read it at any time."""
        self._between.settle()

    def close(self) -> None:
        """Forget everything; what lies in a folder stays there."""
        for link in self._all():
            link.memory.close()

    def end_epoch(self, stage: str) -> None:
        """Judge whether the samples of a stage come back."""
        counts = self._stages[stage]
        was_off = counts.off
        counts.end_epoch(stage, next((link.memory.refused for link in self._all() if link.memory.refused), None))
        self._rows.end_epoch()
        if counts.off is not None and was_off is None:
            self._say(f"{self.name}: off for {stage}, because {counts.off}.")
            self.close()

    def stats(self) -> FeatureStats:
        """Return what has been done, and whether outputs are remembered now."""
        look = self._look() if self._interceptors else self._last
        off = self._stages.off()
        return self._stages.stats(
            active=bool(look.covers) and off is None,
            why=look.why if off is None else off,
            covers=look.covers if off is None else (),
            samples=self._rows.count,
            bytes=self._rows.bytes_taken,
        )

    @property
    def name(self) -> str:
        """What it is called in sentences."""
        return (self._whole or self._links[0]).name

    def _all(self) -> list[Link]:
        return self._links if self._whole is None else [self._whole, *self._links]

    def _look(self) -> Look:
        """Read what can be remembered now."""
        why = self._whole.reason() if self._whole is not None else None
        if self._whole is not None and why is None:
            self._last = Look(True, 0, None, (self.name,))
            return self._last
        reasons = [link.reason() for link in self._links]
        depth = next((i for i, reason in enumerate(reasons) if reason is not None), len(reasons))
        if self._whole is not None and self._whole.memory.broken is not None:
            depth = 0
        elif depth < len(reasons):
            why = reasons[depth]
        self._last = Look(False, depth, why, tuple(link.name for link in self._links[:depth]))
        return self._last

    def _announce(self, look: Look) -> None:
        """Say what cannot be remembered in this pass."""
        self._stages.now().follow(look.covers)
        if not look.covers:
            self._say(f"{self.name}: off, because {look.why}.")
        elif look.why is not None:
            self._say(f"{self.name}: cached up to {look.covers[-1]}, because {look.why}.")

    def _call(self, link: Link, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begin = time.perf_counter()
        is_first = link is self._whole or link is self._links[0]
        if not self._between.busy:
            look = self._look() if is_first else self._last
            self.was_called = self.was_called or link is self._whole or not look.whole
        if self._between.busy or is_observed() or self._stages.now().off is not None:
            args, kwargs = real((args, kwargs))
            return run(*args, **kwargs)
        if is_first:
            self._announce(look)
        if link is self._whole and not self._last.whole:
            output = run(*args, **kwargs)
            self.settle()  # nobody but those who keep it holds what was between links now
            return output
        answer = self._answer(link, run, args, kwargs)
        if answer is None:
            args, kwargs = real((args, kwargs))
            return run(*args, **kwargs)
        self._stages.now().all_seconds += time.perf_counter() - begin
        return answer[0]

    def _answer(self, link: Link, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """Return the output; None if the module has to run as if nothing was there."""
        place = -1 if link is self._whole else self._links.index(link)
        if place > 0:
            link.state.read()  # the first one has just been
        is_in = link is self._whole if self._last.whole else place < self._last.depth
        if not is_in or link.state.why is not None:
            return None
        args, kwargs = real((args, kwargs), only_there=True)
        leaves, spec = tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor) and type(leaf) is not Later]
        state, last = link.state.key, self._between.take()
        if last is not None and place > 0 and last.giver is self._links[place - 1]:
            last.giver.follows = last.is_among(leaves)
        try:
            chained = keys_of if last is None else last.keys_of
            keys = read_keys(leaves, spec, hashing=self._between.hashing, state=state, chained=chained)
        except NotPerSample as reason:
            self._say(f"{link.name}: such calls are not cached: {reason}.")
            return None

        def compute(first: int | None = None) -> Any:
            some = [leaf[:first] if i in keys.places else leaf for i, leaf in enumerate(real(leaves))]
            return self._between.run(run, *tree_unflatten(some, spec))

        is_last = place in (-1, self._last.depth - 1)
        if not is_last and link.follows:
            return (self._between.later(link, run, args, kwargs, keys),)
        if not is_last and link.follows is None:
            output = compute()
            self._between.watch(link, output, keys, given)
            return (output,)
        keys = replace(keys, is_rounded=keys.is_rounded or link.state.has_half)
        return (link.memory.answer(Call(keys, compute, given, state, self._stages.now())),)
