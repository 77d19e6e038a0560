"""Dotted names: those that count up as one, branches of the tree that they make, and the module of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TypeVar

from torch import nn

from lightning_freeze.patterns import nearest
from lightning_freeze.selectors import clean_name

T = TypeVar("T")


def runs(names: Iterable[str]) -> list[str]:
    """Return names, those that only differ in a number at their end as one.

    Example:
        >>> runs(["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.7", "layer3", "layer4"])
        ['stem', 'blocks[0:3, 7]', 'layer3…4']
    """
    found = list[str]()
    for prefix, group in groupby(names, key=lambda name: name.rstrip("0123456789")):
        numbers = [name[len(prefix) :] for name in group]
        if len(numbers) == 1 or "" in numbers:
            found += [f"{prefix}{number}" for number in numbers]
        elif prefix.endswith("."):
            found.append(f"{prefix[:-1]}[{', '.join(_counted(numbers, ':', past=1))}]")
        else:
            found += [f"{prefix}{run}" for run in _counted(numbers, "…")]
    return found


def _counted(numbers: Iterable[str], between: str, *, past: int = 0) -> Iterator[str]:
    """Yield numbers as text, those that follow one another as one."""
    for _, group in groupby(enumerate(map(int, numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield f"{run[0]}{between}{run[-1] + past}" if len(run) > 1 else f"{run[0]}"


def branches(
    values: Mapping[str, T],
    *,
    depth: int | None = None,
    alike: int | None = None,
    leaves: bool = True,
    prefix: tuple[str, ...] = (),
) -> Iterator[tuple[str, list[str]]]:
    """Yield the highest branches of a tree of names in which all have the same value, each with the names in it.

    Args:
        values: Name to value, in the tree's order.
        depth: How deep branches lie at most; what is deeper may have different values.
        alike: How many neighbours with the same different values make none of them be split.
        leaves: Whether a branch that has nothing but leaves is split too.
        prefix: Where all these names begin.

    Example:
        >>> list(branches({"body.0.weight": 1, "body.0.bias": 1, "body.1.weight": 2, "head.weight": 2}))
        [('body.0', ['body.0.weight', 'body.0.bias']), ('body.1', ['body.1.weight']), ('head', ['head.weight'])]
    """
    level = len(prefix)
    children = [(segment, list(inside)) for segment, inside in groupby(values, lambda name: name.split(".")[level])]
    for found, group in groupby(children, lambda child: {values[name] for name in child[1]}):
        together = list(group)
        is_done = len(found) == 1 or depth == level + 1 or (alike is not None and len(together) >= alike)
        for segment, inside in together:
            here = (*prefix, segment)
            if is_done or not (leaves or any(name.count(".") > level + 1 for name in inside)):
                yield ".".join(here), inside
            else:
                below = {name: values[name] for name in inside}
                yield from branches(below, depth=depth, alike=alike, leaves=leaves, prefix=here)


def module_named(model: nn.Module, name: str, given: str) -> nn.Module:
    """Return the module of a dotted name, the outermost one where ``torch.compile`` put one around another.

    If there is none, a ValueError shows the name as ``given``, the closest one and the top-level modules.
    """
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(clean_name(path), module)
    if name and name in modules:
        return modules[name]
    hint = "".join(f" Did you mean {path!r}?" for path in nearest(name, [*filter(None, modules)])[:1])
    tops = ", ".join(top for top, _ in model.named_children()) or "none"
    raise ValueError(f"{given} names no module of {type(model).__name__}.{hint}\nTop-level modules: {tops}.")
