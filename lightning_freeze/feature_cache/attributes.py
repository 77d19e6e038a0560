"""What layers and their classes keep beside parameters, buffers and modules: what runs read and write there; code."""

from __future__ import annotations

import inspect
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from types import CodeType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from lightning_freeze.feature_cache.interceptor import OWN_ATTRIBUTES, tree_leaves
from lightning_freeze.feature_cache.keys import is_plain, why_no_key

#: A layer, or a class of one.
Owner: TypeAlias = nn.Module | type

#: An owner and the name of an attribute.
Place: TypeAlias = tuple[Owner, str]

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


@dataclass
class _Written:
    """An attribute into which runs of its module write."""

    shown: list[Any]  # what stands for it in the key
    is_same: bool  # after all calls of one kind, so far
    is_counter: bool = True  # so far: each run makes it larger


_written: WeakKeyDictionary[Owner, dict[str, _Written]] = WeakKeyDictionary()  # for the next fit or test, too


class Attributes:
    """What is in the attributes of layers and classes now.

    Attributes:
        text: All plain values that are not written by runs.
        tensors: The tensors, if all that they are can be hashed.
        others: Functions and other objects, which have no text that says all that they do.
        generators: Those of them that draw random numbers.
        views: What shows, by other objects in it, that this is out of date.
        of_torch: The same of torch's own layers, which are many and seldom changed.
        aside: Where the run after this has put tensors.
    """

    aside: Place | None = None

    def __init__(self, owners: Sequence[Owner]) -> None:
        self._owners = owners
        self._found = _found(owners)
        number = {owner: i for i, owner in enumerate(owners)}
        shown = self._found | {place: one.shown for place, one in _written_by(owners).items()}
        leaves = [(place, leaf) for place, inside in shown.items() for leaf in inside]
        self.text = "".join(f"{number[p[0]]}.{p[1]}={leaf!r}," for p, leaf in leaves if is_plain(leaf))
        self.tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor) and why_no_key(leaf) is None]
        self.others = [leaf for _, leaf in leaves if not isinstance(leaf, Tensor) and not is_plain(leaf)]
        self.generators = [other for other in self.others if isinstance(other, _GENERATORS)]
        self.of_torch, self.views = self._views_of(of_torch=True), self._views_of(of_torch=False)

    def _views_of(self, *, of_torch: bool) -> list[Collection[Any]]:
        owners = [one for one in self._owners if _kind(one).__module__.startswith("torch.nn.") == of_torch]
        wanted = set(owners)
        values = [vars(owner)[name] for owner, name in self._found if owner in wanted]
        once = {id(value): value for value in values}.values()  # a config is in many
        return [vars(owner).values() for owner in owners] + [view for value in once for view in _views(value)]

    def note_run(self, *, is_first: bool) -> None:
        """Note what the module has written in the run that has just ended: that is given, not read."""
        for (owner, name), leaves in _found(self._owners).items():
            was_there, before = (owner, name) in self._found, self._found.get((owner, name), [])
            if len(before) != len(leaves) or not all(map(is_, before, leaves)):
                # What the first run writes changes no key; later on, what was kept does not know of it.
                shown = before if is_first and all(map(is_plain, before)) else ["written"]
                plain = all(map(is_plain, leaves))
                one = _written.setdefault(owner, {}).setdefault(name, _Written(shown, plain))
                one.is_counter = one.is_counter and (not plain or not was_there or _count_up(before, leaves))
                if _tensors(before) != _tensors(leaves):
                    self.aside = owner, name

    def written(self, known: dict[Place, Any] | None) -> dict[Place, Any]:
        """Return what runs have put into plain attributes, with all in it, as far as it is ``known`` to be the same."""
        mine = _written_by(self._owners)
        found = _found([owner for owner, _ in mine])
        values = {place: (vars(place[0]).get(place[1]), found.get(place, [])) for place in mine}
        for place, one in mine.items():
            one.is_same = one.is_same and (known is None or (place in known and known[place][1] == values[place][1]))
        return {place: values[place] for place, one in mine.items() if one.is_same}

    def effect(self, *, is_first: bool) -> str | None:
        """Return where a run has put what is not the same after all calls of one kind, and no counter.

        In its first run, a module may set up tensors that it keeps for good.
        """
        asides = [self.aside] if self.aside is not None and not is_first else []
        moving = [p for p, one in _written_by(self._owners).items() if not one.is_same and not one.is_counter]
        for owner, name in (*asides, *moving):
            return f"it puts what it computes into {_kind(owner).__name__}.{name}, too, where others could look for it"
        return None


def _kind(owner: Owner) -> type:
    return owner if isinstance(owner, type) else type(owner)


def _count_up(old: list[Any], new: list[Any]) -> bool:
    both = zip(old, new, strict=False)
    return len(old) == len(new) and all(a is b or (type(a) is type(b) is int and a < b) for a, b in both)


def _tensors(leaves: list[Any]) -> list[int]:
    return [id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def _found(owners: Sequence[Owner]) -> dict[Place, list[Any]]:
    found = [(owner, *item) for owner in owners for item in vars(owner).items() if item[0] not in OWN_ATTRIBUTES]
    return {(owner, name): _leaves(value) for owner, name, value in found if not name.startswith("__")}


def _written_by(owners: Sequence[Owner]) -> dict[Place, _Written]:
    return {(owner, name): one for owner in owners for name, one in _written.get(owner, {}).items()}


def _leaves(value: Any) -> list[Any]:
    """Return all that is in a value, and in objects that hold plain values only, such as configs."""
    return [inner for leaf in tree_leaves(value) for inner in (_settings(leaf) or [leaf])]


def _settings(leaf: Any) -> list[Any]:
    inside = [] if isinstance(leaf, (nn.Module, type, *_GENERATORS)) else tree_leaves(getattr(leaf, "__dict__", {}))
    return inside if all(map(is_plain, inside)) else []


def _views(value: Any) -> Iterator[Collection[Any]]:
    """Yield live views of the lists, dicts and configs in an attribute."""
    value = vars(value) if not isinstance(value, dict | list | tuple) and _settings(value) else value
    if isinstance(value, dict | list | tuple):
        yield (inside := value.values() if isinstance(value, dict) else value)
        for one in inside:
            yield from _views(one)


@lru_cache(maxsize=1000)
def text_of_class(cls: type) -> str:
    """Return the name of a class and a hash of the code of its methods, the same in every run."""
    methods = [method for base in cls.__mro__ if base not in nn.Module.__mro__ for method in vars(base).values()]
    codes = [inspect.unwrap(method).__code__ for method in methods if inspect.isfunction(inspect.unwrap(method))]
    text = str(list(map(_text_of_code, codes)))
    return f"{cls.__module__}.{cls.__qualname__} {xxhash.xxh3_128_hexdigest(text.encode())}"


def _text_of_code(constant: Any) -> str:
    if isinstance(constant, frozenset):
        return str(sorted(map(repr, constant)))
    if not isinstance(constant, CodeType):
        return repr(constant)
    return f"{constant.co_code.hex()}{constant.co_names}{list(map(_text_of_code, constant.co_consts))}"
