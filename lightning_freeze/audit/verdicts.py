"""From facts about a training step to findings that say what is wrong, why it likely is, and what mends it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.audit.findings import Finding
from lightning_freeze.audit.gradient_flow import Use, Uses
from lightning_freeze.audit.graphs import by_design, container, globals_of_users, tensors_with_graph, ways_to
from lightning_freeze.audit.membership import held_twice
from lightning_freeze.freezing.batchnorm import frozen_running_statistics
from lightning_freeze.freezing.eval_mode import is_held
from lightning_freeze.freezing.optimizers import missing as homeless
from lightning_freeze.selectors import clean_name

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_DROP_OR_LINK = "Let it contribute to the loss, or freeze it."


def frozen_statistics(
    module: nn.Module, trains: Collection[int], *, held_only: bool = False
) -> dict[str, tuple[nn.Module, Tensor]]:
    """Give the running statistics that must not move: those of frozen layers.

    Args:
        module: Any module.
        trains: The identity of every parameter that trains.
        held_only: Only layers that are kept in eval mode by a callback or ``freeze_batchnorm``.

    Returns:
        Name to the layer and the buffer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> list(frozen_statistics(net, trains={id(net[0].weight)}))
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
        >>> list(frozen_statistics(net, trains={id(net[1].weight)}))
        []
    """
    frozen = set() if held_only else set(frozen_running_statistics(module, trains))
    return {
        clean_name(f"{path}.{name}" if path else name): (layer, buffer)
        for path, layer in module.named_modules()
        if layer in frozen or (is_held(layer) and getattr(layer, "running_mean", None) is not None)
        for name in _STATISTICS
        if isinstance(buffer := getattr(layer, name, None), Tensor)
    }


def value_moved(name: str, *, since: int, step: int, by_step: bool) -> Finding:
    """Give the finding for a frozen parameter whose value is another than at step ``since``."""
    when = f"between step {since} and step {step}" if since < step else f"between two steps, after step {step}"
    if by_step:
        cause = f"An optimizer holds it together with a gradient, and stepped it {when}."
        mend = "Set its .grad to None when you freeze it; FreezeSchedule and lightning_freeze.freeze do."
    else:
        cause = f"Code of yours or of a callback wrote to it {when}: copy_, .data, an in-place operation, a state_dict."
        mend = (
            "Leave that write out. If it is an average that shall move, let TargetNetwork do it, or name it in "
            "GradientAudit(ignore=…)."
        )
    return Finding("frozen_value_moved", name, cause, mend, step)


def statistics_moved(name: str, layer: nn.Module, *, step: int) -> Finding:
    """Give the finding for running statistics of a frozen layer that moved."""
    if layer.training:
        cause = (
            "The layer's parameters are frozen but it runs in training mode, where every forward moves its running "
            "statistics, whatever requires_grad says."
        )
        mend = "Add FreezeBatchNorm, or freeze with FreezeSchedule: both keep the layer in eval mode."
    else:
        cause = "The layer is in eval mode now: something wrote to it, or put it in training mode for a while."
        mend = "Leave that out, or keep the layer with FreezeBatchNorm, which train() calls do not wake up."
    return Finding("frozen_statistics_moved", name, cause, mend, step)


def moved_in_step(name: str, *, step: int) -> Finding:
    """Give the finding for a frozen parameter that had a gradient when an optimizer that holds it stepped."""
    return Finding(
        "frozen_in_step",
        name,
        "It still has a .grad (a zero one is enough) and is in an optimizer, so momentum and weight decay move it: it "
        "was frozen after a backward, and zero_grad(set_to_none=False) leaves zeros, or its .grad was set by hand.",
        "Set its .grad to None when you freeze it, or take it out of the optimizer; FreezeSchedule does both.",
        step,
    )


def memberships(optimizers: Sequence[Optimizer], trainable: Mapping[str, nn.Parameter], step: int) -> list[Finding]:
    """Give a finding for each trainable parameter that is not in exactly one place of all optimizers."""
    none = [
        Finding(
            "in_no_optimizer",
            name,
            "It requires grad, but configure_optimizers gave it to no optimizer, so it never moves.",
            "Give it to an optimizer, or freeze it.",
            step,
        )
        for name in homeless(optimizers, trainable)
    ]
    several = [
        Finding(
            "in_two_optimizers",
            name,
            f"It is in {' and in '.join(places)}, and each of them steps it.",
            "Leave it in one of them.",
            step,
        )
        for name, places in held_twice(optimizers, trainable).items()
    ]
    return none + several


def without_gradient(names: Iterable[str], uses: Uses, *, steps: int, step: int) -> list[Finding]:
    """Give a finding for each trainable parameter that no backward reached in ``steps`` steps, and why."""
    findings = []
    for name in names:
        cause, mend = _why(uses.of.get(name)) if name in uses.watched else _UNKNOWN
        seen = "the step that was looked at" if steps == 1 else f"any of the {steps} steps that were looked at"
        findings.append(Finding("no_gradient", name, f"{cause} It got no gradient in {seen}.", mend, step))
    return findings


_UNKNOWN = (
    "Either the forward does not use it, or a detach or no_grad cuts its way to the loss; which of the two cannot be "
    "told, because the module is compiled or scripted.",
    _DROP_OR_LINK,
)


def _why(use: Use | None) -> tuple[str, str]:
    if use is None:
        return (
            "The forward never uses it: its module or branch is not called.",
            "Let it contribute to the loss, freeze it, or remove it.",
        )
    if use.linked and use.cut:
        return (
            f"The forward uses it ({use.linked}), but what comes of it is cut off from the loss: {use.cut}.",
            f"{_DROP_OR_LINK} If it shall train, leave the detach out there.",
        )
    if use.linked:
        return (
            f"The forward uses it ({use.linked}), but the loss does not depend on what comes of it.",
            "Add that output to the loss, as with the auxiliary heads of some networks, or freeze it.",
        )
    if use.unlinked:
        return (
            f"The forward uses it only where no graph is recorded ({use.unlinked}): under torch.no_grad, in inference "
            "mode, or in a re-entrant checkpoint whose input requires no grad.",
            "Run that part with gradients, or freeze it.",
        )
    return (
        f"Only a copy without a graph is used: {use.cut}.",
        f"{_DROP_OR_LINK} If it shall train, use the parameter itself.",
    )


def kept_graphs(
    module: nn.Module,
    others: Mapping[str, object],
    last: Mapping[str, object],
    known: Collection[int],
    step: int,
) -> list[Finding]:
    """Give a finding for each place that keeps tensors with a graph alive.

    Args:
        module: The module, called ``self`` in the ways; its own tensors may be computed from others by design.
        others: What else to look in for a way to them, by name.
        last: What to look in, by name, where neither those nor the user's globals have it.
        known: The identities of tensors that had a graph before the fit, or belong to the coming step.
        step: How many batches the fit had trained.

    Returns:
        One finding for each list, attribute or other place; its name is the way to the last tensor in it.
    """
    tensors = tensors_with_graph({*known, *by_design(module)})
    if not tensors:
        return []
    avoid = set(map(id, last.values()))
    ways: dict[int, str] = {}
    for roots in ({"self": module, **others}, globals_of_users(), last):
        missing = [tensor for tensor in tensors if id(tensor) not in ways]
        ways |= ways_to(missing, roots, avoid=avoid) if missing else {}
    places: dict[str, list[str]] = {}
    for tensor in tensors:
        way = ways.get(id(tensor), "somewhere (no attribute or global leads to it)")
        places.setdefault(container(way), []).append(way)
    findings = []
    for place, members in places.items():
        what = f"{place} holds {len(members)} tensors" if len(members) > 1 else f"{members[0]} is a tensor"
        findings.append(
            Finding(
                "graph_kept",
                max(members, key=lambda way: (len(way), way)),
                f"After the step {what} with a graph behind it, so all that the graph needs stays in memory.",
                "Keep loss.detach() instead, or drop the tensor at the end of the step.",
                step,
            )
        )
    return findings


def replicas_apart(names: Iterable[str], late: Collection[str], step: int) -> list[Finding]:
    """Give a finding for each parameter or buffer that processes hold with different values.

    Args:
        names: What differs.
        late: Names that were frozen when DDP was set up.
        step: How many batches the fit had trained.
    """
    findings = []
    for name in names:
        if name in late:
            cause = (
                "It was frozen when DDP was set up and unfrozen later, and DDP never reduces the gradient of such a "
                "parameter, so each process trains its own."
            )
            mend = "Unfreeze it with FreezeSchedule, which sets DDP up again."
        else:
            cause = (
                "One process wrote to it alone: code that depends on the rank or on unequal random numbers, or a step "
                "under no_sync."
            )
            mend = "Do the same on every process, or broadcast the result."
        findings.append(Finding("replicas_differ", name, cause, mend, step))
    return findings


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Give the findings of all processes, each once, with the ranks that made it if not all did."""
    ranks: dict[tuple[str, str], list[int]] = {}
    first: dict[tuple[str, str], Finding] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            key = (finding.kind, finding.name)
            first.setdefault(key, finding)
            ranks.setdefault(key, []).append(rank)
    return [
        finding
        if len(ranks[key]) == len(by_rank)
        else replace(finding, cause=f"{finding.cause} (On rank {', '.join(map(str, ranks[key]))} only.)")
        for key, finding in first.items()
    ]
