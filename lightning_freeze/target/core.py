"""A module that follows another of the same architecture, by hard copies or by a Polyak average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze.selectors import clean_name, named_unique_parameters
from lightning_freeze.words import listed


@dataclass(frozen=True)
class Pair:
    """One tensor of the source and the one of the same name in the target.

    It holds the two modules that the tensors sit on and looks them up when asked: user code may assign a buffer anew.

    Args:
        name: The dotted name in both.
        source: The module that holds the source's tensor.
        target: The module that holds the target's tensor.
    """

    name: str
    source: nn.Module
    target: nn.Module

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the source's tensor and the target's."""
        attribute = self.name.rpartition(".")[2]
        return getattr(self.source, attribute), getattr(self.target, attribute)


def pair_up(
    source: nn.Module, target: nn.Module, *, buffers: bool = True, names: tuple[str, str] = ("source", "target")
) -> list[Pair]:
    """Pair the tensors of two modules by name.

    Args:
        source: The module to follow.
        target: The module that follows.
        buffers: Whether to pair buffers too: those of the ``state_dict``, as ``load_state_dict`` copies no others.
        names: What errors call the two.

    Returns:
        A pair for every parameter, tied ones once, and every buffer.

    Raises:
        ValueError: If names, shapes or dtypes differ, if there is nothing to pair, if one has lazy tensors without a
            shape, or if the two share parameters.

    Example:
        >>> pairs = pair_up(nn.Linear(2, 3), nn.Linear(2, 3))
        >>> [pair.name for pair in pairs]
        ['weight', 'bias']
        >>> pair_up(nn.Linear(2, 3), nn.Linear(2, 4, bias=False))
        Traceback (most recent call last):
        ValueError: The target does not have the architecture of the source.
        Only in source: bias.
        Different: weight is (3, 2) float32 in source, (4, 2) float32 in target.
    """
    sources, targets = dict(_owners(source, buffers)), dict(_owners(target, buffers))
    for label, owners in zip(names, (sources, targets), strict=True):
        if lazy := [name for name, owner in owners.items() if is_lazy(getattr(owner, name.rpartition(".")[2]))]:
            raise ValueError(
                f"The {label} has lazy tensors, which get their shape in its first forward: {listed(lazy)}. Run a "
                "batch through it in __init__ or configure_model, and then build the target with copy.deepcopy."
            )
    pairs = [Pair(name, owner, targets[name]) for name, owner in sources.items() if name in targets]
    complaints = [
        f"Only in {label}: {listed(missing)}."
        for label, mine, others in ((names[0], sources, targets), (names[1], targets, sources))
        if (missing := [name for name in mine if name not in others])
    ]
    described = [(pair.name, *map(_described, pair.tensors)) for pair in pairs]
    different = [f"{name} is {a} in {names[0]}, {b} in {names[1]}" for name, a, b in described if a != b]
    if different:
        complaints.append(f"Different: {listed(different, '; ')}.")
    if complaints:
        what = f"The {names[1]} does not have the architecture of the {names[0]}."
        raise ValueError("\n".join([what, *complaints]))
    if not pairs:
        raise ValueError(f"The {names[0]} and the {names[1]} have no parameters, so there is nothing to copy.")
    if shared := shared_parameters(target, source.parameters()):
        raise ValueError(
            f"The {names[1]} shares parameters with the {names[0]}: {listed(shared)}. It cannot follow what it is. "
            "Build it with copy.deepcopy."
        )
    return pairs


@torch.no_grad()
def hard_copy(pairs: Sequence[Pair]) -> None:
    """Copy the source into the target.

    The idea of a target network that is a copy, renewed from time to time, is from Mnih et al., "Human-level control
    through deep reinforcement learning", 2015.

    Args:
        pairs: What :func:`pair_up` gave. The targets change in place.

    Example:
        >>> online, target = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> hard_copy(pair_up(online, target))
        >>> torch.equal(online.weight, target.weight)
        True
    """
    for sources, targets in _by_kind(pairs):
        torch._foreach_copy_(targets, sources)


@torch.no_grad()
def polyak_average(pairs: Sequence[Pair], tau: float) -> None:
    """Move the target a little towards the source: ``target += tau * (source - target)``.

    The soft update of Lillicrap et al., "Continuous control with deep reinforcement learning", 2016. Tensors without
    fractions, such as a counter of batches, are copied. In bfloat16 and float16, a small step is lost to rounding: keep
    the weights in float32, as mixed precision does.

    Args:
        pairs: What :func:`pair_up` gave. The targets change in place.
        tau: How far to go, in [0, 1]; 1 copies, 0 changes nothing.

    Raises:
        ValueError: If ``tau`` is out of range.

    Example:
        >>> online, target = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> _ = nn.init.ones_(online.weight), nn.init.zeros_(target.weight)
        >>> polyak_average(pair_up(online, target), tau=0.25)
        >>> target.weight.tolist()
        [[0.25, 0.25]]
    """
    tau = as_tau(tau, "polyak_average")
    for sources, targets in _by_kind(pairs):
        if _has_fractions(targets[0]):
            torch._foreach_lerp_(targets, sources, tau)
        else:
            torch._foreach_copy_(targets, sources)


def as_tau(tau: object, given: str) -> float:
    """Return ``tau`` as a float, also one of NumPy's, and refuse one that is not in [0, 1].

    Raises:
        ValueError: If it is not.
        TypeError: If it is no number.
    """
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(
            f"{given}(tau={tau!r}): it is a number in [0, 1], for example 0.005, or a function of the step."
        )
    if not 0 <= float(tau) <= 1:
        raise ValueError(f"{given}(tau={tau!r}): it is in [0, 1], for example 0.005. 1 copies, 0 stays.")
    return float(tau)


def shared_parameters(module: nn.Module, others: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of a module's parameters whose memory one of ``others`` has too.

    Example:
        >>> net = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
        >>> net[1].weight.data = net[0].weight.data
        >>> shared_parameters(net[1], net[0].parameters())
        ['weight']
    """
    theirs = {_address(parameter) for parameter in others}
    return [name for name, parameter in named_unique_parameters(module).items() if _address(parameter) in theirs]


def _owners(module: nn.Module, buffers: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name of each tensor and the module it sits on; a tensor that has several names under its first one."""
    seen = set()
    for path, owner in module.named_modules():
        own: dict[str, Tensor | None] = {**owner._parameters}
        if buffers:
            own |= {name: b for name, b in owner._buffers.items() if name not in owner._non_persistent_buffers_set}
        for name, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield clean_name(f"{path}.{name}" if path else name), owner


def _by_kind(pairs: Sequence[Pair]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield sources and targets, those with fractions apart from those without: one kernel works on one dtype."""
    tensors = [pair.tensors for pair in pairs]
    for fractions in (True, False):
        chosen = [(source, target) for source, target in tensors if _has_fractions(target) == fractions]
        if chosen:
            yield [source for source, _ in chosen], [target for _, target in chosen]


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _address(parameter: nn.Parameter) -> int:
    """Return where the values are; what has no memory, empty or on the meta device, is told apart by identity."""
    return parameter.data_ptr() or -id(parameter)
