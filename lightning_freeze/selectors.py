"""From a selector to the parameters it names, or to an error that says what would have been right."""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

_KINDS = "A selector is a string, a callable or a list of them"


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


def resolve(
    module: nn.Module, select: Selector, *, given: str = "select={}", partial: bool = False
) -> dict[str, nn.Parameter]:
    """Like :func:`select_parameters`.

    Args:
        module: Any module.
        select: One selector or a list of them.
        given: How an error shows the selector, with ``{}`` for the pattern.
        partial: A pattern that matches nothing is passed over, and it is fine if none is left.
    """
    module = unwrapped(module)
    entries = _entries(module.named_parameters(remove_duplicate=False))
    chosen = _chosen(entries, _named_modules(module), select, given, "parameter", partial=partial)
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


def overlay(module: nn.Module, selects: Sequence[Selector], *, given: str = "select={}") -> dict[str, Selector]:
    """Return, for each parameter that one of several selectors names, the last selector that does.

    Raises:
        ValueError: If a selector matches nothing, or if later ones leave it nothing.
    """
    owner: dict[str, Selector] = {}
    for select in selects:
        owner.update(dict.fromkeys(resolve(module, select, given=given), select))
    for select in selects:
        if not any(holder is select for holder in owner.values()):
            mine = resolve(module, select, given=given)
            for other in selects:
                if other is not select and resolve(module, other, given=given).keys() == mine.keys():
                    raise ValueError(
                        f"{given.format(repr(selector_text(select)))} names the same parameters as "
                        f"{selector_text(other)!r}: {', '.join(mine)}. Tied parameters are one. Keep one of the two."
                    )
            raise ValueError(
                f"{given.format(repr(selector_text(select)))} is left with no parameter: later selectors name all of "
                "them, and the later one holds. Put the wider selector first."
            )
    return owner


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


def as_patterns(select: Selector) -> list[str | Predicate]:
    """Give a selector as a list of its patterns.

    Raises:
        TypeError: If it is neither a string, a callable nor a list of them; a module and a class are neither.

    Example:
        >>> as_patterns("head"), as_patterns(("*", "!head"))
        (['head'], ['*', '!head'])
    """
    patterns = [select] if isinstance(select, str) or callable(select) else select
    if not isinstance(patterns, Iterable) or isinstance(patterns, Mapping):
        raise TypeError(f"{_KINDS}, not {select!r}.")
    patterns = list(patterns)
    for pattern in patterns:
        if isinstance(pattern, type):
            raise TypeError(
                f'{_KINDS}, not the class {pattern.__name__}. Give "type:{pattern.__name__}" for its layers.'
            )
        if isinstance(pattern, nn.Module):
            kind = type(pattern).__name__
            raise TypeError(
                f'{_KINDS}, not a module ({kind}). Give its dotted name, for example "backbone.layer4", or '
                f'"type:{kind}" for all of its class.'
            )
        if not isinstance(pattern, str) and not callable(pattern):
            raise TypeError(f"{_KINDS}, not {pattern!r} in {select!r}.")
    return patterns


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
    entries: list[_Entry],
    modules: list[tuple[str, nn.Module]],
    select: Selector,
    given: str,
    kind: str,
    *,
    partial: bool = False,
) -> set[int]:
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
        pattern = written[1:] if isinstance(written, str) and takes_away else written
        found = _matches(pattern, shown, entries, modules)
        if not found and not partial:
            raise ValueError(f"{shown} matches no {kind}.{_hint(pattern, entries, modules)}")
        chosen = chosen - found if takes_away else chosen | found
    if not chosen and not partial:
        shown = given.format(f"[{', '.join(map(_quote, patterns))}]")
        why = "what it adds, it takes away again" if patterns else 'it is empty. For everything, give "*"'
        raise ValueError(f"{shown} selects nothing: {why}.")
    return chosen


