"""What is between the links of a chain: tensors that are known by keys, and computed only if somebody reads them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_freeze.feature_cache.effects import marks_of
from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import Run, empty_of, tree_leaves, tree_map
from lightning_freeze.feature_cache.keys import Keys, autocast_states
from lightning_freeze.feature_cache.links import Link


class Later(Tensor):
    """A tensor that is known by its samples' keys, and computed when somebody looks at it."""

    keys: Keys
    _compute: Callable[[bool], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def of(keys: Keys, compute: Callable[[bool], Tensor]) -> Later:
        """Return a placeholder.

        Args:
            keys: Of its samples.
            compute: Returns the tensor; takes whether somebody outside of the chain asks for it.
        """
        later = empty_of(Later)
        later.keys, later._compute, later._value = keys, compute, None
        return later

    @property
    def is_there(self) -> bool:
        """Whether it has been computed."""
        return self._value is not None

    def value(self, outside: bool = False) -> Tensor:
        """Return the tensor itself."""
        if self._value is None:
            assert self._compute is not None
            self._value, self._compute = self._compute(outside), None
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute every placeholder before anything else is done with it."""
        args, kwargs = real((args, kwargs or {}), outside=True)
        return func(*args, **kwargs)


def real(nest: Any, *, outside: bool = False, only_there: bool = False) -> Any:
    """Return a nest with tensors in the places of placeholders: of all, or of those that have been computed."""

    def one(leaf: Any) -> Any:
        return leaf.value(outside) if type(leaf) is Later and (leaf.is_there or not only_there) else leaf

    return tree_map(one, nest)


def keys_of(leaf: Any) -> Keys | None:
    """Return the keys by which a tensor is known."""
    return leaf.keys if type(leaf) is Later else None


class Circumstances:
    """The settings in which a call was made and what it was given, so that it can be made later.

    Args:
        given: All that the call was given.
    """

    def __init__(self, given: Any) -> None:
        leaves = tree_leaves(given)
        self._tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and type(leaf) is not Later]
        self._tensors = [leaf for leaf in self._tensors if not leaf.is_inference()]
        self._marks = marks_of(self._tensors, Hash())
        self._autocast, self._grad = autocast_states(), torch.is_grad_enabled()

    def hold(self) -> bool:
        """Whether nothing in it has been written to since. In inference mode that cannot be seen."""
        return self._marks == marks_of(self._tensors, Hash())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run with autocast and gradients as they were."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, on, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on))
            yield


class Given:
    """What a link has just given, and what it was given for it.

    Args:
        giver: The link.
        output: What it gave.
        keys: Of the samples.
        given: All tensors that it was given.
        hashing: Hashes tensors that do not count what is written to them.
    """

    def __init__(self, giver: Link, output: Any, keys: Keys, given: Sequence[Tensor], hashing: Hash) -> None:
        self.giver, self._output, self._keys, self._hash = giver, output, keys, hashing
        self._tensors = [output, *given] if type(output) is Tensor else []
        self._marks = marks_of(self._tensors, hashing)

    def is_among(self, leaves: Sequence[Any]) -> bool:
        """Whether a tensor that was given, and nothing written to since, is among some arguments."""
        is_same = any(leaf is self._output for leaf in leaves) and bool(self._tensors)
        return is_same and self._marks == marks_of(self._tensors, self._hash)

    def keys_of(self, leaf: Any) -> Keys | None:
        """Return the keys by which a tensor is known."""
        return self._keys if leaf is self._output and self.is_among([leaf]) else keys_of(leaf)


class Between:
    """What links have given and the next ones have not got yet.

    Args:
        hashing: Hashes tensors that do not count what is written to them.
    """

    def __init__(self, hashing: Hash) -> None:
        self.hashing, self.busy = hashing, False
        self._laters: list[weakref.ref[Later]] = []
        self._last: Given | None = None

    def later(self, link: Link, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], keys: Keys) -> Later:
        """Return a placeholder for what a link gives; at the end of the batch it is computed if somebody holds it."""
        circumstances, state = Circumstances((args, kwargs)), link.state.key

        def compute(outside: bool) -> Tensor:
            if outside and not self.busy:
                link.follows = False
            if not circumstances.hold() or link.state.read().key != state:
                raise RuntimeError(
                    f"FeatureCache: what {link.name} was given, or its weights, have been written to before something "
                    f"other than the next module read what {link.name} gives, so that cannot be computed any more. "
                    f"Name no module after {link.name} in the FeatureCache."
                )
            with circumstances.again():
                output: Tensor = self.run(run, *real((args, kwargs)))
            return output

        later = Later.of(keys, compute)
        self._laters.append(weakref.ref(later))
        return later

    def run(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a link, and whatever it calls."""
        before, self.busy = self.busy, True
        try:
            return run(*args, **kwargs)
        finally:
            self.busy = before

    def watch(self, giver: Link, output: Any, keys: Keys, given: Sequence[Tensor]) -> None:
        """Note what a link gave and what it was given."""
        self._last = Given(giver, output, keys, given, self.hashing)

    def take(self) -> Given | None:
        """Return what was noted last."""
        last, self._last = self._last, None
        return last

    def settle(self) -> None:
        """Compute what somebody still holds, who may read it at any time."""
        laters, self._laters, self._last = self._laters, [], None
        for reference in laters:
            if (later := reference()) is not None:
                later.value(outside=True)
