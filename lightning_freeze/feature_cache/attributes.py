"""What layers and their classes keep beside parameters, buffers and modules: what runs read and write there; code."""

from __future__ import annotations

import inspect
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
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

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


@dataclass
class Written:
    """An attribute into which runs of its module write."""

    shown: list[Any]  # what stands for it in the key
    is_same: bool = True  # after all calls of one kind, so far


#: What calls of one kind write: by attribute, what is known of it, its value, and all that is in that.
Known: TypeAlias = dict[Place, tuple[Written, Any, list[Any]]]

_written: WeakKeyDictionary[Owner, dict[str, Written]] = WeakKeyDictionary()  # for the next fit or test, too


class Attributes:
    """What is in the attributes of layers and classes now.

    Attributes:
        text: All plain values that are not written by runs.
        tensors: The tensors, if all that they are can be hashed.
        others: Functions and other objects, which have no text that says all that they do.
        aside: Where the run after this has put tensors.
    """

    aside: Place | None = None

    def __init__(self, owners: Sequence[Owner]) -> None:
        self._owners, self._found = owners, _found(owners)
        number = {owner: i for i, owner in enumerate(owners)}
        shown = self._found | {place: one.shown for place, one in _written_by(owners).items()}
        leaves = [(place, leaf) for place, inside in shown.items() for leaf in inside]
        self.text = "".join(f"{number[p[0]]}.{p[1]}={leaf!r}," for p, leaf in leaves if is_plain(leaf))
        self.tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor) and why_no_key(leaf) is None]
        self.others = [leaf for _, leaf in leaves if not isinstance(leaf, Tensor) and not is_plain(leaf)]

    def note_run(self, *, is_first: bool) -> None:
        """Note what the module has written in the run that has just ended: that is given, not read."""
        for (owner, name), leaves in _found(self._owners).items():
            before = self._found.get((owner, name), [])
            if not are_same(before, leaves):
                # What the first run writes changes no key; later on, what was kept does not know of it.
                shown = before if is_first and all(map(is_plain, before)) else ["written"]
                _written.setdefault(owner, {}).setdefault(name, Written(shown))
                if not are_same(*([leaf for leaf in one if isinstance(leaf, Tensor)] for one in (before, leaves))):
                    self.aside = owner, name

    def effect(self, known: Known, *, is_first: bool) -> str | None:
        """Bring up to date what is ``known`` of calls of one kind; return what they write that is no counter and moves.

        In its first run, a module may set up tensors that it keeps for good.
        """
        moving = [self.aside] if self.aside is not None and not is_first else []
        mine = _written_by(self._owners)
        for (owner, name), leaves in _found([owner for owner, _ in mine]).items():
            if (owner, name) in mine and all(map(is_plain, leaves)):
                one = mine[owner, name]
                *_, before = known.get((owner, name), (leaves,))
                one.is_same = one.is_same and before == leaves
                known[owner, name] = one, vars(owner)[name], leaves
                moving += [] if before == leaves or _count_up(before, leaves) else [(owner, name)]
        for owner, name in moving:
            kind = owner if isinstance(owner, type) else type(owner)
            return f"it puts what it computes into {kind.__name__}.{name}, too, where others could look for it"
        return None


def are_same(objects: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(objects) == len(others) and all(map(is_, objects, others))


def views_of(owners: Sequence[Owner]) -> list[Collection[Any]]:
    """Return live views of all attributes, and of the lists, dicts and configs in them, by which changes show."""
    once = {id(value): value for _, value in _items(owners)}.values()  # a config is in many
    return [vars(owner).values() for owner in owners] + [view for value in once for view in _views(value)]


def _count_up(old: list[Any], new: list[Any]) -> bool:
    both = zip(old, new, strict=False)
    return len(old) == len(new) and all(a is b or (type(a) is type(b) is int and a < b) for a, b in both)


def _items(owners: Iterable[Owner]) -> Iterator[tuple[Place, Any]]:
    for owner in owners:
        for name, value in vars(owner).items():
            if name not in OWN_ATTRIBUTES and not name.startswith("__"):
                yield (owner, name), value


def _found(owners: Iterable[Owner]) -> dict[Place, list[Any]]:
    return {place: _leaves(value) for place, value in _items(owners)}


def _written_by(owners: Iterable[Owner]) -> dict[Place, Written]:
    written = dict(_written)  # few, and asked without a weak reference to each owner
    mine = [owner for owner in owners if owner in written]
    return {(owner, name): one for owner in mine for name, one in written[owner].items()}


def _leaves(value: Any) -> list[Any]:
    """Return all that is in a value, and in objects that hold plain values only, such as configs."""
    if is_plain(value):  # most are
        return [value]
    return [inner for leaf in tree_leaves(value) for inner in (_settings(leaf) or [leaf])]


def _settings(leaf: Any) -> list[Any]:
    inside = [] if isinstance(leaf, (nn.Module, type, *GENERATORS)) else tree_leaves(getattr(leaf, "__dict__", {}))
    return inside if all(map(is_plain, inside)) else []


def _views(value: Any) -> Iterator[Collection[Any]]:
    if not is_plain(value) and not isinstance(value, dict | list | tuple) and _settings(value):
        value = vars(value)
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
