"""From a selector to the parameters it names, or to an error that says what would have been right."""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Predicate: TypeAlias = Callable[[str, Any], bool]

#: What to select: a name, a glob, ``"re:…"``, ``"type:…"``, ``"!…"``, ``"*"``, a predicate, or a list of them.
# Lists come before predicates: LightningCLI writes a value into its config.yaml as the first kind that it could be.
Selector: TypeAlias = str | Sequence[str | Predicate] | Predicate

# The segments that torch.compile, FSDP1 and activation checkpointing put into names.
_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPED = re.compile("|".join(_WRAPPER_SEGMENTS))


def clean_name(name: str) -> str:
    """Give a dotted name without the segments that wrappers put into it.

    Example:
        >>> clean_name("backbone._orig_mod.conv.weight")
        'backbone.conv.weight'
    """
    if _WRAPPED.search(name) is None:  # most names, and there can be thousands of them
        return name
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def unwrapped(module: nn.Module) -> nn.Module:
    """Give the module inside wrappers, of (Distributed)DataParallel and ``torch.compile``, or the module itself."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def named_unique_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Give every parameter once, tied ones under their first name, names without wrapper segments."""
    return {clean_name(name): parameter for name, parameter in unwrapped(module).named_parameters()}


def select_parameters(module: nn.Module, select: Selector) -> dict[str, nn.Parameter]:
    r"""Give the parameters that a selector names.

    ======================== ==================================================================
    selector                 means
    ======================== ==================================================================
    ``"backbone.layer4"``    that parameter, or every parameter below that module
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
        Name to parameter, in the module's own order; a tied parameter once, under its first name.

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


def resolve(module: nn.Module, select: Selector, *, given: str = "select={}") -> dict[str, nn.Parameter]:
    """Like :func:`select_parameters`; ``given`` is how an error shows the selector, with ``{}`` for the pattern."""
    module = unwrapped(module)
    entries = _entries(module.named_parameters(remove_duplicate=False))
    chosen = _chosen(entries, _named_modules(module), select, given, "parameter")
    return {entry.name: entry.tensor for entry in entries if id(entry.tensor) in chosen}  # type: ignore[misc]


def select_layers(
    module: nn.Module, select: Selector, keep: Callable[[nn.Module], bool], *, given: str = "select={}"
) -> dict[str, nn.Module]:
    """Give the modules that ``keep`` accepts and of which a selector names a parameter or a buffer.

    Buffers count, so that layers without parameters (``affine=False``) can be named too.
    """
    module = unwrapped(module)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    modules = _named_modules(module)
    if not tensors and select == "*":
        return {}
    chosen = _chosen(_entries(tensors), modules, select, given, "parameter or buffer")
    layers: dict[str, nn.Module] = {}
    for name, layer in modules:
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if layer not in layers.values() and keep(layer) and any(id(tensor) in chosen for tensor in own):
            layers[name] = layer
    return layers


def selector_text(select: Selector) -> str:
    """Give a selector as text, the same in every run.

    Example:
        >>> selector_text(["head", "!head.bias"])
        'head, !head.bias'
    """
    if isinstance(select, str):
        return select
    if callable(select):
        return str(getattr(select, "__qualname__", type(select).__qualname__))
    return ", ".join(selector_text(one) for one in select)


@dataclass(frozen=True)
class _Entry:
    """One tensor with all the names it has; the first one is the one it is called by."""

    names: tuple[str, ...]
    tensor: Tensor

    @property
    def name(self) -> str:
        return self.names[0]


def _entries(named: Iterable[tuple[str, Tensor]]) -> list[_Entry]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in named:
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(clean_name(name))
    return [_Entry(tuple(names[key]), tensor) for key, tensor in tensors.items()]


def _named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(clean_name(name), child) for name, child in module.named_modules(remove_duplicate=False)]


def _chosen(
    entries: list[_Entry], modules: list[tuple[str, nn.Module]], select: Selector, given: str, kind: str
) -> set[int]:
    chosen: set[int] = set()
    patterns = _as_list(select)
    for position, pattern in enumerate(patterns):
        if isinstance(pattern, str) and pattern.startswith("!"):
            if position == 0:
                raise ValueError(
                    f"{given.format(_quote(pattern))} takes away from nothing: it comes first. "
                    f'Say what it takes away from, for example ["*", {_quote(pattern)}].'
                )
            chosen -= _matches(pattern[1:], pattern, entries, modules, given, kind)
        else:
            chosen |= _matches(pattern, pattern, entries, modules, given, kind)
    if not chosen:
        shown = ", ".join(_quote(pattern) for pattern in patterns)
        raise ValueError(f"{given.format(f'[{shown}]')} selects nothing: what it adds, it takes away again.")
    return chosen


def _as_list(select: Selector) -> list[str | Predicate]:
    patterns = [select] if isinstance(select, str) or callable(select) else select
    if not isinstance(patterns, Iterable) or isinstance(patterns, Mapping):
        raise TypeError(f"A selector is a string, a callable or a list of them, not {select!r}.")
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) and not callable(pattern):
            raise TypeError(f"A selector is a string, a callable or a list of them, not {pattern!r} in {select!r}.")
    return patterns


def _matches(
    pattern: str | Predicate,
    written: str | Predicate,
    entries: list[_Entry],
    modules: list[tuple[str, nn.Module]],
    given: str,
    kind: str,
) -> set[int]:
    shown = given.format(_quote(written))
    if callable(pattern):
        found = {id(entry.tensor) for entry in entries if pattern(entry.name, entry.tensor)}
    elif pattern.startswith("type:"):
        wanted = pattern.removeprefix("type:").strip()
        found = {
            id(tensor)
            for _, module in modules
            if wanted in _class_names(type(module))
            for tensor in (*module.parameters(), *module.buffers())
        } & {id(entry.tensor) for entry in entries}
    else:
        accepts = _name_test(pattern, shown)
        found = {id(entry.tensor) for entry in entries if any(accepts(name) for name in entry.names)}
    if not found:
        raise ValueError(f"{shown} matches no {kind}.{_hint(pattern, entries, modules)}")
    return found


def _name_test(pattern: str, shown: str) -> Callable[[str], bool]:
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{shown} is no regular expression: {error}.") from error
        return lambda name: expression.fullmatch(name) is not None
    pattern = clean_name(pattern)
    if pattern == "*":
        return lambda name: True
    if not _is_glob(pattern):
        return lambda name: name == pattern or name.startswith(f"{pattern}.")
    # A leading "*." also stands for no module at all, so that "*.bias" finds the bias of a bare layer.
    globs = [pattern, pattern.removeprefix("*.")]
    glob = re.compile("|".join(fnmatch.translate(one) for one in globs))
    return lambda name: any(glob.match(part) for part in _self_and_ancestors(name))


def _self_and_ancestors(name: str) -> Iterable[str]:
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _class_names(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in (base.__name__, f"{base.__module__}.{base.__qualname__}")}


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _quote(pattern: str | Predicate) -> str:
    if isinstance(pattern, str):
        return json.dumps(pattern, ensure_ascii=False)
    return str(getattr(pattern, "__qualname__", repr(pattern)))


def _hint(pattern: str | Predicate, entries: list[_Entry], modules: list[tuple[str, nn.Module]]) -> str:
    """Say what would have been right: the closest names and the top-level modules."""
    names = sorted({name for name, _ in modules if name} | {name for entry in entries for name in entry.names})
    hint = ""
    if isinstance(pattern, str):
        if pattern in names:
            hint += f' There is a module "{pattern}", but it has none.'
        elif close := _closest(pattern, names, modules):
            hint += f" Did you mean {' or '.join(_quote(name) for name in close)}?"
    tops = list(dict.fromkeys(name.split(".")[0] for name, _ in modules if name))
    if tops:
        hint += f"\nTop-level modules: {', '.join(tops)}."
    elif entries:
        hint += f"\nParameters: {', '.join(entry.name for entry in entries)}."
    else:
        hint += "\nThe module has no parameters yet."
    return hint


def _closest(pattern: str, names: list[str], modules: list[tuple[str, nn.Module]]) -> list[str]:
    if pattern.startswith("type:"):
        classes = sorted({base.__name__ for _, module in modules for base in type(module).__mro__} - {"object"})
        close = difflib.get_close_matches(pattern.removeprefix("type:"), classes, n=2)
        return [f"type:{name}" for name in close]
    if pattern.startswith("re:"):
        return []
    mended = _mended(pattern, names)
    if mended:
        return [mended]
    return [] if _is_glob(pattern) else difflib.get_close_matches(pattern, names, n=2)


def _mended(pattern: str, names: list[str]) -> str | None:
    """Replace each literal segment that occurs nowhere by the closest one that does, if that then matches."""
    segments = sorted({segment for name in names for segment in name.split(".")})
    parts = []
    for part in pattern.split("."):
        if part in segments or _is_glob(part):
            parts.append(part)
        elif close := difflib.get_close_matches(part, segments, n=1):
            parts.append(close[0])
        else:
            return None
    mended = ".".join(parts)
    accepts = _name_test(mended, mended)
    return mended if mended != pattern and any(accepts(name) for name in names) else None
