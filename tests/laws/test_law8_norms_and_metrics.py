"""Law 8: with norms and metrics logged, the weights are those without, bit for bit, and no tensor keeps a graph."""

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
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.wrappers import BootStrapper

import lightning_freeze
from lightning_freeze import FreezeBatchNorm, FreezeSchedule, MetricLogger, NormLogger, Phase, TargetNetwork
from tests.nets import Net, Probe, adamw, data, loader, same, sgd, snapshot, trainer
from tests.replicas import on_two_processes


class Observed(Net):
    """With dropout, so that a random number more or less would show, and a part that is frozen."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.neck.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        preds = self(batch[0])
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.training_step(batch, batch_idx)


class Manual(Observed):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(outputs["loss"])
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
        return outputs

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(part.parameters()) for part in (self.backbone, self.head)]


def observers() -> list[Callback]:
    draws = BootStrapper(tm.MulticlassAccuracy(3), num_bootstraps=2)  # random numbers
    metrics = {"acc": tm.MulticlassAccuracy(3), "auroc": tm.MulticlassAUROC(3), "draws": draws}
    return [NormLogger(every_n_steps=1, per="parameter"), NormLogger(every_n_steps=2), MetricLogger(metrics)]


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3))


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
    "several evaluations a step": (
        lambda: Observed(optimizer=lambda params: torch.optim.LBFGS([p for p in params if p.requires_grad], lr=0.1)),
        dict,
    ),
    "manual, two optimizers": (lambda: Manual(optimizer=sgd), dict),
}


def fit(make: Callable[[], LightningModule], options: dict[str, Any], callbacks: list[Callback], loaders: Any) -> Any:
    """Train, and return all that must be equal."""
    torch.manual_seed(0)
    net = make()
    run = trainer(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=1, **options)
    run.fit(net, *loaders)
    states = [optimizer.state_dict()["state"] for optimizer in run.optimizers]
    return snapshot(net), states, torch.get_rng_state(), run


@pytest.mark.filterwarnings("ignore:No positive samples in targets", "ignore:No negative samples in targets")
@pytest.mark.parametrize("setup", SETUPS)
def test_weights_are_the_same_on_one_device(setup: str) -> None:
    make, options = SETUPS[setup]
    loaders = loader(samples=20), loader(samples=8)
    *plain, _ = fit(make, options(), [], loaders)
    *observed, run = fit(make, options(), observers(), loaders)
    assert same(plain, observed)
    assert {"norm/grad", "norm/optimizer_0/grad"} & run.callback_metrics.keys()
    assert {"train/acc", "val/acc"} <= run.callback_metrics.keys()


def both_ways() -> dict[str, Any]:
    """Weights after training with and without the callbacks, and the norms that this process logged."""
    share = Subset(data(28), range(dist.get_rank(), 28, 2))
    loaders = DataLoader(share, batch_size=4), DataLoader(share, batch_size=7)
    results: dict[str, Any] = {}
    for label, callbacks in (("plain", []), ("observed", observers())):
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "gradient_clip_val": 0.1}
        weights, states, _, run = fit(SETUPS["sgd"][0], options, callbacks, loaders)
        results[label] = [weights, states]
        results[f"{label} metrics"] = dict(run.callback_metrics)
    return results


def test_weights_are_the_same_on_two_processes(tmp_path: Path) -> None:
    first, second = on_two_processes(both_ways, tmp_path)
    for rank in (first, second):
        assert same(rank["plain"], rank["observed"])
    trained = {name: value for name, value in first["plain"][0].items() if "running" not in name}
    assert all(torch.equal(value, second["plain"][0][name]) for name, value in trained.items())
    assert same(first["observed metrics"], second["observed metrics"])
    assert {"norm/grad", "norm/update_ratio/head.bias", "train/acc", "val/auroc"} <= first["observed metrics"].keys()


@pytest.fixture
def _only_newer_objects() -> Iterator[None]:
    """Hide what is there already from the garbage collector, and so from what is counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class LivingTensors(Probe):
    """Counts living tensors, and those of them that have a graph, at each batch start from one on."""

    def __init__(self, first: int = 0) -> None:
        super().__init__(start=self.count)
        self.first, self.counts = first, []

    def count(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx < self.first:
            return
        gc.collect()
        living = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
        self.counts.append((len(living), sum(tensor.grad_fn is not None for tensor in living)))


def living(callbacks: list[Callback], make: Callable[[], LightningModule] = Observed) -> list[tuple[int, int]]:
    probe = LivingTensors(first=2)
    run = trainer(callbacks=[*callbacks, probe], max_epochs=1, limit_val_batches=0)
    run.fit(make(), loader(20))
    return probe.counts


@pytest.mark.usefixtures("_only_newer_objects")
@pytest.mark.parametrize("make", [Observed, lambda: Manual(optimizer=sgd)], ids=["automatic", "manual"])
def test_no_tensor_keeps_a_graph_and_none_is_hoarded(make: Callable[[], LightningModule]) -> None:
    metrics = MetricLogger({"acc": tm.MulticlassAccuracy(3)})
    counts = living([NormLogger(every_n_steps=1, per="parameter"), metrics], make)
    assert len(counts) == 3
    assert {graphs for _, graphs in counts} == {0}
    assert len({tensors for tensors, _ in counts}) == 1


class Followed(Observed):
    """With a target network, which its loss looks at."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.target = copy.deepcopy(self.backbone)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().training_step(batch, batch_idx)
        outputs["loss"] = outputs["loss"] + nn.functional.mse_loss(self.backbone(batch[0]), self.target(batch[0]))
        return outputs


def everything() -> list[Callback]:
    audit = [getattr(lightning_freeze, name)() for name in ("GradientAudit",) if name in lightning_freeze.__all__]
    phases = [Phase("head", steps=2), Phase("*", lr_scale={"backbone": 0.1})]
    return [
        *(FreezeSchedule(phases, verbose=False), FreezeBatchNorm("backbone.1"), NormLogger(every_n_steps=1)),
        *(MetricLogger({"acc": tm.MulticlassAccuracy(3)}), TargetNetwork("backbone", "target", tau=0.1)),
        *audit,
    ]


@pytest.mark.usefixtures("_only_newer_objects")
def test_with_everything_on_the_number_of_tensors_stays_the_same() -> None:
    """Looked at when all optimizer state is there, at the steps of three epochs with validation between them."""
    probe = LivingTensors(first=6)
    run = trainer(callbacks=[*everything(), probe], max_epochs=5, check_val_every_n_epoch=2, limit_train_batches=3)
    run.fit(Followed(), loader(), loader(8))
    counts = probe.counts
    assert len(counts) == 9
    assert {graphs for _, graphs in counts} == {0}
    # Not the first ones: before some of them validation has run, before others not.
    assert len({tensors for step, (tensors, _) in enumerate(counts) if step % 3}) == 1


@pytest.mark.usefixtures("_only_newer_objects")
def test_a_kept_graph_would_show() -> None:
    class Keeps(Observed):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            outputs = super().training_step(batch, batch_idx)
            self.__dict__.setdefault("losses", []).append(outputs["loss"])
            return outputs

    assert living([], Keeps)[-1][1] > 0


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
@pytest.mark.filterwarnings("ignore:No positive samples in targets")
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
