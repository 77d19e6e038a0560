"""GradientAudit finds nothing in fits that do what they should."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from lightning_freeze import (
    FreezeBatchNorm,
    FreezeSchedule,
    GradientAudit,
    MetricLogger,
    NormLogger,
    Phase,
    TargetNetwork,
)
from tests.audit.fits import Gan, Hooked, compiled, fit, found, no_gradients_in_checkpoint, swept
from tests.followers import Student
from tests.nets import Net, Probe, averaging, half, loader, sgd, trainer

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "accumulated": lambda: {"accumulate_grad_batches": 4},
    "clipped": lambda: {"gradient_clip_val": 0.1},
    "float16 with skipped steps": lambda: {"plugins": half()},
    "bfloat16 mixed": lambda: {"precision": "bf16-mixed"},
    "bfloat16": lambda: {"precision": "bf16-true"},
    "sanity checking": lambda: {"num_sanity_val_steps": 2},
    "validation within the epoch": lambda: {"val_check_interval": 2},
    "one batch": lambda: {"fast_dev_run": True},
    "a few steps": lambda: {"max_steps": 8},
}
SCHEDULES: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "by epochs": lambda: [FreezeSchedule([Phase("head", epochs=1), Phase("*")], verbose=False)],
    "by steps, to and fro": lambda: [
        FreezeSchedule(
            [Phase("head", steps=2), Phase("*", steps=3), Phase("neck", steps=1), Phase(["head", "backbone"])],
            verbose=False,
        )
    ],
    "without eval mode": lambda: [FreezeSchedule([Phase("head", epochs=1), Phase("*")], frozen_mode="train")],
    "offloaded": lambda: [FreezeSchedule([Phase("*", steps=3), Phase("head")], optimizer_state="offload")],
    "frozen BatchNorm": lambda: [FreezeBatchNorm(), FreezeSchedule([Phase("head", epochs=1), Phase("*")])],
}


@pytest.mark.parametrize(
    ("schedule", "options", "first"),
    swept(
        itertools.product(SCHEDULES, OPTIONS, [True, False]),
        lambda schedule, options, first: options == "plain" or (schedule.startswith("by steps") and not first),
    ),
)
def test_clean_fit_has_no_finding(schedule: str, options: str, first: bool) -> None:
    others = SCHEDULES[schedule]()
    audit = GradientAudit(on_violation="raise")
    callbacks = [audit, *others] if first else [*others, audit]
    run = trainer(callbacks=callbacks, **{"max_epochs": 3, **OPTIONS[options]()})
    accumulated = options == "accumulated" and schedule.startswith(("by steps", "offloaded"))
    run.fit(Net(optimizer=sgd), loader(48 if accumulated else 24), loader(8))
    assert audit.report == []
    assert audit.report.summary.startswith("audit: no finding in ")
    assert audit.report.checks > 0


@pytest.mark.parametrize("every", [1, 2, 5])
def test_flags_that_the_user_switches_are_no_finding(every: int) -> None:
    def switch(net: Any) -> None:
        turn = net.trainer.fit_loop.total_batch_idx
        net.backbone.requires_grad_(turn % 9 < 5)
        net.backbone.train(turn % 9 < 5)
        for p in net.backbone.parameters():
            p.grad = None

    net = Hooked(switch, "on_train_epoch_start", optimizer=sgd)
    assert found(fit(net, audit=GradientAudit(every_n_epochs=every, first_n_steps=1), max_epochs=9)) == {}


@pytest.mark.parametrize(
    ("batch", "moment", "every"),
    swept(
        itertools.product([1, 2, 5, 7], ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_start"], [1, 3]),
        lambda batch, moment, every: every == 1 and batch in (1, 5),
    ),
)
def test_unfreezing_in_mid_epoch_is_no_finding(batch: int, moment: str, every: int) -> None:
    net = Hooked(lambda net: net.neck.requires_grad_(True), moment, batch)
    net.neck.requires_grad_(False)
    assert found(fit(net, audit=GradientAudit(every_n_epochs=every))) == {}


def test_unfreezing_and_freezing_between_two_looks_is_no_finding() -> None:
    def switch(net: Any) -> None:
        batch = net.trainer.fit_loop.total_batch_idx
        if batch in (4, 8):
            net.neck.requires_grad_(batch == 4)
            for p in net.neck.parameters():
                p.grad = None

    net = Hooked(switch, "on_train_batch_start", optimizer=sgd)
    net.neck.requires_grad_(False)
    assert found(fit(net, samples=48, limit_val_batches=0)) == {}


@pytest.mark.parametrize("how", ["plain", "toggled", "by hand", "raw"])
@pytest.mark.parametrize("critic_steps", [1, 4])
def test_gan_has_no_finding(how: str, critic_steps: int) -> None:
    assert found(fit(Gan(how, critic_steps), max_epochs=3)) == {}


def plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def sgd_of_trainable(params: Any) -> torch.optim.Optimizer:
    return sgd([parameter for parameter in params if parameter.requires_grad])


def weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(4, 4))


def compiled_whole() -> nn.Module:
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    layer = nn.Linear(4, 4)
    layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
    return layer


def scripted() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # later torch deprecates it
        return torch.jit.script(nn.Linear(4, 4))


# Layers, and ways to use one, that could be taken for a fault.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": weight_norm,
    "spectral norm": lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    "parametrized": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "embedding": lambda: nn.Embedding(5, 4, sparse=True),
    "lazy": lambda: nn.LazyLinear(4),
    "compiled": lambda: torch.compile(nn.Linear(4, 4), backend="eager"),
    "compiled whole": compiled_whole,
    "scripted": scripted,
}
USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropped at random": lambda net, x: x if net.training and torch.rand(()) < 0.5 else net.extra(x),
    "embedding": lambda net, x: x + net.extra(torch.tensor([1, 2, 3, 1]))[: len(x)],
    "checkpoint": lambda net, x: checkpoint(net.extra, x, use_reentrant=False),
    "re-entrant checkpoint": lambda net, x: checkpoint(net.extra, x, use_reentrant=True),
}


class Forward(Net):
    def __init__(self, what: str) -> None:
        super().__init__(optimizer=plain_sgd if what == "embedding" else sgd)
        self.what = what
        self.extra = LAYERS.get(what, lambda: nn.Linear(4, 4))()
        if what == "tied":
            self.extra.weight = self.neck.weight
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x).mean((2, 3))
        extra = USES[self.what](self, features) if self.what in USES else self.extra(features)
        if self.what == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * extra.detach().mean(0)
        if self.what == "detached for a log":
            self.seen = [extra.detach().norm().item(), float(features.detach().sum())]
        return self.head(torch.relu(self.neck(extra)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "more": loss * 2} if self.what == "more outputs" else loss


@pytest.mark.parametrize("what", [*{**LAYERS, **USES}, "tied", "buffer", "detached for a log", "more outputs"])
@compiled
@no_gradients_in_checkpoint
def test_unusual_forwards_are_no_finding(what: str) -> None:
    torch.manual_seed(1)
    assert found(fit(Forward(what), max_epochs=4)) == {}


def test_decorated_training_step_gets_its_arguments() -> None:
    class Decorated(Net):
        @torch.enable_grad()
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(batch, 0)

    assert found(fit(Decorated(), max_epochs=1)) == {}


def test_averaged_weights_are_no_alarm() -> None:
    schedule = FreezeSchedule([Phase("*", steps=3), Phase(["head", "neck"])])
    average = averaging("EMAWeightAveraging")(decay=0.5)
    assert found(fit(Net(optimizer=sgd), schedule, average, max_epochs=3)) == {}


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", ["torch", "timm"])
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_an_average_in_the_module_is_no_finding(kind: str, trainable: bool) -> None:
    class Averages(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=sgd)
            made = AveragedModel(self.backbone) if kind == "torch" else ModelEmaV3(self.backbone, decay=0.9)
            self.average = made.requires_grad_(trainable)

        def on_train_batch_end(self, *_: Any) -> None:
            (self.average.update_parameters if kind == "torch" else self.average.update)(self.backbone)

        def configure_optimizers(self) -> Any:
            return sgd([p for name, p in self.named_parameters() if not name.startswith("average")])

    assert found(fit(Averages())) == {}
    assert found(fit(Averages(), audit=GradientAudit(ignore="head"))) == {}


# BackboneFinetuning's, of BatchNorm layers that it leaves trainable.
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_callbacks_that_move_weights_by_design_are_no_finding(tmp_path: Path) -> None:
    assert found(fit(Net(optimizer=sgd_of_trainable), BackboneFinetuning(1), max_epochs=3)) == {}
    frozen = Net(optimizer=sgd)
    frozen.neck.requires_grad_(False)
    average = StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1)
    assert found(fit(frozen, average, max_epochs=4)) == {}
    frozen = Net(optimizer=sgd)
    frozen.lr = 0.1
    frozen.neck.requires_grad_(False)
    finder = LearningRateFinder(num_training_steps=4)
    assert found(fit(frozen, finder, enable_checkpointing=True, default_root_dir=tmp_path)) == {}
    assert found(fit(Net(), NormLogger(every_n_steps=1), logger=False)) == {}


@pytest.mark.parametrize("follow", [{"tau": 0.3}, {"every_n_steps": 2}], ids=str)
def test_target_network_is_no_finding(follow: dict[str, Any]) -> None:
    audit = fit(Student(), TargetNetwork("online", "target", **follow))
    assert found(audit) == {}


@pytest.mark.parametrize("stop", [3, 6, 9])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_weights_loaded_to_resume_are_no_finding(tmp_path: Path, stop: int) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule([Phase("head", steps=5), Phase("*")], verbose=False)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="stop")
    assert found(fit(Net(), schedule(), saving, max_steps=stop, enable_checkpointing=True)) == {}
    run = trainer(callbacks=[schedule(), audit := GradientAudit()], max_epochs=3)
    run.fit(Net(), loader(), ckpt_path=tmp_path / "stop.ckpt")
    assert audit.report == []


def test_second_fit_has_its_own_report() -> None:
    net, audit = Net(), GradientAudit()
    net.losses = []
    act = Probe(end=lambda _, net: net.losses.append(net.head.weight.sum()))
    assert found(fit(net, act, audit=audit)) == {"graph_kept": {"self.losses[0]"}}
    net.losses.clear()
    assert found(fit(net, audit=audit)) == {}


def test_other_observers_are_no_finding() -> None:
    import torchmetrics.classification as tm

    class Returns(Net):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            preds = self(batch[0])
            return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return self.training_step(batch, batch_idx)

    metrics = MetricLogger({"acc": tm.MulticlassAccuracy(3)})
    assert found(fit(Returns(), NormLogger(every_n_steps=1, per="parameter"), metrics)) == {}
