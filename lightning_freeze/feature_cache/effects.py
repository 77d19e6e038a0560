"""What a module does beside returning an output, which would be missing where the output comes from memory."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_freeze.feature_cache.attributes import GENERATORS, Known
from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import tree_leaves, version_of
from lightning_freeze.feature_cache.state import State


class SideEffects:
    """Compares what there was before a run with what there is after it."""

    def __init__(self, given: Sequence[Tensor], states: Sequence[State]) -> None:
        self._given, self._hash = given, states[-1].hashing
        self._attributes = [state.parts.attributes for state in states]
        self._before = self._read()

    def found(self, output: Any, known: Known, *, is_first: bool) -> str | None:
        """Return what has happened, None if nothing has; bring up to date what is ``known`` of attributes."""
        (written, drawn), (old_written, old_drawn) = self._read(), self._before
        if written != old_written:
            return "it writes into what it is given"
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            return "what it gives requires grad though no parameter in it does: something else trains with it"
        if drawn != old_drawn:
            return "it draws random numbers"
        return next(filter(None, [each.effect(known, is_first=is_first) for each in self._attributes]), None)

    def _read(self) -> tuple[list[Any], Any]:
        devices = {leaf.device for leaf in self._given if leaf.device.type == "cuda"}
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        legacy: Any = np.random.get_state()
        own = [pickle.dumps(one) for each in self._attributes for one in each.others if isinstance(one, GENERATORS)]
        drawn = [state.numpy().tobytes() for state in states], random.getstate(), legacy[1].tobytes(), legacy[2:], own
        return marks_of(self._given, self._hash), drawn


def marks_of(tensors: Sequence[Tensor], hashing: Hash) -> list[Any]:
    """Return what is other once a tensor has been written to: its version, or a hash where writes do not count."""
    uncounted = [tensor for tensor in tensors if tensor.is_inference()]
    return [*hashing.tensors(uncounted), *(version_of(tensor) for tensor in tensors if not tensor.is_inference())]
