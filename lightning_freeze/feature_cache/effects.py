"""What a module does beside returning an output, which would be missing where the output comes from memory."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_freeze.feature_cache.attributes import GENERATORS
from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import version_of
from lightning_freeze.feature_cache.state import State


def marks_of(tensors: Sequence[Tensor], hashing: Hash) -> list[Any]:
    """Return what is other once a tensor has been written to: its version, or a hash where writes do not count."""
    uncounted = [tensor for tensor in tensors if tensor.is_inference()]
    return [*hashing.tensors(uncounted), *(version_of(tensor) for tensor in tensors if not tensor.is_inference())]


def generators(given: Sequence[Tensor], states: Sequence[State]) -> list[Any]:
    """Return what is other once random numbers have been drawn, from a generator of a module's own, too."""
    devices = {tensor.device for tensor in given if tensor.device.type == "cuda"}
    of_torch = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    legacy: Any = np.random.get_state()
    others = [other for state in states for other in state.parts.attributes.others]
    own = [pickle.dumps(other) for other in others if isinstance(other, GENERATORS)]
    return [*(one.numpy().tobytes() for one in of_torch), random.getstate(), legacy[1].tobytes(), legacy[2:], *own]