def _matches(
    pattern: str | Predicate, shown: str, entries: list[_Entry], modules: list[tuple[str, nn.Module]]
) -> set[int]:
    if callable(pattern):
        return {id(entry.tensor) for entry in entries if pattern(entry.name, entry.tensor)}
    if pattern.startswith("type:"):
        return {
            id(tensor) for module in _of_class(pattern, modules) for tensor in (*module.parameters(), *module.buffers())
        } & {id(entry.tensor) for entry in entries}
    for accepts in _name_tests(pattern, shown):
        if found := {id(entry.tensor) for entry in entries if any(accepts(name) for name in entry.names)}:
            return found
    return set()


def _of_class(pattern: str, modules: list[tuple[str, nn.Module]]) -> list[nn.Module]:
    wanted = pattern.removeprefix("type:").strip()
    return [module for _, module in modules if wanted in _class_names(type(module))]


def _name_tests(pattern: str, shown: str) -> Iterator[Callable[[str], bool]]:
    """Give what a name must pass, the next one for when none passes the one before."""
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{shown} is no regular expression: {error}.") from error
        yield lambda name: expression.fullmatch(name) is not None
        return
    pattern = clean_name(pattern)
    if pattern == "*":
        yield lambda name: True
        return
    # Before globs: a key of a ParameterDict can have brackets in it.
    yield lambda name: name == pattern or name.startswith(f"{pattern}.")
    if _is_glob(pattern):
        # A leading "*." also stands for no module at all, so that "*.bias" finds the bias of a bare layer.
        globs = [pattern, pattern.removeprefix("*.")]
        glob = re.compile("|".join(fnmatch.translate(one) for one in globs))
        yield lambda name: any(glob.match(part) for part in _self_and_ancestors(name))


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
    below = [name for name, _ in modules if name]
    hint = ""
    if isinstance(pattern, str):
        if pattern in below:
            hint += f' There is a module "{pattern}", but it has none.'
        elif pattern.startswith("type:") and _of_class(pattern, modules):
            hint += " There are modules of that class, but they have none."
        elif close := _closest(
            pattern, sorted({*below, *(name for entry in entries for name in entry.names)}), modules
        ):
            hint += f" Did you mean {' or '.join(_quote(name) for name in close)}?"
    tops = list(dict.fromkeys(name.split(".")[0] for name in below))
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
        return [f"type:{name}" for name in _close(pattern.removeprefix("type:").rpartition(".")[2], classes, 2)]
    if pattern.startswith("re:"):
        return _close(_literal(pattern.removeprefix("re:")), names, 2)
    mended = _mended(pattern, names)
    if mended:
        return [mended]
    return [] if _is_glob(pattern) else _close(pattern, names, 2)


def _close(word: str, names: list[str], most: int) -> list[str]:
    """Give the names that are closest to a word, whatever their case."""
    folded = {name.casefold(): name for name in names}
    return [folded[name] for name in difflib.get_close_matches(word.casefold(), folded, n=most)]


def _literal(expression: str) -> str:
    """Give what is left of a regular expression when everything that stands for something else is left out."""
    text = re.sub(r"(?<!\\)\.[*+?]?|\\\w|[][(){}^$|?*+]", "", expression)
    return text.replace("\\", "").strip(".")


def _mended(pattern: str, names: list[str]) -> str | None:
    """Replace each literal segment that occurs nowhere by the closest one that does, if that then matches."""
    segments = sorted({segment for name in names for segment in name.split(".")})

    def nearest(text: str) -> str:
        return text if text in segments else next(iter(_close(text, segments, 1)), text)

    parts = []
    for part in pattern.split("."):
        if not _is_glob(part):
            parts.append(nearest(part))
        elif any(fnmatch.fnmatchcase(segment, part) for segment in segments):
            parts.append(part)
        else:
            parts.append(re.sub(r"[^*?[\]]+", lambda literal: nearest(literal[0]), part))
    mended = ".".join(parts)
    fits = any(accepts(name) for accepts in _name_tests(mended, mended) for name in names)
    return mended if mended != pattern and fits else None
