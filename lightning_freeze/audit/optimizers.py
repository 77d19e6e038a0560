"""The check that each trainable parameter is in one optimizer, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from lightning_freeze._lightning import optimizers_of
from lightning_freeze.audit.checks import Check, Moment
from lightning_freeze.audit.findings import Finding


class Membership(Check):
    """Finds trainable parameters that are in no optimizer, or in two places."""

    moments = ("phase start", "epoch start")

    def observe(self, now: Moment) -> list[Finding]:
        """Return the findings of this process; without optimizers, the user steps by hand."""
        optimizers, findings = optimizers_of(now.trainer), []
        for name, places in places_of(optimizers, now.trainable).items() if optimizers else ():
            if not places:
                cause = "It requires grad, but configure_optimizers gave it to no optimizer, so no optimizer moves it."
                fix = "Give it to an optimizer, or freeze it; name a copy that code of yours moves in "
                fix += "GradientAudit(ignore=…)."
                findings.append(Finding("in_no_optimizer", name, cause, fix, now.step))
            elif len(places) > 1:
                cause, fix = f"It is in {' and in '.join(places)}, and each steps it.", "Leave it in one of them."
                findings.append(Finding("in_two_optimizers", name, cause, fix, now.step))
        return findings


def places_of(optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Return where optimizers hold each parameter, such as ``"SGD 0, group 1"``; an optimizer twice counts once."""
    places: dict[int, list[str]] = {id(parameter): [] for parameter in parameters.values()}
    for index, optimizer in enumerate(dict.fromkeys(optimizers)):
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                places.get(id(parameter), []).append(f"{type(optimizer).__name__} {index}, group {number}")
    return {name: places[id(parameter)] for name, parameter in parameters.items()}
