"""Selectors: from patterns to the parameters and modules that they name, or to an error that suggests a fix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_freeze.patterns import expressions, nearest, sliced, split_slice
from lightning_freeze.words import check_takes, closest

Predicate: TypeAlias = Callable[[str, Any], bool]

#: What to select: a name, a glob, ``"re:…"``, ``"type:…"``, ``"!…"``, ``"*"``, a predicate, or a list of them.
# Lists come before predicates: LightningCLI writes a value into its config.yaml as the first kind that it could be.
Selector: TypeAlias = str | Sequence[str | Predicate] | Predicate

# The segments that torch.compile, FSDP1 and activation checkpointing put into names.
_WRAPPED = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
_PARAMETRIZED = re.compile(r"\bparametrizations\.([^.]+)\..*")

_KINDS = "A selector is a string, a callable or a list of them"


def clean_name(name: str) -> str:
    """Return a dotted name without the segments that wrappers put into it."""
    return _WRAPPED.sub("", name).removeprefix(".")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of (Distributed)DataParallel and ``torch.compile``, or the module itself."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        # Not by getattr(): a wrapper that passes it on would answer for a compiled module inside of it.
        elif inner := [child for name, child in module.named_children() if name == "_orig_mod"]:
            module = inner[0]
        else:
            return module


def named_unique_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter once, tied ones under their first name, names without wrapper segments."""
    return {clean_name(name): parameter for name, parameter in unwrapped(module).named_parameters()}


def select_parameters(module: nn.Module, select: Selector) -> dict[str, nn.Parameter]:
    r"""Return the parameters that a selector names.

    ======================== ==================================================================
    selector                 means
    ======================== ==================================================================
    ``"backbone.layer4"``    that parameter, or every parameter below that module
    ``"encoder.layer[-4:]"`` members of an ``nn.ModuleList``, ``nn.Sequential`` or ``nn.ParameterList``
    ``"backbone.*.bias"``    glob over dotted parameter or module names; ``*`` crosses dots
    ``"re:.*\.norm\d\..*"``  regular expression, full match on parameter names
    ``"type:BatchNorm2d"``   parameters of every module of that class or a subclass
    ``"!backbone.layer4.1"`` takes away from what the list selected before it
    ``"*"``                  everything
    ``lambda name, p: …``    predicate
    ======================== ==================================================================

    Args:
        module: Any module. Wrappers (``torch.compile``, DDP, FSDP) do not show in the names.
        select: One selector or a list of them, read from left to right as in ``.gitignore``.

    Returns:
        Name to parameter, in the module's own order; a tied parameter once, under its first name. One that is
        parametrized is found by the name that it had, too.

    Raises:
        TypeError: If ``select`` is neither a string, a callable nor a list of them.
        ValueError: If a pattern matches nothing, or if nothing is left at the end.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> list(select_parameters(net, ["*", "!type:BatchNorm1d", "!*.bias"]))
        ['0.weight', '2.weight']
        >>> select_parameters(net, "3")
        Traceback (most recent call last):
        ValueError: select="3" matches no parameter.
        Top-level modules: 0, 1, 2.
    """
    return resolve(module, select)


def resolve(
    module: nn.Module, select: Selector, *, given: str = "select={}", partial: bool = False
) -> dict[str, nn.Parameter]:
    """Return what :func:`select_parameters` does; an error shows the selector as ``given``, ``{}`` being the pattern.

    If ``partial``, patterns may match nothing, and nothing may be left.
    """
    module = unwrapped(module)
    names = _Names(module, module.named_parameters(remove_duplicate=False))
    return cast("dict[str, nn.Parameter]", names.choose(select, given, "parameter", partial=partial))


