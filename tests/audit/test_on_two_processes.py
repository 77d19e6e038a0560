"""GradientAudit under DDP: every process reports what any has found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_freeze import AuditError, FreezeBatchNorm, FreezeSchedule, GradientAudit, Phase
from tests.audit.fits import Hooked
from tests.audit.test_callback import Faulty, Keeps, add
from tests.devices import Hooked as HookedDDP
from tests.laws.test_law6_replicas_agree import post_local_sgd
from tests.nets import Net, data, sgd, trainer
from tests.replicas import on_two_processes


class OnRankOne(Hooked):
    """Does it on one process only."""

    def _do(self, *_: Any) -> None:
        if self.trainer.global_rank == 1:
            super()._do()


class KeepsOnRankOne(Keeps):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.how = "list" if dist.get_rank() else "nothing"
        return super().training_step(batch, batch_idx)


def pushed_apart(batch: int = 1, *, frozen: bool = True) -> Net:
    net = OnRankOne(lambda net: add(net.neck.weight), "on_train_batch_end", batch, optimizer=sgd)
    net.neck.requires_grad_(not frozen)
    return net


def unfrozen_late() -> Net:
    net = Hooked(lambda net: net.neck.requires_grad_(True), "on_train_epoch_start", 2, optimizer=sgd)
    net.neck.requires_grad_(False)
    return net


def other_statistics() -> Net:
    return OnRankOne(lambda net: net.backbone[1].running_mean.fill_(3), "on_train_start", optimizer=sgd)


def used_on_one() -> Net:
    return Faulty(lambda net: "none" if dist.get_rank() else "unused", optimizer=sgd)


TWO = [Phase("head", steps=2), Phase("*")]
UNUSED = "ddp_find_unused_parameters_true"
NECK = ("replicas_differ", "neck.weight")
MOVED = [("frozen_value_moved", "neck.weight"), NECK]
# For each planted fault: the network, what else is in the Trainer, and what is found.
ON_DDP: dict[str, tuple[Callable[[], LightningModule], dict[str, Any], list[tuple[str, str]]]] = {
    "clean": (lambda: Net(optimizer=sgd), {}, []),
    "scheduled": (lambda: Net(optimizer=sgd), {"callback": lambda: FreezeSchedule(TWO, verbose=False)}, []),
    "apart": (lambda: pushed_apart(frozen=False), {}, [NECK]),
    "frozen apart": (pushed_apart, {}, MOVED),
    "averaged": (pushed_apart, {"strategy": lambda: HookedDDP(**post_local_sgd())}, MOVED),
    "late": (unfrozen_late, {}, [NECK, ("replicas_differ", "neck.bias")]),
    "statistics": (
        other_statistics,
        {"callback": lambda: FreezeBatchNorm("backbone"), "strategy": lambda: DDPStrategy(broadcast_buffers=False)},
        [("replicas_differ", "backbone.1.running_mean")],
    ),
    "used on one": (used_on_one, {"strategy": lambda: UNUSED}, []),
    "unused": (
        lambda: Faulty("unused", optimizer=sgd),
        {"strategy": lambda: UNUSED},
        [("no_gradient", "branch.weight"), ("no_gradient", "branch.bias")],
    ),
    "kept on one": (lambda: KeepsOnRankOne("list"), {}, [("graph_kept", "self.losses[0]")]),
    "raised": (lambda: pushed_apart(0), {"on_violation": "raise"}, MOVED),
}


def on_ddp(
    make: Callable[[], LightningModule],
    strategy: Callable[[], Any] = lambda: "ddp",
    callback: Callable[[], Callback] = Callback,
    on_violation: Any = "warn",
) -> dict[str, Any]:
    """Train on two processes with a planted fault, and give what was found."""
    share = Subset(data(24), range(dist.get_rank(), 24, 2))
    audit = GradientAudit(on_violation=on_violation, first_n_steps=2)
    options = {"strategy": strategy(), "devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
    raised = False
    try:
        trainer(callbacks=[callback(), audit], **options).fit(make(), DataLoader(share, batch_size=4))
    except AuditError:
        raised = True
    return {"found": [(f.kind, f.name, f.cause) for f in audit.report], "raised": raised, "end": audit.report.summary}


def every_kind() -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {}
    for kind, (make, options, _) in ON_DDP.items():
        torch.manual_seed(0)
        results[kind] = on_ddp(make, **options)
    return results


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(every_kind, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("kind", ON_DDP)
def test_findings_are_the_same_on_two_processes(ddp: list[dict[str, Any]], kind: str) -> None:
    for rank in ddp:
        assert [one[:2] for one in rank[kind]["found"]] == ON_DDP[kind][2]
        assert rank[kind]["raised"] == (kind == "raised")
    assert ddp[0][kind] == ddp[1][kind]


def test_causes_on_two_processes_name_the_rank(ddp: list[dict[str, Any]]) -> None:
    causes = {kind: [one[2] for one in result["found"]] for kind, result in ddp[0].items()}
    assert "never reduces the gradient" in causes["late"][0]
    assert "One process wrote to it alone" in causes["apart"][0]
    assert all(causes[kind][0].endswith("(On rank 1 only.)") for kind in ("frozen apart", "kept on one", "raised"))
