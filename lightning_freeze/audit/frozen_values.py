"""The check that what is frozen stays as it is: parameters, and the buffers of frozen modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze._lightning import StochasticWeightAveraging, WeightAveraging, callbacks_of, optimizers_of
from lightning_freeze.audit.checks import Check, Moment
from lightning_freeze.audit.findings import Finding
from lightning_freeze.freezing.batchnorm import has_running_statistics
from lightning_freeze.freezing.eval_mode import is_held, wholly_frozen
from lightning_freeze.freezing.holder import ledger_of
from lightning_freeze.selectors import clean_name
from lightning_freeze.tensors import digest, has_values

#: What a tensor was at a look: the parameter, the digest of its values, and those of what optimizers keep for it. A
#: version counter would be cheaper, but a write to ``.data`` does not raise it.
Seen: TypeAlias = tuple[nn.Parameter | None, bytes, list[bytes]]

_AVERAGERS = (WeightAveraging, StochasticWeightAveraging)


class FrozenValues(Check):
    """Finds frozen parameters, and buffers of frozen modules, that move, and optimizers that step what is frozen."""

    moments = ("phase start", "epoch start", "epoch skipped", "step end", "first steps end", "epoch end", "train end")

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}  # at the last look, which was at step `_since`
        self._since = 0
        self._at_begin: set[str] = set()
        self._switched: set[str] = set()  # requires grad inside of a step only, as networks of a GAN
        self._stepped: dict[str, None] = {}  # although frozen

    def begin(self, now: Moment, undo: ExitStack) -> None:
        """Note what requires grad before the step."""
        self._at_begin = now.requires_grad

    def note(self, now: Moment, optimizer: Optimizer | None) -> None:
        """Note what requires grad in the step, and what is frozen and has been stepped all the same."""
        self._switched |= now.requires_grad - self._at_begin
        stepped = moved_by(optimizer) if optimizer is not None else set()
        self._stepped |= {n: None for n, p in now.parameters.items() if id(p) in stepped and n not in now.ignored}

    def observe(self, now: Moment) -> list[Finding]:
        """Return a finding for all that was frozen at the last look, is frozen now, and has another value."""
        if now.at == "phase start":
            self._switched = set()
        averages = any(isinstance(one, _AVERAGERS) for one in callbacks_of(now.trainer))
        if averages and now.at in ("phase start", "epoch start", "epoch skipped", "train end"):
            self._seen = {}  # averages were put in the place of the weights
        if now.at == "train end" and self._since == now.step:
            return []
        frozen, before = self.tensors(now), self._seen
        if now.at == "epoch skipped":
            self._seen = {name: seen for name, seen in before.items() if name in frozen}
            return []
        stepped, self._stepped = self._stepped, {}
        since, self._since = self._since, now.step
        self._seen = {name: look(tensor, optimizers_of(now.trainer)) for name, (_, tensor) in frozen.items()}
        moved = [n for n in self._seen if n in before and has_moved(before[n], self._seen[n], stepped=n in stepped)]
        return [
            *(Finding("frozen_in_step", name, _IN_STEP, _DROP_GRADIENT, now.step) for name in stepped),
            *(_moved(name, *frozen[name], since, now.step, name in stepped) for name in moved),
        ]

    def tensors(self, now: Moment) -> dict[str, tuple[nn.Module, Tensor]]:
        """Return what must not move now, by name, each with its module; what is ignored may, like what trains."""
        may_move = self._switched.union(now.requires_grad, now.ignored)
        trains = {id(parameter) for name, parameter in now.parameters.items() if name in may_move}
        held_only = any(schedule.frozen_mode == "train" for schedule in now.schedules)
        found = frozen_tensors(now.module, trains, held_only=held_only)
        alone = set[nn.Module]()
        if now.ignored:  # as a whole: their buffers are, too, also where held
            heeded = {id(parameter) for name, parameter in now.parameters.items() if name not in now.ignored}
            alone.update(wholly_frozen(now.module, heeded))
        if (ledger := ledger_of(now.trainer)) is not None:
            alone |= ledger.left_alone()  # what callbacks move, as TargetNetwork its target
        return {name: (layer, t) for name, (layer, t) in found.items() if layer not in alone and has_values(t)}


def look(tensor: Tensor, optimizers: Iterable[Optimizer] = ()) -> Seen:
    """Return what a tensor is now; it keeps no values."""
    states = [state for optimizer in optimizers for state in optimizer.state.get(tensor, {}).values()]
    marks = [digest(state) for state in states if isinstance(state, Tensor) and has_values(state)]
    return tensor if isinstance(tensor, nn.Parameter) else None, digest(tensor), marks


def has_moved(before: Seen, after: Seen, *, stepped: bool = False) -> bool:
    """Whether a tensor that was frozen at two looks has moved in between while it was frozen."""
    # What an optimizer with a state has stepped was unfrozen for a while, unless `stepped` says that it was frozen.
    return before[0] is after[0] and before[1] != after[1] and (stepped or before[2] == after[2])


def moved_by(optimizer: Optimizer) -> set[int]:
    """Return the identities of the frozen parameters that a step moves: those with a gradient, be it zero."""
    moving = [parameter for group in optimizer.param_groups if group.get("lr", 1) != 0 for parameter in group["params"]]
    return {id(parameter) for parameter in moving if not parameter.requires_grad and parameter.grad is not None}


def frozen_tensors(
    module: nn.Module, trains: Collection[int], *, held_only: bool = False
) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the parameters that do not train and the buffers of frozen modules, by name, each with its module.

    With ``held_only``, buffers count only in modules that a callback or ``freeze_batchnorm`` keeps in eval mode.
    """
    frozen = set() if held_only else set(wholly_frozen(module, trains))
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    seen = set(trains)
    for path, layer in module.named_modules():
        own: list[tuple[str, Tensor]] = [*layer.named_parameters(path, recurse=False)]
        own += layer.named_buffers(path, recurse=False) if layer in frozen or is_held(layer) else []
        found |= {clean_name(name): (layer, tensor) for name, tensor in own if id(tensor) not in seen}
        seen.update(id(tensor) for _, tensor in own)  # a tied one is found once
    return found