def select_layers(
    module: nn.Module, select: Selector, keep: Callable[[nn.Module], bool], *, given: str = "select={}"
) -> dict[str, nn.Module]:
    """Return the modules that ``keep`` accepts and of which a selector names a parameter or a buffer.

    Buffers count, so that layers without parameters (``affine=False``) can be named too.
    """
    module = unwrapped(module)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    if not tensors and select == "*":
        return {}
    chosen = set(map(id, _Names(module, tensors).choose(select, given, "parameter or buffer").values()))

    def is_chosen(layer: nn.Module) -> bool:
        own = chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
        return not chosen.isdisjoint(map(id, own))

    return {clean_name(name): one for name, one in module.named_modules() if keep(one) and is_chosen(one)}


def overlay(module: nn.Module, selects: Sequence[Selector], *, given: str = "select={}") -> dict[str, Selector]:
    """Return the last of several selectors that names it, for each parameter; refuse one that is left none."""
    names = _Names(module := unwrapped(module), module.named_parameters(remove_duplicate=False))
    named = [(select, list(names.choose(select, given, "parameter"))) for select in selects]
    owner = {name: select for select, mine in named for name in mine}
    for select, mine in named:
        if any(holder is select for holder in owner.values()):
            continue
        shown = given.format(repr(selector_text(select)))
        for other, theirs in named:
            if other is not select and theirs == mine:
                raise ValueError(
                    f"{shown} names the same parameters as {selector_text(other)!r}: {', '.join(mine)}. Tied "
                    "parameters are one. Keep one of the two."
                )
        raise ValueError(
            f"{shown} is left with no parameter: later selectors name all of them, and the later one holds. Put the "
            "wider selector first."
        )
    return owner


def selector_text(select: Selector) -> str:
    """Return a selector as text, the same in every run."""
    if isinstance(select, str):
        return select
    if callable(select):
        return str(getattr(select, "__qualname__", type(select).__qualname__))
    return ", ".join(selector_text(one) for one in select)


def as_patterns(select: Selector) -> list[str | Predicate]:
    """Return a selector as a list of its patterns; raise if it is none, as a module and a class are not."""
    patterns = [select] if isinstance(select, str) or callable(select) else select
    if not isinstance(patterns, Iterable) or isinstance(patterns, Mapping):
        raise TypeError(f"{_KINDS}, not {select!r}.")
    patterns = list(patterns)
    for pattern in patterns:
        kind, wrong = type(pattern).__name__, ""
        by_name = 'Give its dotted name, for example "backbone.layer4"'
        if isinstance(pattern, type):
            wrong = f'the class {pattern.__name__}. Give "type:{pattern.__name__}" for its layers'
        elif isinstance(pattern, nn.Module):
            wrong = f'a module ({kind}). {by_name}, or "type:{kind}" for all of its class'
        elif isinstance(pattern, Tensor):
            wrong = f"a tensor ({kind}). {by_name}"
        elif not isinstance(pattern, str) and not callable(pattern):
            wrong = f"{pattern!r} in {select!r}"
        if wrong:
            raise TypeError(f"{_KINDS}, not {wrong}.")
        if callable(pattern):
            check_takes(selector_text(pattern), pattern, "name", "parameter")
    return patterns


