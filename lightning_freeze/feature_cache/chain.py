"""Answers the calls of frozen modules: of one whole, or of links of a chain that pass keys on instead of tensors.

A link whose output the next link reads, and nobody else, returns a placeholder that knows its samples' keys; the
deepest frozen link answers. Whoever else reads a placeholder makes the link compute, and be remembered by itself from
then on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import (
    Interceptor,
    Run,
    TreeSpec,
    is_observed,
    tree_flatten,
    tree_unflatten,
)
from lightning_freeze.feature_cache.keys import NotPerSample, read_keys
from lightning_freeze.feature_cache.later import Later, Link, real
from lightning_freeze.feature_cache.memory import Call, Memory, Rows
from lightning_freeze.feature_cache.state import State
from lightning_freeze.feature_cache.stats import Counts, FeatureStats, Stages


class FeatureChain:
    """Remembers what modules gave for each sample while they are frozen.

    Args:
        whole: The name and the module whose outputs are wanted; None for links alone.
        links: Modules that run one after the other, by name. If there is a whole, they are all that runs in it.
        say: Takes each sentence about what is off and why, once.
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
        hashing = hashing or Hash()
        say = lru_cache(maxsize=None)(say)  # each sentence once

        def link(place: int, name: str, module: nn.Module) -> Link:
            memory = Memory(rows, dtype, lambda sentence: say(f"{name}: {sentence}"))
            return Link(place, State(name, module, hashing), memory)

        self.was_called = self._is_busy = False
        self._depth = len(links)  # up to where they are remembered in this pass
        self._rows, self._say, self._stages = rows, say, Stages(Counts) if stages is None else stages
        self._whole = link(-1, *whole) if whole is not None else None
        self._links = [link(place, *named) for place, named in enumerate(links.items())]
        self._interceptors: list[Interceptor] = []
        self._last = self._look()

    def __enter__(self) -> FeatureChain:
        """Answer the calls of the modules."""
        try:
            for link in self._all() if not self._interceptors else ():
                self._interceptors.append(Interceptor(link.state.module, partial(self._call, link)))
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
        for link in self._links:
            laters, link.laters = link.laters, []
            for reference in laters:
                real(reference())

    def close(self) -> None:
        """Forget everything; what lies in a folder stays there."""
        for link in self._all():
            link.memory.close()

    def end_epoch(self, stage: str) -> None:
        """Judge whether the samples of a stage come back."""
        each = self._rows.bytes_taken / max(1, self._rows.count)
        if off := self._stages[stage].end_epoch(stage, each):
            self._say(f"{self.name}: off for {stage}, because {off}.")
            if self._stages.off() is not None:  # what another stage keeps stays
                self.close()
        if stage == "train":
            self._rows.end_epoch()

    def stats(self) -> FeatureStats:
        """Return what has been done, and whether outputs are remembered now; after the end, what was so at last."""
        self._last = self._look() if self._interceptors else self._last
        off, (covers, why) = self._stages.off(), self._last
        covers = covers if off is None else ()
        count, taken = self._rows.count, self._rows.bytes_taken
        return self._stages.stats(active=bool(covers), why=off or why, covers=covers, samples=count, bytes=taken)

    def _look(self) -> tuple[tuple[str, ...], str | None]:
        """Return the names of what can be remembered now, and why not more."""
        if self._whole is not None and (why := self._whole.reason()) is None:
            return (self.name,), None
        reasons = [link.reason() for link in self._links]
        if self._whole is not None and (self._whole.memory.broken or not reasons):
            return (), why
        depth = next((i for i, reason in enumerate(reasons) if reason is not None), len(reasons))
        covers = tuple(link.state.name for link in self._links[:depth])
        return covers, [*reasons, None if self._whole is None else why][depth]

    @property
    def name(self) -> str:
        """What it is called in sentences."""
        return self._all()[0].state.name

    def _all(self) -> list[Link]:
        return self._links if self._whole is None else [self._whole, *self._links]

    def _call(self, link: Link, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def plain() -> Any:
            real_args, real_kwargs = real((args, kwargs))
            return run(*real_args, **real_kwargs)

        begin, counts = time.perf_counter(), self._stages.now()
        self.was_called = self.was_called or not self._is_busy
        is_off = counts.off is not None or (self._whole is not None and self._whole.memory.broken)
        if self._is_busy or is_off or is_observed():
            return plain()
        if link.place <= 0:
            self._depth = len(self._links)
        if link.place > self._depth or (why := link.reason()) is not None:
            if link.place <= self._depth:
                self._announce(link.place, str(why))
            output = plain()
            if link is self._whole:
                self.settle()  # nobody but those who keep it holds what was between links now
            return output
        try:
            output = self._answer(link, run, *tree_flatten((args, kwargs)))
        except NotPerSample as reason:
            link.memory.refuse(counts, reason)
            return self._run(plain)
        counts.all_seconds += time.perf_counter() - begin
        return output

    def _announce(self, place: int, why: str) -> None:
        """Say what cannot be remembered in this pass; if that is the whole, links will say up to where they are."""
        if place > 0:
            self._say(f"{self.name}: cached up to {self._links[place - 1].state.name}, because {why}.")
        elif place == 0 or not self._links or self._links[0].reason() is not None:
            self._say(f"{self.name}: off, because {why}.")
        self._depth = place if place >= 0 else self._depth

    def _answer(self, link: Link, run: Run, leaves: list[Any], spec: TreeSpec) -> Any:
        leaves = [leaf.given_to(link) if type(leaf) is Later else leaf for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and type(leaf) is not Later]
        given = [leaves[i] for i in places]
        known = {i: leaf.call.keys for i, leaf in enumerate(leaves) if type(leaf) is Later}
        keys = read_keys(leaves, spec, hashing=link.state.hashing, state=link.state.key, known=known)

        def compute(size: int | None = None) -> tuple[Any, list[Tensor]]:
            some = [_sized(leaf, size if i in keys.places else None) for i, leaf in enumerate(leaves)]
            args, kwargs = tree_unflatten(some, spec)
            output = self._run(partial(run, *args, **kwargs))
            link.state.note_run()
            return output, [some[i] for i in places]

        states = [before.state for before in self._links[: max(0, link.place)]] + [link.state]
        call = Call(keys, compute, given, states, self._stages.now())
        is_last = link.place in (-1, len(self._links) - 1)
        if is_last or link.follows is False or self._links[link.place + 1].reason() is not None:
            return link.memory.answer(call)
        # Later on, what is written in inference mode is not looked for.
        later = Later.of(link, call, [one for one in given if link.follows is None or not one.is_inference()])
        if link.follows is None and type(output := later.value()) is not Tensor:
            link.follows = False
            return output
        link.laters.append(weakref.ref(later))
        return later

    def _run(self, run: Callable[[], Any]) -> Any:
        """Run a link, and whatever it calls."""
        before, self._is_busy = self._is_busy, True
        try:
            return run()
        finally:
            self._is_busy = before


def _sized(leaf: Any, size: int | None) -> Any:
    """Return a leaf of a call, one with an entry for each sample with so many, of which some are there twice."""
    if type(leaf) is Later:
        return leaf.value(size)
    if size is None:
        return leaf
    sized = torch.cat([leaf] * -(-size // len(leaf)))[:size]
    if sized.stride() != leaf.stride():
        raise ValueError("It lies in memory in another way.")
    return sized
