"""Law 8: with the audit on, weights, optimizer state and random numbers are those without it, bit for bit."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_freeze import FreezeSchedule, GradientAudit, Phase
from tests.nets import Net, Probe, adamw, data, loader, same, sgd, snapshot, trainer
from tests.replicas import on_two_processes

pytestmark = pytest.mark.usefixtures("only_what_it_imports")


class Observed(Net):
    """With dropout, so that a random number more or less would show, and faults, so that the audit looks closely."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.branch = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x).mean((2, 3))
        features = features + self.branch(nn.functional.dropout(features)).detach()
        self.seen.append(features.sum().item())
        return self.head(torch.relu(self.neck(features)))


class Manual(Observed):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(part.parameters()) for part in (self.backbone, self.head)]


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3))


SETUPS: dict[str, tuple[Callable[[], LightningModule], Callable[[], dict[str, Any]]]] = {
    "sgd": (lambda: Observed(optimizer=sgd), dict),
    "adamw, clipped": (lambda: Observed(optimizer=adamw), lambda: {"gradient_clip_val": 0.1}),
    "accumulated": (lambda: Observed(optimizer=sgd), lambda: {"accumulate_grad_batches": 4}),
    "float16 with skipped steps": (lambda: Observed(optimizer=sgd), lambda: {"plugins": half()}),
    "bfloat16 weights": (lambda: Observed(optimizer=adamw), lambda: {"precision": "bf16-true"}),
    "bfloat16 mixed": (lambda: Observed(optimizer=adamw), lambda: {"precision": "bf16-mixed"}),
    "several evaluations a step": (
        lambda: Observed(optimizer=lambda params: torch.optim.LBFGS(list(params), lr=0.1, max_iter=3)),
        dict,
    ),
    "manual, two optimizers": (lambda: Manual(optimizer=sgd), dict),
}
PHASES = {"one phase": [], "phases": [Phase("head", steps=2), Phase(["*", "!neck"], steps=3), Phase("*")]}


def fit(
    make: Callable[[], LightningModule], options: dict[str, Any], phases: list[Phase], audit: list[Callback], data: Any
) -> Any:
    """Train, and give all that must be equal."""
    torch.manual_seed(0)
    net = make()
    schedule: list[Callback] = [FreezeSchedule(phases, verbose=False)] if phases else []
    run = trainer(callbacks=[*schedule, *audit], max_epochs=2, num_sanity_val_steps=1, **options)
    run.fit(net, *data)
    states = [optimizer.state_dict() for optimizer in run.optimizers]
    flags = [(name, p.requires_grad, p.grad) for name, p in net.named_parameters()]
    return snapshot(net), states, flags, net.seen, torch.get_rng_state()


@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.filterwarnings("ignore:.*LBFGS")
def test_training_is_the_same_on_one_device(setup: str, phases: str) -> None:
    if phases == "phases" and setup in ("several evaluations a step", "manual, two optimizers"):
        pytest.skip("LBFGS cannot freeze; two optimizers leave the branch to neither, which a schedule refuses.")
    make, options = SETUPS[setup]
    loaders = loader(samples=28), loader(samples=8)
    plain = fit(make, options(), PHASES[phases], [], loaders)
    audit = GradientAudit()
    audited = fit(make, options(), PHASES[phases], [audit], loaders)
    assert same(plain, audited)
    assert {name for name in audit.report.of("no_gradient") if name.startswith("unused")}
    assert audit.report.checks > 0


def both_ways() -> dict[str, Any]:
    """All that must be equal, after training with and without the audit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    share = Subset(data(28), range(dist.get_rank(), 28, 2))
    loaders = DataLoader(share, batch_size=4), DataLoader(share, batch_size=7)
    results: dict[str, Any] = {}
    for phases in PHASES:
        for label, audit in (("plain", []), ("audited", [GradientAudit()])):
            strategy = "ddp_find_unused_parameters_true"
            options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
            results[f"{phases}, {label}"] = fit(SETUPS["sgd"][0], options, PHASES[phases], audit, loaders)
            results[f"{phases}, findings"] = [one.report.of("no_gradient") for one in audit]
    return results


def test_training_is_the_same_on_two_processes(tmp_path: Path) -> None:
    first, second = on_two_processes(both_ways, tmp_path)
    for phases in PHASES:
        for rank in (first, second):
            assert same(rank[f"{phases}, plain"], rank[f"{phases}, audited"])
            assert {"unused.weight", "branch.weight"} <= set(rank[f"{phases}, findings"][0])
        weights = {n: w for n, w in first[f"{phases}, audited"][0].items() if "running" not in n}
        assert all(torch.equal(weight, second[f"{phases}, audited"][0][name]) for name, weight in weights.items())


class LivingTensors(Probe):
    """Counts, at each batch start, the tensors there are and those that have a graph."""

    def __init__(self) -> None:
        super().__init__(start=self.count)
        self.counts: list[tuple[int, int]] = []

    def count(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
        self.counts.append((len(tensors), sum(tensor.grad_fn is not None for tensor in tensors)))


@pytest.mark.parametrize("make", [Observed, lambda: Manual(optimizer=sgd)], ids=["automatic", "manual"])
def test_no_tensor_keeps_a_graph_and_none_is_hoarded(make: Callable[[], LightningModule]) -> None:
    probe = LivingTensors()
    run = trainer(callbacks=[GradientAudit(), probe], max_epochs=3, limit_val_batches=0)
    gc.collect()
    gc.freeze()  # what is there already need not be looked at in every step
    run.fit(make(), loader(12))
    gc.unfreeze()
    assert {graphs for _, graphs in probe.counts} == {0}
    assert len({tensors for tensors, _ in probe.counts[2:]}) == 1


def test_a_fault_that_is_raised_leaves_what_was_trained(tmp_path: Path) -> None:
    """The steps before it are those of a fit without the audit."""
    net = Observed(optimizer=sgd)
    torch.manual_seed(0)
    net = SETUPS["sgd"][0]()
    with pytest.raises(Exception, match="gets no gradient"):
        trainer(callbacks=[GradientAudit(on_violation="raise")], max_epochs=1).fit(net, loader())
    torch.manual_seed(0)
    other = SETUPS["sgd"][0]()
    trainer(max_steps=3).fit(other, loader())
    assert same(snapshot(net), snapshot(other))