class _Names:
    """The tensors of a module under all the names that they have, for patterns to match."""

    def __init__(self, module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.modules = [(clean_name(name), child) for name, child in module.named_modules(remove_duplicate=False)]
        self.tensors: dict[int, Tensor] = {}
        self.names: dict[int, list[str]] = {}
        for name, tensor in tensors:
            self.tensors[id(tensor)] = tensor
            known = clean_name(name)
            self.names.setdefault(id(tensor), []).extend({known: None, _PARAMETRIZED.sub(r"\1", known): None})

    def choose(self, select: Selector, given: str, kind: str, *, partial: bool = False) -> dict[str, Tensor]:
        """Return the tensors that a selector names, in the module's order; arguments as of :func:`resolve`."""
        chosen: set[int] = set()
        patterns = as_patterns(select)
        for position, written in enumerate(patterns):
            shown = given.format(_quote(written))
            takes_away = isinstance(written, str) and written.startswith("!")
            if takes_away and position == 0:
                raise ValueError(
                    f"{shown} takes away from nothing: it comes first. "
                    f'Say what it takes away from, for example ["*", {_quote(written)}].'
                )
            pattern = written.removeprefix("!") if isinstance(written, str) else written
            found = self.matches(pattern, shown)
            if not found and not partial:
                raise ValueError(f"{shown} matches no {kind}.{self.hint(pattern)}")
            chosen = chosen - found if takes_away else chosen | found
        if not chosen and not partial:
            shown = given.format(f"[{', '.join(map(_quote, patterns))}]")
            why = "what it adds, it takes away again" if patterns else 'it is empty. For everything, give "*"'
            raise ValueError(f"{shown} selects nothing: {why}.")
        return {names[0]: self.tensors[key] for key, names in self.names.items() if key in chosen}

    def matches(self, pattern: str | Predicate, shown: str) -> set[int]:
        """Return the identities of the tensors that a pattern matches."""
        if callable(pattern):
            return {key for key, names in self.names.items() if pattern(names[0], self.tensors[key])}
        if pattern.startswith("type:"):
            inside = (id(p) for module in self.of_class(pattern) for p in chain(module.parameters(), module.buffers()))
            return set(inside) & self.names.keys()
        pattern = clean_name(pattern)
        parts = sliced(pattern, self.lists, shown) if "[" in pattern else []
        return set[int]().union(*(self.named(part, shown) for part in parts or [pattern]))

    def named(self, pattern: str, shown: str) -> set[int]:
        """Return the identities of the tensors of a name or, if there are none, of a glob."""
        for expression in expressions(pattern, shown):
            if found := {key for key, names in self.names.items() if any(map(expression.fullmatch, names))}:
                return found
        return set()

    @property
    def lists(self) -> dict[str, list[str]]:
        """The names of the lists of modules, each with the names of its members."""
        kinds = nn.ModuleList | nn.Sequential | nn.ParameterList
        lists = {name: list[str]() for name, one in self.modules if isinstance(one, kinds)}
        for name in dict.fromkeys(chain(filter(None, dict(self.modules)), *self.names.values())):
            lists.get(name.rpartition(".")[0], []).append(name)
        return lists

    def of_class(self, pattern: str) -> list[nn.Module]:
        """Return the modules of the class in a ``"type:…"`` pattern."""
        return [one for _, one in self.modules if pattern.removeprefix("type:").strip() in _class_names(type(one))]

    def hint(self, pattern: str | Predicate) -> str:
        """Return what would have been right: the closest names, and the top-level modules."""
        below = [name for name, _ in self.modules if name]
        hint, close = "", list[str]()
        if isinstance(pattern, str):
            if pattern in below:
                hint = f' There is a module "{pattern}", but it has none.'
            elif (of := split_slice(pattern)[0]) != pattern and of in set(below) - self.lists.keys():
                hint = f' "{of}" is no nn.ModuleList or nn.Sequential.'
            elif not pattern.startswith("type:"):
                close = nearest(pattern, sorted({*below, *chain.from_iterable(self.names.values())}))
            elif self.of_class(pattern):
                hint = " There are modules of that class, but they have none."
            else:
                classes = sorted({base.__name__ for _, module in self.modules for base in type(module).__mro__[:-1]})
                meant = closest(pattern.removeprefix("type:").rpartition(".")[2], classes, most=2)
                close = [f"type:{name}" for name in meant]
        if close:
            hint = f" Did you mean {' or '.join(map(_quote, close))}?"
        if below:
            return f"{hint}\nTop-level modules: {', '.join(dict.fromkeys(name.split('.')[0] for name in below))}."
        if self.names:
            return f"{hint}\nParameters: {', '.join(names[0] for names in self.names.values())}."
        return f"{hint}\nThe module has no parameters yet."


def _class_names(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in (base.__name__, f"{base.__module__}.{base.__qualname__}")}


def _quote(pattern: str | Predicate) -> str:
    return json.dumps(pattern, ensure_ascii=False) if isinstance(pattern, str) else selector_text(pattern)
