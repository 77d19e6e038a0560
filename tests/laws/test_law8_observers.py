"""Law 8: with audit, norms and metrics on, training is what it is without them, bit for bit, and no graph is kept."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics.classification as tm
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.wrappers import BootStrapper

from lightning_freeze import (
    AuditError,
    FreezeBatchNorm,
    FreezeSchedule,
    GradientAudit,
    MetricLogger,
    NormLogger,
    Phase,
    TargetNetwork,
)
from tests.nets import Net, Probe, adamw, data, half, loader, same, sgd, snapshot, trainer
from tests.replicas import on_two_processes

pytestmark = pytest.mark.usefixtures("only_what_it_imports")

few_samples = pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets")


class Observed(Net):
    """With dropout, so that a random number more or less would show, a frozen part, and faults for the audit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.branch, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        features = self.base(self.backbone(x).mean((2, 3)))
        features = features + self.branch(nn.functional.dropout(features)).detach()
        self.seen.append(features.sum().item())
        return self.head(torch.relu(self.neck(features)))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        preds = self(batch[0])
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return Observed.training_step(self, batch, batch_idx)


class Manual(Observed):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            outputs = super().training_step(batch, batch_idx)
            self.manual_backward(outputs["loss"])
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return outputs

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(part.parameters()) for part in (self.backbone, self.head)]


def observers() -> list[Callback]:
    draws = BootStrapper(tm.MulticlassAccuracy(3), num_bootstraps=2)  # random numbers
    metrics = {"acc": tm.MulticlassAccuracy(3), "auroc": tm.MulticlassAUROC(3), "draws": draws}
    norms = NormLogger(every_n_steps=1, per="parameter"), NormLogger(every_n_steps=2)
    return [GradientAudit(), *norms, MetricLogger(metrics)]


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS([p for p in params if p.requires_grad], lr=0.1, max_iter=3)


