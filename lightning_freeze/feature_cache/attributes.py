"""What layers keep beside parameters, buffers and modules: what their runs read there, and what they write."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lightning_freeze.feature_cache.interceptor import OWN_ATTRIBUTES, tree_leaves
from lightning_freeze.feature_cache.keys import is_plain, why_no_key

#: A layer and the name of an attribute.
Place: TypeAlias = tuple[nn.Module, str]

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


@dataclass
class _Written:
    """An attribute into which runs of its module write."""

    shown: list[Any]  # what stands for it in the key
    is_same: bool  # after all calls of one kind, so far: not of a counter


_written: WeakKeyDictionary[nn.Module, dict[str, _Written]] = WeakKeyDictionary()  # for the next fit or test, too


class Attributes:
    """What is in the attributes of layers now.

    Attributes:
        text: All plain values that are not written by runs.
        tensors: The tensors, if all that they are can be hashed.
        others: Functions and other objects, which have no text that says all that they do.
        generators: Those of them that draw random numbers.
        views: What shows, by other objects in it, that this is out of date.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._found = _found(layers)
        number = {layer: i for i, layer in enumerate(layers)}
        shown = self._found | {place: one.shown for place, one in _written_by(layers).items()}
        leaves = [(place, leaf) for place, inside in shown.items() for leaf in inside]
        self.text = "".join(f"{number[p[0]]}.{p[1]}={leaf!r}," for p, leaf in leaves if is_plain(leaf))
        self.tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor) and why_no_key(leaf) is None]
        self.others = [leaf for _, leaf in leaves if not isinstance(leaf, Tensor) and not is_plain(leaf)]
        self.generators = [other for other in self.others if isinstance(other, _GENERATORS)]
        inner = [view for layer, name in self._found for view in _views(vars(layer)[name])]
        self.views = [vars(layer).values() for layer in layers] + inner

    def note_run(self, *, is_first: bool) -> None:
        """Note what the module has written in the run that has just ended: that is given, not read."""
        for (layer, name), leaves in _found(self._layers).items():
            before = self._found.get((layer, name), [])
            if len(before) != len(leaves) or not all(map(is_, before, leaves)):
                # What the first run writes changes no key; later on, what was kept does not know of it.
                shown = before if is_first and all(map(is_plain, before)) else ["written"]
                _written.setdefault(layer, {}).setdefault(name, _Written(shown, all(map(is_plain, leaves))))

    def written(self, known: dict[Place, Any] | None) -> dict[Place, Any]:
        """Return what runs have put into plain attributes, as far as that is ``known`` to be always the same."""
        values = {(layer, name): vars(layer).get(name) for layer, name in _written_by(self._layers)}
        for place, one in _written_by(self._layers).items():
            one.is_same = one.is_same and (known is None or (place in known and known[place] == values[place]))
        return {place: values[place] for place, one in _written_by(self._layers).items() if one.is_same}


def _found(layers: Sequence[nn.Module]) -> dict[Place, list[Any]]:
    own = [(layer, *item) for layer in layers for item in vars(layer).items() if item[0] not in OWN_ATTRIBUTES]
    return {(layer, name): tree_leaves(value) for layer, name, value in own}


def _written_by(layers: Sequence[nn.Module]) -> dict[Place, _Written]:
    return {(layer, name): one for layer in layers for name, one in _written.get(layer, {}).items()}


def _views(value: Any) -> Iterator[Collection[Any]]:
    """Yield live views of the lists and dicts in an attribute."""
    if isinstance(value, dict | list | tuple):
        yield (inside := value.values() if isinstance(value, dict) else value)
        for one in inside:
            yield from _views(one)
