"""Fits with an audit, and networks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_freeze import GradientAudit
from tests.nets import Net, adamw, loader, sgd, trainer

no_gradients_in_checkpoint = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
# Raised where torch.compile looks at its own inputs.
compiled = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def fit(
    net: LightningModule, *callbacks: Callback, audit: GradientAudit | None = None, samples: int = 24, **options: Any
) -> Any:
    """Train with an audit behind the other callbacks, and give it."""
    audit = audit or GradientAudit()
    run = trainer(callbacks=[*callbacks, audit], **{"max_epochs": 2, **options})
    run.fit(net, loader(samples), loader(8) if is_overridden("validation_step", net) else None)
    return audit


def found(audit: GradientAudit) -> dict[str, set[str]]:
    return {finding.kind: set(audit.report.of(finding.kind)) for finding in audit.report}


def cause(audit: GradientAudit, kind: str) -> str:
    """The cause that all findings of a kind have."""
    (only,) = {finding.cause for finding in audit.report if finding.kind == kind}
    return only


def parameters(net: nn.Module, prefix: str) -> set[str]:
    return {name for name, _ in net.named_parameters() if name.startswith(prefix)}


def swept(cases: Iterable[tuple[Any, ...]], sample: Callable[..., bool]) -> list[Any]:
    """Give cases for a test, those outside of the sample under the marker ``slow``."""
    return [pytest.param(*case, marks=() if sample(*case) else pytest.mark.slow) for case in cases]


class Hooked(Net):
    """Calls a function of the test's in one of its hooks, in each batch or in one."""

    def __init__(self, act: Callable[[Any], None], hook: str, batch: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.act, self.batch = act, batch
        setattr(self, hook, self._do)

    def _do(self, *_: Any) -> None:
        if self.batch is None or self.trainer.fit_loop.total_batch_idx == self.batch:
            self.act(self)


def keep_zeros(net: LightningModule) -> None:
    """Have a step leave zeros where it would leave no gradient."""
    net.optimizer_zero_grad = lambda epoch, batch_idx, optimizer: optimizer.zero_grad(set_to_none=False)


class Gan(LightningModule):
    """Two networks against each other, switched in one of the usual ways."""

    def __init__(self, how: str, critic_steps: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.how, self.critic_steps = how, critic_steps
        if how == "by hand":
            self.critic.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generate, criticise = self.optimizers(use_pl_optimizer=self.how != "raw")
        noise, real = torch.randn(4, 3), batch[0].flatten(1)[:, :4]
        if batch_idx % self.critic_steps == 0:
            self._turn(generate, lambda: -self.critic(self.generator(noise)).mean())
        if self.how == "by hand":
            self.critic.requires_grad_(True)
        self._turn(criticise, lambda: (self.critic(self.generator(noise).detach()) - self.critic(real)).mean())
        if self.how == "by hand":
            self.critic.requires_grad_(False)

    def _turn(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
        if self.how == "toggled":
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        loss().backward() if self.how == "raw" else self.manual_backward(loss())
        optimizer.step()
        if self.how == "toggled":
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return sgd(self.generator.parameters()), adamw(self.critic.parameters())
