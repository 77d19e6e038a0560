"""Functions on plain modules: freeze, unfreeze, a summary of what trains, outputs as NumPy arrays."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserList, deque
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze.names import branches
from lightning_freeze.selectors import Selector, clean_name, named_unique_parameters, select_parameters, unwrapped
from lightning_freeze.tables import Table
from lightning_freeze.tensors import as_array
from lightning_freeze.words import percent, whole_number


def freeze(module: nn.Module, select: Selector = "*") -> dict[str, nn.Parameter]:
    """Freeze parameters: no gradient is computed for them, and one that they have is dropped.

    Args:
        module: Any module.
        select: What to freeze, see :func:`select_parameters`.

    Returns:
        Name to parameter, for what was trainable before.

    Raises:
        ValueError: If ``select`` matches nothing.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> list(freeze(net, "bias")), list(freeze(net))
        (['bias'], ['weight'])
    """
    changed = {name: p for name, p in select_parameters(module, select).items() if p.requires_grad}
    for parameter in changed.values():
        set_trainable(parameter, False)
    return changed


def unfreeze(module: nn.Module, select: Selector = "*") -> dict[str, nn.Parameter]:
    """Make parameters trainable.

    Args:
        module: Any module.
        select: What to unfreeze, see :func:`select_parameters`. Parameters that cannot require grad, because their
            dtype is neither floating nor complex, are passed over.

    Returns:
        Name to parameter, for what was frozen before.

    Raises:
        ValueError: If ``select`` matches nothing.

    Example:
        >>> net = nn.Linear(2, 1).requires_grad_(False)
        >>> list(unfreeze(net, "weight")), list(unfreeze(net))
        (['weight'], ['bias'])
    """
    selected = select_parameters(module, select)
    changed = {name: p for name, p in selected.items() if not p.requires_grad and can_train(p)}
    for parameter in changed.values():
        set_trainable(parameter, True)
    return changed


@contextmanager
def frozen(module: nn.Module, select: Selector = "*") -> Iterator[None]:
    """Freeze parameters inside a ``with`` block and restore their flags after it, also on error.

    Args:
        module: Any module; its tensors are not copied. Gradients that are already there stay.
        select: What to freeze, see :func:`select_parameters`.

    Raises:
        ValueError: If ``select`` matches nothing.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> with frozen(net, "bias"):
        ...     net(torch.ones(1, 2)).sum().backward()
        >>> net.bias.grad is None, net.bias.requires_grad
        (True, True)
    """
    parameters = select_parameters(module, select).values()
    with ExitStack() as restore:  # every flag, even if one cannot be: somebody may have made its dtype an integer
        for parameter in parameters:
            restore.callback(setattr, parameter, "requires_grad", parameter.requires_grad)
        for parameter in parameters:
            parameter.requires_grad = False
        yield


def can_train(parameter: nn.Parameter) -> bool:
    """Return whether a parameter's dtype has gradients; those of quantized layers have none."""
    return parameter.is_floating_point() or parameter.is_complex()


def scalars(parameter: nn.Parameter) -> int:
    """Return the number of scalars, 0 for a parameter of a lazy module that has not seen its first batch."""
    return 0 if is_lazy(parameter) else parameter.numel()


def topmost(module: nn.Module, chosen: Collection[int]) -> list[str]:
    """Return the names of the highest modules of which everything that can train is chosen, else of parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> topmost(net, {id(net[0].bias), id(net[1].weight), id(net[1].bias)})
        ['0.bias', '1']
    """
    parameters = module.named_parameters(remove_duplicate=False)
    is_chosen = {clean_name(name): id(p) in chosen for name, p in parameters if can_train(p)}
    return [branch for branch, inside in branches(is_chosen) if is_chosen[inside[0]]]


def set_trainable(parameter: nn.Parameter, trainable: bool) -> None:
    """Set the flag, and drop the gradient of a parameter that freezes: a step would still apply it."""
    parameter.requires_grad = trainable  # not by requires_grad_(), which lazy parameters refuse
    if not trainable:
        parameter.grad = None


@dataclass(frozen=True)
class SummaryRow:
    """How many scalars one module has, and how many of them train."""

    name: str
    kind: str
    trainable: int
    total: int