_IN_STEP = (
    "It still has a .grad (a zero one is enough) and is in an optimizer, so momentum and weight decay move it: it was "
    "frozen after a backward, and zero_grad(set_to_none=False) leaves zeros, or its .grad was set by hand."
)
_DROP_GRADIENT = "Set its .grad to None when you freeze it; FreezeSchedule and lightning_freeze.freeze do."


def _moved(name: str, layer: nn.Module, tensor: Tensor, since: int, step: int, stepped: bool) -> Finding:
    if not isinstance(tensor, nn.Parameter):
        return Finding("frozen_statistics_moved", name, *_why_buffer(layer), step)
    when = f"between step {since} and step {step}" if since < step else f"between two steps, after step {step}"
    if stepped:
        cause, fix = f"An optimizer holds it together with a gradient, and stepped it {when}.", _DROP_GRADIENT
    elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
        cause = f"Its {type(layer).__name__} has max_norm={layer.max_norm:g}: each forward scales rows of it in place."
        fix = "Set max_norm=None on it while it is frozen; torch.renorm on its weight before that keeps the outputs."
    else:
        cause = f"Code of yours or of a callback wrote to it {when}: copy_, .data, an in-place operation, a state_dict."
        fix = "Leave that write out. If it is an average that shall move, let TargetNetwork do it, or name it in "
        fix += "GradientAudit(ignore=…)."
    return Finding("frozen_value_moved", name, cause, fix, step)


def _why_buffer(layer: nn.Module) -> tuple[str, str]:
    if not layer.training:
        cause = (
            "Its module is in eval mode now: something wrote to it, as the forward of a quantization observer does, "
        )
        cause += "or put it in training mode for a while."
        return cause, "Leave that out, or keep the layer with FreezeBatchNorm, which train() calls do not wake up."
    cause = "Its module is frozen but runs in training mode, where a forward moves running statistics and other "
    cause += "buffers, whatever requires_grad says."
    if has_running_statistics(layer):
        return cause, "Add FreezeBatchNorm, or freeze with FreezeSchedule: both keep the layer in eval mode."
    return cause, "Call eval() on it, or freeze it with FreezeSchedule(frozen_mode='eval'), which keeps it there."
