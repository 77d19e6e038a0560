"""Euclidean norms of named tensors, measured on their device; only :func:`read` waits for it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_freeze._distributed import DTensor, Partial, Replicate
from lightning_freeze.tensors import divide_all, norms_of_all, stored_values

#: What has a norm of its own beside everything together.
Per: TypeAlias = Literal["total", "module", "parameter"]


@torch.no_grad()
def measure(tensors: Mapping[str, Tensor], *, scale: Tensor | None = None) -> dict[str, Tensor]:
    """Return the norm of each tensor divided by ``scale``, of a whole DTensor if every rank calls this."""
    kinds: dict[Hashable, dict[str, Tensor]] = {}  # one `_foreach` call is many times slower on a mixed list
    for name, tensor in tensors.items():
        sharding = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        kinds.setdefault((tensor.device, tensor.dtype, tensor.layout, sharding), {})[name] = tensor
    norms: dict[str, Tensor] = {}
    for alike in kinds.values():
        values = _norms(list(alike.values()))
        norms |= zip(alike, values if scale is None else divide_all(values, scale.to(values[0].device)), strict=True)
    return {name: norms[name] for name in tensors}


def read(measured: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Return measured norms as numbers: the only wait for the device, once for everything that is given."""
    norms = [norm for one in measured for norm in one.values()]
    numbers = iter(vector(norms).tolist() if norms else [])
    return [dict(zip(one, numbers, strict=False)) for one in measured]


def vector(norms: Sequence[Tensor]) -> Tensor:
    """Return scalars as one vector, on the device of the first."""
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gradients that are there; a parameter that the loss did not reach has none."""
    return {name: grad for name, parameter in parameters.items() if (grad := parameter.grad) is not None}


def metric_places(names: Iterable[str], per: Per) -> dict[str, str]:
    """Return for each parameter the module, or itself, under which its norm is shown beside the total.

    Example:
        >>> metric_places(["model.body.0.weight", "model.body.1.weight", "model.scale"], "module")
        {'model.body.0.weight': 'model.body', 'model.body.1.weight': 'model.body', 'model.scale': 'model.scale'}
    """
    if per != "module":
        return {name: name for name in names if per == "parameter"}
    paths = {name: name.split(".") for name in names}
    above = [path[:-1] for path in paths.values()]
    common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*above, strict=False)))
    # The parameters of a single layer have nothing below their module by which they could differ.
    depth = common + 1 if any(len(path) > common for path in above) else max(common, 1)
    return {name: ".".join(path[:depth]) for name, path in paths.items()}


def spread(norms: Mapping[str, float], places: Mapping[str, str]) -> dict[str, float]:
    """Return the norm of everything, under ``""``, and of each place, see :func:`metric_places`."""
    members: dict[str, list[float]] = {"": list(norms.values())}
    for name, norm in norms.items():
        if name in places:
            members.setdefault(places[name], []).append(norm)
    return {place: math.hypot(*values) for place, values in members.items()}


def nonfinite(norms: Mapping[str, float]) -> list[str]:
    """Return the names whose norm is infinite or NaN: the tensor holds such a value, or one too large to square."""
    return [name for name, norm in norms.items() if not math.isfinite(norm)]


def _norms(alike: list[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(alike[0], DTensor):
        return _sharded_norms(alike)
    half = alike[0].dtype in (torch.float16, torch.bfloat16)
    return norms_of_all(list(map(stored_values, alike)), torch.float32 if half else None)


def _sharded_norms(alike: list[Tensor]) -> tuple[Tensor, ...]:
    """Join the norms of all shards in one collective; torch's own norm of a DTensor takes one for each tensor."""
    first = alike[0]
    assert isinstance(first, DTensor)
    placements = [Replicate() if placement.is_partial() else placement for placement in first.placements]
    local = _norms([tensor.redistribute(placements=placements).to_local() for tensor in alike])  # type: ignore[attr-defined]
    over = [placement if placement.is_replicate() else Partial() for placement in placements]
    squares = DTensor.from_local(vector(local).double().square(), first.device_mesh, over, run_check=False)
    return squares.full_tensor().sqrt().unbind()
