"""What is between the links of a chain: tensors that are known by keys, and computed only if somebody reads them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_freeze.feature_cache.effects import marks_of
from lightning_freeze.feature_cache.interceptor import empty_of, tree_map
from lightning_freeze.feature_cache.keys import autocast_states
from lightning_freeze.feature_cache.memory import Call, Memory
from lightning_freeze.feature_cache.state import State


@dataclass(eq=False)
class Link:
    """One module, and whether the next one, and nobody else, gets what it gives (None: not known yet)."""

    place: int  # in the chain, -1 for what they all are in
    state: State
    memory: Memory
    follows: bool | None = None
    laters: list[weakref.ref[Later]] = field(default_factory=list)

    def reason(self) -> str | None:
        """Return why it is not remembered, now."""
        return self.state.read().why or self.memory.broken


class Later(Tensor):
    """A tensor that is known by its samples' keys, and computed when somebody looks at it."""

    link: Link  # what gives it
    call: Call
    read: bool  # by somebody other than the next link, who may have written to it
    _watched: Sequence[Tensor]
    _settings: tuple[Any, ...]
    _value: Tensor | None

    @staticmethod
    def of(link: Link, call: Call, watched: Sequence[Tensor]) -> Later:
        """Return what stands for the output of a call, until one of those ``watched`` is written to."""
        later = empty_of(Later)
        later.link, later.call, later.read = link, call, False
        later._watched, later._value = watched, None
        later._settings = later._marks(), link.state.key, torch.is_grad_enabled(), autocast_states()
        return later

    def given_to(self, link: Link) -> Tensor:
        """Return itself if its keys say what it holds, else the tensor."""
        is_known = not self.read and self._marks() == self._settings[0]
        if self.link.follows is None:
            self.link.follows = is_known and link.place == self.link.place + 1
        return self if is_known else self.value()

    def _marks(self) -> list[Any]:
        return marks_of(self._watched, self.link.state.hashing)

    def value(self, size: int | None = None) -> Tensor:
        """Return the tensor itself, or what it would be in a batch of another size."""
        if self._value is not None and size is None:
            return self._value
        name, (marks, state, grad, casts) = self.link.state.name, self._settings
        if self._marks() != marks or self.link.state.read().key != state:
            raise RuntimeError(
                f"FeatureCache: what {name} was given, or its weights, have been written to before something other "
                f"than the next module read what {name} gives, so that cannot be computed any more. Name no module "
                f"after {name} in the FeatureCache."
            )
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, on, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on))
            value: Tensor = self.call.run(size)[0]
        if size is None:
            self._value = value
        return value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute every placeholder before anything else is done with it."""
        args, kwargs = real((args, kwargs or {}))
        return func(*args, **kwargs)


def real(nest: Any) -> Any:
    """Return a nest with tensors in the places of placeholders, which have been read then."""

    def one(leaf: Any) -> Any:
        if type(leaf) is not Later:
            return leaf
        leaf.read, leaf.link.follows = True, False
        return leaf.value()

    return tree_map(one, nest)