@dataclass(frozen=True)
class TrainableSummary:
    """How much of a module trains; print it for a table.

    Args:
        rows: One for each module that has parameters, at one depth, and one for each parameter above it.
    """

    rows: tuple[SummaryRow, ...]

    @property
    def trainable(self) -> int:
        """How many scalars require grad."""
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        """How many scalars there are."""
        return sum(row.total for row in self.rows)

    @property
    def fraction(self) -> float:
        """The trainable share, 0.0 for a module without parameters."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        return self._table()._repr_html_()

    def _table(self) -> Table:
        rows = [*self.rows, SummaryRow("total", "", self.trainable, self.total)]
        cells = [(r.name, r.kind, f"{r.trainable:,}", f"{r.total:,}", percent(r.trainable, r.total)) for r in rows]
        return Table(("module", "type", "trainable", "total", "share"), cells)


def trainable_summary(module: nn.Module, depth: int = 1) -> TrainableSummary:
    """Return how much of a module trains; a tied parameter counts once, where it comes first.

    Args:
        module: Any module.
        depth: How deep the modules are that get a row each, at least 1. It counts from where there is more than one
            module: below ``model`` in a LightningModule that has nothing else with parameters.

    Returns:
        An object with ``trainable``, ``total``, ``fraction`` and ``rows``; print it for a table.

    Raises:
        ValueError: If ``depth`` is below 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> _ = freeze(net, "0")
        >>> print(trainable_summary(net))
        module  type    trainable  total    share
        ------  ------  ---------  -----  -------
        0       Linear          0      9    0.0 %
        1       Linear          4      4  100.0 %
        total                   4     13   30.8 %
    """
    depth = whole_number("trainable_summary", "depth", depth) + _wrappers(unwrapped(module))
    modules = {clean_name(name): child for name, child in unwrapped(module).named_modules(remove_duplicate=False)}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_unique_parameters(module).items():
        row = ".".join(name.split(".")[:depth])
        owner = row.rpartition(".")[0]
        is_of_a_layer = row not in modules and owner and not list(modules[owner].children())
        found.setdefault(owner if is_of_a_layer else row, []).append(parameter)
    rows = []
    for row, own in found.items():
        kind = type(modules[row]).__name__ if row in modules else "Parameter"
        rows.append(SummaryRow(row, kind, sum(scalars(p) for p in own if p.requires_grad), sum(map(scalars, own))))
    return TrainableSummary(tuple(rows))


def _wrappers(module: nn.Module) -> int:
    """Return how many modules, one inside of the other, have nothing but one that is made of modules itself."""
    children = [child for child in map(unwrapped, module.children()) if any(True for _ in child.parameters())]
    if any(True for _ in module.parameters(recurse=False)) or len(children) != 1 or not list(children[0].children()):
        return 0
    return 1 + _wrappers(children[0])


def to_numpy(outputs: Any) -> Any:
    """Return the same nest of dicts, lists and tuples with every tensor as a NumPy array: copies, not views.

    Args:
        outputs: A tensor, or any nest of mappings, lists, tuples (also named ones) and dataclasses that holds tensors.
            Anything else in it is passed on as it is.

    Returns:
        The nest, each tensor detached, moved to the CPU and made an array of the same shape and dtype. No array shares
        memory with its tensor, so training on does not change it. Floating dtypes that NumPy does not know (bfloat16,
        float8) and quantized ones become float32, complex32 becomes complex64; sparse tensors become dense.

    Example:
        >>> import torch
        >>> to_numpy({"loss": torch.tensor(0.5, requires_grad=True), "preds": [torch.ones(2, dtype=torch.bfloat16)]})
        {'loss': array(0.5, dtype=float32), 'preds': [array([1., 1.], dtype=float32)]}
    """
    if isinstance(outputs, Tensor):
        return as_array(outputs)
    if isinstance(outputs, tuple):
        items = list(map(to_numpy, outputs))
        try:
            return tuple.__new__(type(outputs), items)  # whatever arguments its own __new__ takes
        except TypeError:
            return type(outputs)(items)  # one that is written in C, such as torch.return_types.max
    if isinstance(outputs, Mapping) and not isinstance(outputs, MutableMapping):
        return type(outputs)({key: to_numpy(value) for key, value in outputs.items()})  # type: ignore[call-arg]
    is_record = dataclasses.is_dataclass(outputs) and not isinstance(outputs, type)
    if not is_record and not isinstance(outputs, MutableMapping | list | deque | UserList):
        return outputs
    twin = copy.copy(outputs)
    if not is_record or isinstance(twin, MutableMapping):
        for key in list(twin) if isinstance(twin, MutableMapping) else range(len(twin)):
            twin[key] = to_numpy(twin[key])
    for field in dataclasses.fields(twin) if is_record else ():
        if hasattr(twin, field.name):
            object.__setattr__(twin, field.name, to_numpy(getattr(twin, field.name)))  # it may be frozen
    return twin