SETUPS: dict[str, tuple[Callable[[], LightningModule], Callable[[], dict[str, Any]]]] = {
    "sgd": (lambda: Observed(optimizer=sgd), dict),
    "adamw, clipped by norm": (lambda: Observed(optimizer=adamw), lambda: {"gradient_clip_val": 0.1}),
    "accumulated, clipped by value": (
        lambda: Observed(optimizer=sgd),
        lambda: {"accumulate_grad_batches": 4, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "float16 with skipped steps": (lambda: Observed(optimizer=sgd), lambda: {"plugins": half()}),
    "float16, fused": (
        lambda: Observed(optimizer=lambda params: torch.optim.AdamW(params, fused=True)),
        lambda: {"plugins": half()},
    ),
    "bfloat16 weights": (lambda: Observed(optimizer=adamw), lambda: {"precision": "bf16-true"}),
    "bfloat16 mixed": (lambda: Observed(optimizer=adamw), lambda: {"precision": "bf16-mixed"}),
    "several evaluations a step": (lambda: Observed(optimizer=lbfgs), dict),
    "manual, two optimizers": (lambda: Manual(optimizer=sgd), dict),
}
PHASES = {"one phase": [], "phases": [Phase("head", steps=2), Phase(["*", "!neck"], steps=3), Phase("*")]}


def fit(
    make: Callable[[], LightningModule], phases: str, callbacks: list[Callback], loaders: Any, **options: Any
) -> Any:
    """Train, and return all that must be equal, and the Trainer."""
    torch.manual_seed(0)
    net = make()
    schedule = [FreezeSchedule(PHASES[phases], verbose=False)] if PHASES[phases] else []
    run = trainer(callbacks=[*schedule, *callbacks], max_epochs=2, num_sanity_val_steps=1, **options)
    run.fit(net, *loaders)
    states = [optimizer.state_dict() for optimizer in run.optimizers]
    flags = [(name, p.requires_grad, p.grad) for name, p in net.named_parameters()]
    return (snapshot(net), states, flags, net.seen, torch.get_rng_state()), run


@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.filterwarnings("ignore:.*LBFGS")
@few_samples
def test_training_is_the_same_on_one_device(setup: str, phases: str) -> None:
    if phases == "phases" and setup in ("several evaluations a step", "manual, two optimizers"):
        pytest.skip("LBFGS cannot freeze; two optimizers leave the branch to neither, which a schedule refuses.")
    make, options = SETUPS[setup]
    loaders = loader(samples=28), loader(samples=8)
    plain, _ = fit(make, phases, [], loaders, **options())
    watching = observers()
    observed, run = fit(make, phases, watching, loaders, **options())
    assert same(plain, observed)
    assert "unused.weight" in {finding.name for finding in watching[0].report}
    assert {"norm/grad", "norm/optimizer_0/grad"} & run.callback_metrics.keys()
    assert {"train/acc", "val/acc"} <= run.callback_metrics.keys()


def both_ways() -> dict[str, Any]:
    """All that must be equal, after training with and without the observers, and what this process has seen."""
    share = Subset(data(28), range(dist.get_rank(), 28, 2))
    loaders = DataLoader(share, batch_size=4), DataLoader(share, batch_size=7)
    options = {"strategy": "ddp_find_unused_parameters_true", "devices": 2, "use_distributed_sampler": False}
    results: dict[str, Any] = {}
    for phases in PHASES:
        watching = observers()
        make = SETUPS["sgd"][0]
        plain, _ = fit(make, phases, [], loaders, gradient_clip_val=0.1, **options)
        observed, run = fit(make, phases, watching, loaders, gradient_clip_val=0.1, **options)
        found = watching[0].report.of("no_gradient")
        results[phases] = {"plain": plain, "observed": observed, "found": found, "metrics": dict(run.callback_metrics)}
    return results


def test_training_is_the_same_on_two_processes(tmp_path: Path) -> None:
    ranks = on_two_processes(both_ways, tmp_path)
    for phases in PHASES:
        first, second = (rank[phases] for rank in ranks)
        for rank in (first, second):
            assert same(rank["plain"], rank["observed"])
            assert {"unused.weight", "branch.weight"} <= set(rank["found"])
        weights = {name: weight for name, weight in first["observed"][0].items() if "running" not in name}
        assert all(torch.equal(weight, second["observed"][0][name]) for name, weight in weights.items())
        assert same(first["metrics"], second["metrics"])
        assert {"norm/grad", "norm/update_ratio/head.bias", "train/acc", "val/auroc"} <= first["metrics"].keys()


@pytest.fixture
def _only_newer_objects() -> Iterator[None]:
    """Hide what is there already from the garbage collector, and so from what is counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class LivingTensors(Probe):
    """Counts, at each batch start from one on, the tensors there are and those that have a graph."""

    def __init__(self, first: int) -> None:
        super().__init__(start=self.count)
        self.first = first
        self.counts: list[tuple[int, int]] = []

    def count(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx >= self.first:
            gc.collect()
            tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
            self.counts.append((len(tensors), sum(tensor.grad_fn is not None for tensor in tensors)))


@pytest.mark.usefixtures("_only_newer_objects")
@pytest.mark.parametrize("make", [Observed, lambda: Manual(optimizer=sgd)], ids=["automatic", "manual"])
def test_no_tensor_keeps_a_graph_and_none_is_hoarded(make: Callable[[], LightningModule]) -> None:
    metrics, probe = MetricLogger({"acc": tm.MulticlassAccuracy(3)}), LivingTensors(first=4)  # when there are values
    callbacks = [GradientAudit(), NormLogger(every_n_steps=1, per="parameter"), metrics, probe]
    trainer(callbacks=callbacks, max_epochs=3, limit_val_batches=0).fit(make(), loader(12))
    assert len(probe.counts) == 5
    assert {graphs for _, graphs in probe.counts} == {0}
    assert len({tensors for tensors, _ in probe.counts}) == 1


class Followed(Observed):
    """With a target network, which its loss looks at."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.target = copy.deepcopy(self.backbone)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().training_step(batch, batch_idx)
        outputs["loss"] = outputs["loss"] + nn.functional.mse_loss(self.backbone(batch[0]), self.target(batch[0]))
        return outputs


@pytest.mark.usefixtures("_only_newer_objects")
def test_with_everything_on_the_number_of_tensors_stays_the_same() -> None:
    """Looked at when all optimizer state is there, at the steps of three epochs with validation between them."""
    probe, phases = LivingTensors(first=6), [Phase("head", steps=2), Phase("*", lr_scale={"backbone": 0.1})]
    callbacks = [
        *(FreezeSchedule(phases, verbose=False), FreezeBatchNorm("backbone.1"), NormLogger(every_n_steps=1)),
        *(MetricLogger({"acc": tm.MulticlassAccuracy(3)}), TargetNetwork("backbone", "target", tau=0.1)),
        *(GradientAudit(), probe),
    ]
    run = trainer(callbacks=callbacks, max_epochs=5, check_val_every_n_epoch=2, limit_train_batches=3)
    run.fit(Followed(), loader(), loader(8))
    assert len(probe.counts) == 9
    assert {graphs for _, graphs in probe.counts} == {0}
    # Not the first ones: before some of them validation has run, before others not.
    assert len({tensors for step, (tensors, _) in enumerate(probe.counts) if step % 3}) == 1


class Fails(Observed):
    """Raises in one of its hooks, in the third step of the second epoch."""

    def __init__(self, where: str = "", error: type[BaseException] = RuntimeError) -> None:
        super().__init__(optimizer=sgd)
        self.where, self.error = where, error

    def fail(self, where: str) -> None:
        if self.where == where and self.global_step == 8:
            raise self.error

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.fail("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.fail("on_before_optimizer_step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.fail("on_train_batch_end")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training_step", "on_before_optimizer_step", "on_train_batch_end"])
@few_samples
def test_after_an_exception_weights_are_the_same_and_what_was_logged_is_true(
    where: str, error: type[BaseException]
) -> None:
    def fit(callbacks: list[Callback], where: str = "", **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        net, run = Fails(where, error), trainer(callbacks=callbacks, **{"max_epochs": 2, **options})
        try:
            run.fit(net, loader(), loader(8))
        except (RuntimeError, SystemExit):
            assert where
        assert not any(hooks for o in run.optimizers for name, hooks in vars(o).items() if name.endswith("_hooks"))
        return snapshot(net), dict(run.callback_metrics)

    plain, _ = fit([], where)
    observed, logged = fit(observers(), where)
    assert same(plain, observed)
    _, epoch = fit(observers(), max_epochs=1)
    _, steps = fit(observers(), max_steps=8, max_epochs=-1)
    assert len(logged) > 20
    for name, value in logged.items():
        assert torch.equal(value, (steps if name.startswith("norm/") else epoch)[name]), name


def test_a_fault_that_is_raised_leaves_what_was_trained() -> None:
    """The steps before it are those of a fit without the audit."""
    weights = []
    for callbacks in ([GradientAudit(on_violation="raise")], []):
        torch.manual_seed(0)
        net = Observed(optimizer=sgd)
        try:
            trainer(callbacks=callbacks, max_steps=3 if not callbacks else -1).fit(net, loader())
        except AuditError:
            assert callbacks
        weights.append(snapshot(net))
    assert same(*weights)
