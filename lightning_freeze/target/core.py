"""A module that follows another of the same architecture, by hard copies or by a Polyak average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze.selectors import clean_name, named_unique_parameters
from lightning_freeze.tensors import copy_all, lerp_all
from lightning_freeze.words import listed


@dataclass(frozen=True)
class Pair:
    """One tensor of the source and the one of the same name in the target, by the modules that own them."""

    name: str
    source: nn.Module
    target: nn.Module

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The source's tensor and the target's, as they are now: user code may assign a buffer anew."""
        return _tensor(self.source, self.name), _tensor(self.target, self.name)


def pair_up(
    source: nn.Module, target: nn.Module, *, buffers: bool = True, names: tuple[str, str] = ("source", "target")
) -> list[Pair]:
    """Return a pair for every parameter, tied ones once, and every buffer that ``load_state_dict`` copies.

    Raises:
        ValueError: If names, shapes or dtypes differ or are not known yet, the two share parameters, or have none.

    Example:
        >>> pair_up(nn.Linear(2, 3), nn.Linear(2, 4, bias=False))
        Traceback (most recent call last):
        ValueError: The target does not have the architecture of the source.
        Only in source: bias.
        Different: weight is (3, 2) float32 in source, (4, 2) float32 in target.
    """
    owners = [dict(_owners(module, buffers)) for module in (source, target)]
    described = [{name: _described(_tensor(owner, name)) for name, owner in one.items()} for one in owners]
    for which, own in zip(names, described, strict=True):
        if lazy := [name for name, what in own.items() if what is None]:
            raise ValueError(
                f"The {which} has lazy tensors, which get their shape in its first forward: {listed(lazy)}. Run a "
                "batch through it in __init__ or configure_model, and then build the target with copy.deepcopy."
            )
    if complaints := list(_differences(described[0], described[1], names)):
        raise ValueError("\n".join([f"The {names[1]} does not have the architecture of the {names[0]}.", *complaints]))
    if not owners[0]:
        raise ValueError(f"The {names[0]} and the {names[1]} have no parameters, so there is nothing to copy.")
    if shared := shared_parameters(target, source.parameters()):
        raise ValueError(
            f"The {names[1]} shares parameters with the {names[0]}: {listed(shared)}. It cannot follow what it is. "
            "Build it with copy.deepcopy."
        )
    return [Pair(name, owner, owners[1][name]) for name, owner in owners[0].items()]


@torch.no_grad()
def hard_copy(pairs: Sequence[Pair]) -> None:
    """Copy the source into the target, in place."""
    for fractions in (True, False):  # one kernel works on one dtype
        copy_all(*_tensors(pairs, fractions=fractions))


@torch.no_grad()
def polyak_average(pairs: Sequence[Pair], tau: float) -> None:
    """Move the target a little towards the source, in place: ``target += tau * (source - target)``.

    Tensors without fractions, such as a counter of batches, are copied.
    """
    tau = checked_tau("polyak_average", tau)
    lerp_all(*_tensors(pairs, fractions=True), tau)
    copy_all(*_tensors(pairs, fractions=False))


def checked_tau(where: str, tau: object) -> float:
    """Return ``tau`` as a float, also if it is one of NumPy's."""
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(
            f"{where}(tau={tau!r}): it is a number in [0, 1], for example 0.005, or a function of the step."
        )
    if not 0 <= float(tau) <= 1:
        raise ValueError(f"{where}(tau={tau!r}): it is in [0, 1], for example 0.005. 1 copies, 0 stays.")
    return float(tau)


def shared_parameters(module: nn.Module, others: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of a module's parameters that share memory with one of ``others``."""
    theirs = {_address(parameter) for parameter in others}
    return [name for name, parameter in named_unique_parameters(module).items() if _address(parameter) in theirs]


def _owners(module: nn.Module, buffers: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name of each tensor and the module that owns it; a tensor with several names under its first one."""
    saved = set(map(id, module.state_dict(keep_vars=True).values())) if buffers else set()
    seen = set()
    for path, owner in module.named_modules():
        kept = [(name, buffer) for name, buffer in owner.named_buffers(path, recurse=False) if id(buffer) in saved]
        for name, tensor in [*owner.named_parameters(path, recurse=False), *kept]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield clean_name(name), owner


def _differences(source: dict[str, str | None], target: dict[str, str | None], names: tuple[str, str]) -> Iterator[str]:
    """Yield sentences on what only one of two modules has, and on what is different."""
    for which, mine, others in ((names[0], source, target), (names[1], target, source)):
        if only := [name for name in mine if name not in others]:
            yield f"Only in {which}: {listed(only)}."
    different = [name for name in source if name in target and source[name] != target[name]]
    if different:
        each = (f"{name} is {source[name]} in {names[0]}, {target[name]} in {names[1]}" for name in different)
        yield f"Different: {listed(each, '; ')}."


def _tensors(pairs: Sequence[Pair], *, fractions: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the targets and the sources, of the pairs whose target's dtype has fractions or of the others."""
    both = [pair.tensors for pair in pairs]
    chosen = [(s, t) for s, t in both if (t.is_floating_point() or t.is_complex()) == fractions]
    return [target for _, target in chosen], [source for source, _ in chosen]


def _tensor(owner: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(owner, name.rpartition(".")[2])
    return tensor


def _described(tensor: Tensor) -> str | None:
    """Return shape and dtype as text, None for a lazy tensor, which has no shape yet."""
    return None if is_lazy(tensor) else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _address(parameter: nn.Parameter) -> int:
    """Return where the values are, or the identity of what has no memory: it is empty or on the meta device."""
    return parameter.data_ptr() or -id(parameter)
