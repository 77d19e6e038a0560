"""What a module does beside returning an output, which would be missing where the output comes from memory."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import OWN_ATTRIBUTES, tree_leaves, version_of


class SideEffects:
    """Compares what there was before a run with what there is after it, of a module also the tensors in attributes."""

    def __init__(
        self, given: Sequence[Tensor], module: nn.Module | None, hashing: Hash, generators: Sequence[Any] = ()
    ) -> None:
        self._given, self._module, self._hash, self._generators = given, module, hashing, generators
        self._before = self._read()

    def found(self, output: Any) -> str | None:
        """Return what has happened, None if nothing has."""
        (written, drawn, kept), (old_written, old_drawn, old_kept) = self._read(), self._before
        if written != old_written:
            return "it writes into what it is given"
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            return "what it gives requires grad though no parameter in it does: something else trains with it"
        if drawn != old_drawn:
            return "it draws random numbers"
        for place, tensors in kept.items():
            if list(map(id, tensors)) != list(map(id, old_kept.get(place, []))):
                return f"it puts what it computes into {place[1]}, too, where others could look for it"
        return None

    def _read(self) -> tuple[list[Any], Any, dict[tuple[int, str], list[Tensor]]]:
        devices = {leaf.device for leaf in self._given if leaf.device.type == "cuda"}
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        legacy: Any = np.random.get_state()
        own = list(map(pickle.dumps, self._generators))
        drawn = [state.numpy().tobytes() for state in states], random.getstate(), legacy[1].tobytes(), legacy[2:], own
        # Tensors in attributes that are neither parameters nor buffers.
        kept = {
            (i, f"{type(layer).__name__}.{name}"): [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            for i, layer in enumerate(self._module.modules() if self._module is not None else ())
            for name, value in vars(layer).items()
            if name not in OWN_ATTRIBUTES
        }
        return marks_of(self._given, self._hash), drawn, kept


def marks_of(tensors: Sequence[Tensor], hashing: Hash) -> list[Any]:
    """Return what is other once a tensor has been written to: its version, or a hash where writes do not count."""
    uncounted = [tensor for tensor in tensors if tensor.is_inference()]
    return [*hashing.tensors(uncounted), *(version_of(tensor) for tensor in tensors if not tensor.is_inference())]
