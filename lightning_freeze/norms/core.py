"""Norms of gradients, weights and updates, read without changing them.

What measures here leaves its result on the device; only what reads waits for the device, once for all it is given.
All norms are Euclidean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_freeze.selectors import named_unique_parameters

#: How finely norms are told apart.
Per: TypeAlias = Literal["total", "module", "parameter"]

#: What to measure around an optimizer step.
What: TypeAlias = Literal["grad", "weight", "update"]


@dataclass(frozen=True)
class Norms:
    """The norm of each of some named tensors, still on their device.

    Args:
        names: One name a tensor.
        values: Floating, one vector for each kind (device, dtype, sharding) of tensor, in the order of the names.
    """

    names: tuple[str, ...]
    values: tuple[Tensor, ...]


#: What has measured nothing.
NO_NORMS = Norms((), ())
# Stands for a norm that is as it was; a true one is never negative.
_AS_BEFORE = -1.0


@torch.no_grad()
def measure(tensors: Mapping[str, Tensor], *, scale: Tensor | None = None) -> Norms:
    """Measure tensors without waiting for the device. Half precision is accumulated and given in float32.

    Args:
        tensors: Name to tensor: of any shape, floating or complex, on any device, sparse ones and DTensors too. For
            DTensors every rank must call this, and each gets the norm of the whole tensor.
        scale: What the tensors have been multiplied by, a scalar: the loss scale under AMP.

    Returns:
        The norms, for :func:`read`.

    Example:
        >>> read([measure({"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2, 2)})])
        [{'a': 5.0, 'b': 0.0}]
    """
    groups = _by_kind(tensors)
    values = [_norms(list(group.values())) for group in groups]
    if scale is not None:
        values = [vector / scale.to(vector.device) for vector in values]
    return Norms(tuple(name for group in groups for name in group), tuple(values))


def read(measured: Sequence[Norms]) -> list[dict[str, float]]:
    """Wait for the device, once for everything that is given, and give name to norm for each."""
    vectors = [vector for norms in measured for vector in norms.values]
    if not vectors:
        return [{} for _ in measured]
    numbers = iter(torch.cat([vector.to(vectors[0].device) for vector in vectors]).tolist())
    return [
        {name: number for name, number in zip(norms.names, numbers, strict=False) if number != _AS_BEFORE}
        for norms in measured
    ]


def combined(norms: Norms, more: Norms) -> Norms:
    """Give two measurements as one; of a name that both have, the later norm is read.

    Example:
        >>> first, later = measure({"a": torch.ones(1), "b": torch.ones(1)}), measure({"b": torch.zeros(1)})
        >>> read([combined(first, later)])
        [{'a': 1.0, 'b': 0.0}]
    """
    return Norms(norms.names + more.names, norms.values + more.values)


def changed(before: Norms, after: Norms) -> Norms:
    """Give a later measurement of the same tensors without the norms that are as before. It does not wait.

    Example:
        >>> tensors = {"a": torch.ones(1), "b": torch.ones(1)}
        >>> before = measure(tensors)
        >>> _ = tensors["b"].zero_()
        >>> read([changed(before, measure(tensors))])
        [{'b': 0.0}]
    """
    if before.names != after.names or list(map(len, before.values)) != list(map(len, after.values)):
        return after
    pairs = zip(before.values, after.values, strict=True)
    return Norms(after.names, tuple(torch.where(new == old, _AS_BEFORE, new) for old, new in pairs))


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Give the gradients that are there; a parameter that the loss did not reach has none."""
    return {name: grad for name, parameter in parameters.items() if (grad := parameter.grad) is not None}


def gradient_norms(module: nn.Module, per: Per = "total") -> dict[str, float]:
    """Give the norms of the gradients as they are now, with one wait for the device.

    Args:
        module: Any module. Frozen parameters and those without a gradient are left out.
        per: ``"total"``, or in addition ``"module"`` or ``"parameter"``.

    Returns:
        Norm by name; the norm of everything together is under ``""``.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).requires_grad_(True)
        >>> net[0].weight.grad, net[1].weight.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
        >>> gradient_norms(net, per="module")
        {'': 5.0, '0': 3.0, '1': 4.0}
    """
    parameters = named_unique_parameters(module)
    (norms,) = read([measure(gradients({name: p for name, p in parameters.items() if p.requires_grad}))])
    return spread(norms, per, module_of(parameters) if per == "module" else {})


class ParameterNames:
    """Names what an optimizer holds. The module is only searched again if there is a parameter that has no name yet.

    Args:
        module: Any module.

    Attributes:
        modules: For each name the module that it counts towards, see :func:`module_of`.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> list(ParameterNames(net).trained(torch.optim.SGD([net.bias], lr=0.1)))
        ['bias']
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._look()

    def trained(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Give the parameters of the module that require grad and that an optimizer holds, by name."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held <= self._known:
            self._look()
        return {name: p for name, p in self._parameters.items() if p.requires_grad and id(p) in held}

    def _look(self) -> None:
        self._parameters = named_unique_parameters(self._module)
        self._known = set(map(id, self._parameters.values()))
        self.modules = module_of(self._parameters)


def module_of(names: Iterable[str]) -> dict[str, str]:
    """Give for each parameter the module that its norm counts towards.

    These are the top-level modules. Where all parameters are below one module, such as ``self.model``, they are that
    module's children. A parameter that is in none of them stands for itself.

    Example:
        >>> module_of(["model.body.0.weight", "model.body.1.weight", "model.scale"])
        {'model.body.0.weight': 'model.body', 'model.body.1.weight': 'model.body', 'model.scale': 'model.scale'}
    """
    paths = {name: name.split(".") for name in names}
    above = [path[:-1] for path in paths.values()]
    common = 0
    while above and all(len(path) > common and path[common] == above[0][common] for path in above):
        common += 1
    # Parameters of a single layer have nothing below their module to be told apart by.
    depth = common + 1 if any(len(path) > common for path in above) else max(common, 1)
    return {name: ".".join(path[:depth]) for name, path in paths.items()}


def spread(norms: Mapping[str, float], per: Per, modules: Mapping[str, str]) -> dict[str, float]:
    """Join the norms of parameters into one of everything, under ``""``, and those that ``per`` asks for.

    Args:
        norms: Norm of each parameter.
        per: ``"total"``, or in addition ``"module"`` or ``"parameter"``.
        modules: For each parameter the module that it counts towards, see :func:`module_of`.

    Example:
        >>> spread({"a.weight": 3.0, "b.weight": 4.0}, "parameter", {})
        {'': 5.0, 'a.weight': 3.0, 'b.weight': 4.0}
    """
    joined = {"": math.hypot(*norms.values())}
    if per == "module":
        members: dict[str, list[float]] = {}
        for name, norm in norms.items():
            members.setdefault(modules[name], []).append(norm)
        joined |= {module: math.hypot(*values) for module, values in members.items()}
    elif per == "parameter":
        joined |= norms
    return joined


def when_gradients_are_ready(optimizer: Optimizer, call: Callable[[], None]) -> RemovableHandle:
    """Call back in each step of an optimizer when the gradients are as it is going to use them.

    That is at its beginning, or each time that its closure, which computes and clips them, has run. What an optimizer
    itself does to gradients comes later: ``SGD(nesterov=True, foreach=True)`` adds its momentum to them in place.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> hook = when_gradients_are_ready(optimizer, lambda: print("ready"))
        >>> optimizer.step()
        ready
        >>> optimizer.step(lambda: print("compute"))
        compute
        ready
    """

    def told(closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_and_call() -> Any:
            result = closure()
            call()
            return result

        return closure_and_call

    def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        this, *positional = args
        if callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": told(kwargs["closure"])}
        elif positional and callable(positional[0]):
            args = (this, told(positional[0]), *positional[1:])
        else:
            call()
        return args, kwargs

    return optimizer.register_step_pre_hook(hook)


class StepNorms:
    """Measures one optimizer step: made before it, told :meth:`after` it, read whenever there is time to wait.

    Told of :meth:`ready`, it measures the clipped gradients then, and otherwise after the step.

    Between the two it holds a copy of the parameters if ``what`` has ``"update"``. It keeps no graph.

    Args:
        parameters: Name to parameter, for those that the step may change. Their gradients are measured at once.
        what: What to measure.
        scale: What the gradients have been multiplied by, if the optimizer divides them itself (a fused one under AMP).
            They then count as not clipped.
        unclipped: The norms of gradients before clipping, if that may have happened already; they can be of more
            parameters than these, or of fewer. What has become zero since then was zeroed, not clipped.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight, 2.0)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> (net(torch.ones(1, 1)) * 8).sum().backward()
        >>> step = StepNorms(dict(net.named_parameters()))
        >>> _ = nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        >>> optimizer.step()
        >>> step.after()
        >>> {name: round(value, 3) for name, value in named_metrics(step.read()).items()}
        {'grad': 8.0, 'nonfinite_grads': 0.0, 'grad_clipped': 5.0, 'weight': 2.0, 'update': 0.5, 'update_ratio': 0.25}
    """

    @torch.no_grad()
    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        what: Collection[What] = ("grad", "weight", "update"),
        *,
        scale: Tensor | None = None,
        unclipped: Norms = NO_NORMS,
    ) -> None:
        self.parameters = parameters
        self.what = what
        self.measured: dict[str, Norms] = {}
        self._scale = scale
        self._over = False
        self.with_gradient: set[str] = set()
        self.measured_before: set[str] = set()
        if "grad" in what:
            here = gradients(parameters)
            self.with_gradient, self.measured_before = set(here), set(unclipped.names)
            missing = {name: gradient for name, gradient in here.items() if name not in self.measured_before}
            self.measured["grad"] = combined(unclipped, measure(missing, scale=scale))
        if "weight" in what or "update" in what:
            self.measured["weight"] = measure(parameters)
        self._before = {name: p.detach().clone() for name, p in parameters.items()} if "update" in what else {}

    def ready(self) -> None:
        """Measure gradients as the step is going to use them. A second call does nothing."""
        if "grad" in self.what and "grad_clipped" not in self.measured:
            as_measured = self._scale is not None and not self.measured_before
            self.measured["grad_clipped"] = (
                self.measured["grad"] if as_measured else measure(gradients(self.parameters), scale=self._scale)
            )

    @torch.no_grad()
    def after(self) -> None:
        """Measure what the step has done. A second call does nothing."""
        if self._over:
            return
        self._over = True
        self.ready()
        if "update" in self.what:
            for group in _by_kind(self._before):
                torch._foreach_sub_(list(group.values()), [self.parameters[name] for name in group])
            self.measured["update"] = measure(self._before)
            self._before = {}

    def counted(self, what: str) -> Collection[str]:
        """Give the parameters that count for a quantity: what was measured before clipping may be of more."""
        return self.with_gradient if what in ("grad", "grad_clipped") else self.parameters.keys()

    def read(self) -> dict[str, dict[str, float]]:
        """Wait for the device and give the norm of each parameter, for each quantity that was measured."""
        return read_steps([self])[0]


def read_steps(steps: Sequence[StepNorms]) -> list[dict[str, dict[str, float]]]:
    """Like :meth:`StepNorms.read` for several steps, with one wait for all."""
    values = iter(read([norms for step in steps for norms in step.measured.values()]))
    results = [
        {
            what: {name: norm for name, norm in next(values).items() if name in step.counted(what)}
            for what in step.measured
        }
        for step in steps
    ]
    # Where one is infinite, clipping makes zeros of all others.
    if not any(nonfinite(norms.get("grad", {})) for norms in results):
        for step, norms in zip(steps, results, strict=True):
            if step.measured_before:
                zeroed = {name for name in step.measured_before if norms["grad_clipped"].get(name) == 0.0}
                norms["grad"] |= dict.fromkeys(zeroed, 0.0)
    return results


def named_metrics(
    norms: Mapping[str, Mapping[str, float]],
    *,
    what: Collection[What] = ("grad", "weight", "update"),
    per: Per = "total",
    modules: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Give what :class:`StepNorms` has read as metrics: ``grad``, ``grad/backbone``, ``update_ratio/backbone``, ….

    Args:
        norms: Norm of each parameter, for each quantity.
        what: What to give. The ratio belongs to ``"update"``.
        per: See :func:`spread`.
        modules: See :func:`spread`.
    """
    metrics: dict[str, float] = {}

    def add(quantity: str, values: Mapping[str, float]) -> None:
        metrics.update({f"{quantity}/{name}" if name else quantity: value for name, value in values.items()})

    joined = {quantity: spread(values, per, modules or {}) for quantity, values in norms.items()}
    if "grad" in what:
        add("grad", joined["grad"])
        metrics["nonfinite_grads"] = float(len(nonfinite(norms["grad"])))
        add("grad_clipped", joined["grad_clipped"])
    if "weight" in what:
        add("weight", joined["weight"])
    if "update" in what:
        add("update", joined["update"])
        add("update_ratio", {n: _ratio(value, joined["weight"][n]) for n, value in joined["update"].items()})
    return metrics


def nonfinite(norms: Mapping[str, float]) -> list[str]:
    """Give the names whose norm is infinite or no number: the tensor holds such a value, or one too large to square."""
    return [name for name, norm in norms.items() if not math.isfinite(norm)]


def _ratio(part: float, whole: float) -> float:
    if whole == 0.0:
        return 0.0 if part == 0.0 else math.inf
    return part / whole


def _by_kind(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Group tensors that one call of a ``_foreach`` function can take: it is many times slower on mixed lists."""
    kinds = list(map(_kind, tensors.values()))
    if len(set(kinds)) == 1:
        return [dict(tensors)]
    groups: dict[Hashable, dict[str, Tensor]] = {}
    for kind, (name, tensor) in zip(kinds, tensors.items(), strict=True):
        groups.setdefault(kind, {})[name] = tensor
    return list(groups.values())


def _kind(tensor: Tensor) -> Hashable:
    if isinstance(tensor, DTensor):
        return tensor.device, tensor.dtype, tensor.device_mesh, tensor.placements
    return tensor.device, tensor.dtype, tensor.layout


def _norms(alike: list[Tensor]) -> Tensor:
    if isinstance(alike[0], DTensor):
        return _sharded_norms(alike)
    half = alike[0].dtype in (torch.float16, torch.bfloat16)
    if alike[0].layout is not torch.strided:
        alike = [stored_values(tensor) for tensor in alike]
    return torch.stack(torch._foreach_norm(alike, 2, dtype=torch.float32 if half else None))


def _sharded_norms(alike: list[Tensor]) -> Tensor:
    """Join the norms of all shards in one collective, where a norm of DTensors takes one for each of them."""
    first = alike[0]
    assert isinstance(first, DTensor)
    placements = [Replicate() if placement.is_partial() else placement for placement in first.placements]
    local = _norms([tensor.redistribute(placements=placements).to_local() for tensor in alike])  # type: ignore[attr-defined]
    squares = DTensor.from_local(
        local.double().square(),
        first.device_mesh,
        [placement if placement.is_replicate() else Partial() for placement in placements],
        run_check=False,
    )
    return squares.full_tensor().sqrt()


def stored_values(tensor: Tensor) -> Tensor:
    """Give what a sparse tensor holds, as a strided one; duplicate entries add up. A strided one is given as it is."""
    if tensor.layout is torch.strided:
        return tensor
    return (tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor).values()
