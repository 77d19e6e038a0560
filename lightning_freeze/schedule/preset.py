"""Phases that are known only with a module, and the parts of it that they train."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from lightning_freeze.functional import topmost
from lightning_freeze.schedule.arguments import as_layers
from lightning_freeze.schedule.layers import layers_of
from lightning_freeze.schedule.phases import Phase, as_phases
from lightning_freeze.selectors import Selector, named_unique_parameters, resolve, unwrapped
from lightning_freeze.words import counted, listed

#: The layers of a schedule, from the first, next to the input, to the last: names, lists of names that are one layer
#: each, or the name of one module whose :func:`layers_of` they are.
Layers: TypeAlias = str | Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class Parts:
    """The parts of a model: layers, each as its names, and what is none of them."""

    layers: list[list[str]]  # from the first to the last
    before: list[str] = field(default_factory=list)  # what the model has before them, if they are those of one module
    after: list[str] = field(default_factory=list)  # what it has after them then, such as its head
    rest: list[str] = field(default_factory=list)  # what no layer names, if layers are named one by one


#: Returns the phases for the parts of a model and the optimizer steps of the fit, None where these are not known yet.
Build: TypeAlias = Callable[[Parts, float | None], list[Phase]]


class Preset(list[Phase]):
    """The phases of a well-known schedule, and how they are made for a module.

    Before :meth:`resolve` it has the phases that the arguments alone tell, if none are given; where these name a
    module, none. ``build`` is None if they are the same for every module, ``called`` how the log shows the call, and
    ``others`` what it says becomes of parameters that no layer names.
    """

    def __init__(
        self, name: str, layers: Layers, build: Build | None, others: str = "", phases: Iterable[Phase] | None = None
    ) -> None:
        self.name, self.build, self.others, self.said = name, build, others, ""
        self.layers = layers if isinstance(layers, str) else as_layers("layers", layers)
        self.called = f"{name}({layers!r})" if isinstance(layers, str) else name
        self.parts: Parts | None = None
        if phases is None:
            phases = [] if build is None or isinstance(self.layers, str) else build(Parts(self.layers), None)
        super().__init__(phases)

    def resolve(self, module: nn.Module, *, idle: Collection[int] = (), steps: float | None = None) -> Preset:
        """Return the phases for a module.

        Args:
            module: The module.
            idle: The identities of parameters that never train unless a layer names them.
            steps: The optimizer steps of the fit, infinity without a limit; None if they are not known yet: then
                phases that depend on it wait for :meth:`take_steps`.

        Raises:
            ValueError: If a layer matches nothing, or the schedule depends on a number of steps that is unknown.

        Example:
            >>> from lightning_freeze import gradual_unfreezing
            >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Linear(1, 1))
            >>> [phase.label for phase in gradual_unfreezing(["0", "2"]).resolve(net)]
            ['from 2', 'from 0', 'from 1']
        """
        if self.build is None:
            return self
        parts = self._parts(unwrapped(module), idle)
        resolved = Preset(self.name, self.layers, self.build, self.others, self.build(parts, steps))
        resolved.parts = parts
        names = [("no layer names ", parts.rest), ("before them ", parts.before), ("after them ", parts.after)]
        said = [f"{where}{listed(found)}" for where, found in names if found]
        if isinstance(self.layers, str):
            said.insert(0, f"{counted(len(parts.layers), 'layer')}, {parts.layers[0][0]} to {parts.layers[-1][0]}")
        resolved.said = f"{self.called}: {'; '.join(filter(None, [*said, self.others]))}." if said else ""
        return resolved

    def _parts(self, module: nn.Module, idle: Collection[int]) -> Parts:
        """Return the parts of a module; what is between two layers, such as a norm, is of the layer before it."""
        given, layers = f"{self.name}(layers={{}})", self.layers
        if isinstance(layers, str):
            resolve(module, layers, given=given)  # for an error that shows it so
            layers = [[name] for name in layers_of(module, layers)]
        owner = {name: place for place, layer in enumerate(layers) for name in resolve(module, layer, given=given)}
        loose: dict[int, set[int]] = {}
        place = -1
        for name, parameter in named_unique_parameters(module).items():
            place = max(place, owner.get(name, place))
            if name not in owner and id(parameter) not in idle:
                loose.setdefault(place, set()).add(id(parameter))
        if not isinstance(self.layers, str):
            return Parts(layers, rest=topmost(module, set[int]().union(*loose.values())))
        before, *between, after = (topmost(module, loose.get(place, set())) for place in range(-1, len(layers)))
        return Parts([[*layer, *more] for layer, more in zip(layers, [*between, []], strict=True)], before, after)

    def take_steps(self, steps: float | None) -> bool:
        """Make the phases anew if they depend on the optimizer steps of the fit; return whether they did."""
        phases = self.build(self.parts, steps) if self.build and self.parts else self
        if changed := phases != self:
            self[:] = phases
        return changed

    def __iter__(self) -> Iterator[Phase]:
        if not len(self):
            raise ValueError(
                f"{self.called}: its phases are known only with the module and the fit. Give it to FreezeSchedule as "
                "it is, or resolve it before you take phases from it: [*….resolve(model)]."
            )
        return super().__iter__()

    def __add__(self, other: Any) -> list[Any]:
        return [*self, *other]

    def __radd__(self, other: Any) -> list[Any]:
        return [*other, *self]

    def __repr__(self) -> str:
        return super().__repr__() if len(self) else self.called

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.layers, self.build, self.others, list(self) if len(self) else [])


def as_schedule(phases: Any, *others: Any) -> Sequence[Phase]:
    """Return a preset as it is, and what :func:`as_phases` makes of a list; refuse ``others``."""
    return phases if isinstance(phases, Preset) and not others else list(as_phases(phases, *others))


def phases_for(
    phases: Sequence[Phase], module: nn.Module, idle: Collection[int], steps: float | None = None
) -> Sequence[Phase]:
    """Return the phases for a module, those of a preset resolved; arguments as of :meth:`Preset.resolve`."""
    return phases.resolve(module, idle=idle, steps=steps) if isinstance(phases, Preset) else phases


def as_selector(layer: Sequence[str]) -> Selector:
    """Return a layer as a selector that can be a key."""
    return layer[0] if len(layer) == 1 else tuple(layer)
