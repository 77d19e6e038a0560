"""The check that each trainable parameter gets a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_freeze._lightning import optimizers_of
from lightning_freeze.audit.checks import Check, Moment
from lightning_freeze.audit.findings import Finding
from lightning_freeze.audit.uses import Uses, runs_in_python, watching
from lightning_freeze.freezing.optimizers import members

# How many times as many batches are audited for parameters that can be expected to get a gradient later.
_PATIENCE = 10


class Received:
    """Notes which parameters a backward reaches, also where their gradients are cleared at once, until ``undo``."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], undo: ExitStack) -> None:
        self.names: set[str] = set()
        self._parameters, self._undo = parameters, undo
        self._followed: set[str] = set()
        self.follow()

    def follow(self) -> None:
        """Follow also what requires grad, or has a value, only now."""
        for name, p in self._parameters.items():
            if p.requires_grad and name not in self._followed and not is_lazy(p):
                self._followed.add(name)
                self._undo.callback(p.register_hook(partial(self._note, name)).remove)  # type: ignore[no-untyped-call]

    def take_in(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count also gradients that no backward has computed, but somebody set; zeroed ones do not count."""
        stepped = {id(parameter) for parameter in parameters}
        for name, p in self._parameters.items():
            if id(p) in stepped and name not in self.names and p.grad is not None:
                dense = p.grad if p.grad.layout is torch.strided else p.grad.to_dense()
                self.names |= {name} if dense.any() else set()

    def _note(self, name: str, gradient: Tensor | None) -> None:
        self.names |= {name} if gradient is not None else set()  # a torch.autograd.Function may return None


@dataclass
class Facts:
    """What is known of one batch, or of audited batches in a row."""

    trainable: set[str] = field(default_factory=set)  # what trained in the last of them, while it ran
    received: set[str] = field(default_factory=set)  # what got a gradient
    stepped: set[int] = field(default_factory=set)  # which optimizers stepped, by their place among the Trainer's
    steps: int = 0  # how many batches had a backward


class Gradients(Check):
    """Finds trainable parameters without gradient in ``first_n_steps`` batches, and says what cuts them off."""

    moments = ("phase start", "epoch start", "step end", "first steps end", "train end", "exception")

    def __init__(self, first_n_steps: int) -> None:
        self.waiting = False  # whether more batches have to be audited
        self._first_n_steps = first_n_steps
        self._uses: Uses = {}
        self._known: set[str] = set()  # what got a gradient in this phase
        self._reported: set[str] = set()
        self._row, self._batch = Facts(), Facts()

    def begin(self, now: Moment, undo: ExitStack) -> None:
        """Follow gradients, and watch what has not got one yet."""
        trainable = now.trainable
        self._received = Received({n: p for n, p in now.parameters.items() if n not in now.ignored}, undo)
        self._batch = Facts(set(trainable), self._received.names)
        got = self._reported | (self._row.received if self._row.steps else self._known)
        unseen = {name: parameter for name, parameter in trainable.items() if name not in got}
        if unseen and runs_in_python(now.module):
            undo.enter_context(watching(now.module, "training_step", unseen, self._uses))

    def note(self, now: Moment, optimizer: Optimizer | None) -> None:
        """Follow what requires grad only now; take in gradients that an optimizer has stepped with."""
        self._batch.steps = 1
        self._received.follow()
        if optimizer is not None:
            self._received.take_in(members([optimizer]))
            self._batch.stepped |= {i for i, other in enumerate(optimizers_of(now.trainer)) if other is optimizer}

    def observe(self, now: Moment) -> Facts:
        """Return the facts of the batch that ends; none at other moments."""
        batch, self._batch = self._batch, Facts()
        if now.error is None:
            batch.trainable &= now.requires_grad
            batch.steps = batch.steps or bool(batch.received)
        else:
            # A step that is cut short proves nothing, unless the error is that nothing has a graph. Flags count as
            # they were when it began: others may have given theirs back since.
            batch.steps = "does not require grad" in str(now.error)
        return batch

    def decide(self, now: Moment, facts: Sequence[Facts]) -> list[Finding]:
        """Return a finding for each parameter that got no gradient for long enough."""
        if now.at == "phase start":
            self._uses, self._known = {}, set()
        if now.at in ("phase start", "epoch start"):
            self._row = self._row if self.waiting and now.at == "epoch start" else Facts()
            self.waiting = True
            return []
        row, last = self._row, now.at in ("train end", "exception")
        row.received |= set().union(*(one.received for one in facts))
        row.stepped |= set().union(*(one.stepped for one in facts))
        if any(one.steps for one in facts):
            row.steps += 1
            row.trainable = set().union(*(one.trainable for one in facts))
        self._known |= row.received
        if not self.waiting or row.steps == 0 or (row.steps < self._first_n_steps and not last):
            return []
        missing = row.trainable - row.received - self._reported
        later = self._may_come_later(now, missing)
        self.waiting = bool(later) and not last
        self._reported |= missing - later
        seen = "the step that was audited" if row.steps == 1 else f"any of the {row.steps} steps that were audited"
        whys = [(name, *_why(self._uses.get(name))) for name in now.parameters if name in missing - later]
        return [
            Finding("no_gradient", n, f"{why} It got no gradient in {seen}.", fix, now.step) for n, why, fix in whys
        ]

    def _may_come_later(self, now: Moment, missing: set[str]) -> set[str]:
        """Return what got a gradient before, or is in an optimizer of the user's that has not stepped yet."""
        if self._row.steps >= _PATIENCE * self._first_n_steps:
            return set()
        later = missing & self._known
        if not now.module.automatic_optimization:
            resting = [o for i, o in enumerate(optimizers_of(now.trainer)) if i not in self._row.stepped]
            held = set(map(id, members(resting)))
            later |= {name for name in missing if id(now.parameters[name]) in held}
        return later


def _why(uses: Mapping[str, str] | None) -> tuple[str, str]:
    """Return the cause and the fix; ``uses`` is None for what was not watched."""
    fix = "Let it contribute to the loss, or freeze it."
    if uses is None:
        cause = "Either the forward does not use it, or a detach or no_grad cuts its way to the loss; which of the two "
        return f"{cause}cannot be seen, because the module is compiled or scripted.", fix
    linked, unlinked, cut = (uses.get(kind) for kind in ("linked", "unlinked", "cut"))
    if linked and cut:
        cause = f"The forward uses it ({linked}), but what comes of it is cut off from the loss: {cut}."
        return cause, f"{fix} If it shall train, leave the detach out there."
    if linked:
        cause = f"The forward uses it ({linked}), but the loss does not depend on what comes of it."
        return cause, "Add that output to the loss, as with the auxiliary heads of some networks, or freeze it."
    if unlinked:
        cause = f"The forward uses it only where no graph is recorded ({unlinked}): under torch.no_grad, in inference "
        fix = "Run that part with gradients, or freeze it."
        return f"{cause}mode, or in a re-entrant checkpoint whose input requires no grad.", fix
    if cut:
        return f"Only a copy without a graph is used: {cut}.", f"{fix} If it shall train, use the parameter itself."
    fix = "Let it contribute to the loss, freeze it, or remove it."
    return "The forward never uses it: its module or branch is not called.", fix
