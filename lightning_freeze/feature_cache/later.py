"""What is between the links of a chain: tensors that are known by keys, and computed only if somebody reads them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import empty_of, tree_map
from lightning_freeze.feature_cache.keys import Keys, autocast_states
from lightning_freeze.feature_cache.memory import Memory
from lightning_freeze.feature_cache.state import State


@dataclass(eq=False)
class Link:
    """One module, and whether the next one, and nobody else, gets what it gives (None: not known yet)."""

    place: int  # in the chain, -1 for what they all are in
    name: str
    module: nn.Module
    state: State
    memory: Memory
    hashing: Hash
    follows: bool | None = None
    laters: list[weakref.ref[Later]] = field(default_factory=list)

    def reason(self) -> str | None:
        """Return why it is not remembered, now."""
        return self.state.read().why or self.memory.broken

    def settle(self) -> None:
        """Compute what somebody still holds of what it gave, who may read it at any time."""
        laters, self.laters = self.laters, []
        for reference in laters:
            real(reference())


class Later(Tensor):
    """A tensor that is known by its samples' keys, and computed when somebody looks at it."""

    link: Link  # what gives it
    keys: Keys
    read: bool  # by somebody other than the next link, who may have written to it
    _run: Callable[[int | None], Tensor]
    _marks: Callable[[], Any]
    _settings: tuple[Any, ...]
    _value: Tensor | None

    @staticmethod
    def of(link: Link, keys: Keys, run: Callable[[int | None], Tensor], marks: Callable[[], Any]) -> Later:
        """Return what stands for ``run()``; ``marks`` returns what is other once that can no longer be computed."""
        later = empty_of(Later)
        later.link, later.keys, later.read = link, keys, False
        later._run, later._marks, later._value = run, marks, None
        later._settings = marks(), link.state.key, torch.is_grad_enabled(), autocast_states()
        return later

    @property
    def is_known(self) -> bool:
        """Whether its keys say what it holds."""
        return not self.read and self._marks() == self._settings[0]

    def value(self, size: int | None = None) -> Tensor:
        """Return the tensor itself, or what it would be in a batch of another size."""
        if self._value is not None and size is None:
            return self._value
        name, (marks, state, grad, casts) = self.link.name, self._settings
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
            value = self._run(size)
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
