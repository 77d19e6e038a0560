"""GradientAudit in real fits: each planted fault is found by name, and nothing else is."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, GradientAudit, Phase
from lightning_freeze.audit.findings import AuditError
from lightning_freeze.metrics.callback import MetricLogger
from lightning_freeze.norms.callback import NormLogger
from lightning_freeze.target.callback import TargetNetwork
from tests.devices import Hooked as HookedDDP
from tests.followers import Student
from tests.laws.test_law6_replicas_agree import post_local_sgd
from tests.nets import Net, Probe, Stops, adamw, averaging, data, loader, sgd, trainer
from tests.replicas import on_two_processes


def fit(net: LightningModule, *callbacks: Callback, audit: GradientAudit | None = None, **options: Any) -> Any:
    """Train with an audit behind the other callbacks, and give it."""
    audit = audit or GradientAudit()
    run = trainer(callbacks=[*callbacks, audit], **{"max_epochs": 2, **options})
    run.fit(net, loader(), loader(8) if is_overridden("validation_step", net) else None)
    return audit


def found(audit: GradientAudit) -> dict[str, set[str]]:
    return {finding.kind: set(audit.report.of(finding.kind)) for finding in audit.report}


def cause(audit: GradientAudit, name: str) -> str:
    (finding,) = [finding for finding in audit.report if finding.name == name]
    return finding.cause


def parameters(net: nn.Module, prefix: str) -> set[str]:
    return {name for name, _ in net.named_parameters() if name.startswith(prefix)}


def statistics(net: nn.Module, prefix: str) -> set[str]:
    return {name for name, _ in net.named_buffers() if name.startswith(prefix)}


def swept(cases: Iterable[tuple[Any, ...]], sample: Callable[..., bool]) -> list[Any]:
    """Give cases for a test, those outside of the sample under the marker ``slow``."""
    return [pytest.param(*case, marks=() if sample(*case) else pytest.mark.slow) for case in cases]


class Hooked(Net):
    """Does something of the test's at some moment."""

    def __init__(self, act: Callable[[Any], None], moment: str, batch: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.act, self.moment, self.batch = act, moment, batch

    def _do(self, moment: str) -> None:
        if moment == self.moment and (self.batch is None or self.trainer.fit_loop.total_batch_idx == self.batch):
            self.act(self)

    def on_train_start(self) -> None:
        self._do("train start")

    def on_train_epoch_start(self) -> None:
        self._do("epoch start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._do("batch start")

    def on_after_backward(self) -> None:
        self._do("after backward")

    def on_train_batch_end(self, *_: Any) -> None:
        self._do("batch end")

    def on_validation_end(self) -> None:
        self._do("validation end")

    def on_train_epoch_end(self) -> None:
        self._do("epoch end")


# Nothing to find


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3))


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

    net = Hooked(switch, "epoch start", optimizer=sgd)
    assert found(fit(net, audit=GradientAudit(every_n_epochs=every, first_n_steps=1), max_epochs=9)) == {}


@pytest.mark.parametrize(
    ("batch", "moment", "every"),
    swept(
        itertools.product([1, 2, 5, 7], ["batch start", "batch end", "epoch start"], [1, 3]),
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

    net = Hooked(switch, "batch start", optimizer=sgd)
    net.neck.requires_grad_(False)
    run = trainer(callbacks=[audit := GradientAudit()], max_epochs=2)
    run.fit(net, loader(48))
    assert audit.report == []


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


@pytest.mark.parametrize("how", ["plain", "toggled", "by hand", "raw"])
@pytest.mark.parametrize("critic_steps", [1, 4])
def test_gan_has_no_finding(how: str, critic_steps: int) -> None:
    assert found(fit(Gan(how, critic_steps), max_epochs=3)) == {}


no_gradients_in_checkpoint = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
# Raised where torch.compile looks at its own inputs.
compiled = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def sgd_of_trainable(params: Any) -> torch.optim.Optimizer:
    return sgd([parameter for parameter in params if parameter.requires_grad])


class Forward(Net):
    """With something in the forward that could be taken for a fault."""

    def __init__(self, what: str) -> None:
        super().__init__(optimizer=plain_sgd if what == "embedding" else sgd)
        self.what = what
        self.extra = nn.Linear(4, 4)
        if what == "weight norm":
            with pytest.warns(FutureWarning):
                self.extra = torch.nn.utils.weight_norm(self.extra)
        if what == "spectral norm":
            self.extra = torch.nn.utils.spectral_norm(self.extra)
        if what == "parametrized":
            self.extra = torch.nn.utils.parametrizations.weight_norm(self.extra)
        if what == "tied":
            self.extra.weight = self.neck.weight
        if what == "embedding":
            self.extra = nn.Embedding(5, 4, sparse=True)
        if what == "compiled":
            self.extra = torch.compile(self.extra, backend="eager")
        if what == "compiled whole":
            torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
            self.extra.forward = torch.compile(self.extra.forward, backend="eager", fullgraph=True)
        if what == "scripted":
            with warnings.catch_warnings(action="ignore"):  # later torch deprecates it
                self.extra = torch.jit.script(self.extra)
        if what == "lazy":
            self.extra = nn.LazyLinear(4)
        if what == "buffer":
            self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x).mean((2, 3))
        if self.what == "dropped at random" and self.training and torch.rand(()) < 0.5:
            extra = features
        elif self.what == "embedding":
            extra = features + self.extra(torch.tensor([1, 2, 3, 1]))[: len(x)]
        elif self.what == "checkpoint":
            extra = checkpoint(self.extra, features, use_reentrant=False)
        elif self.what == "re-entrant checkpoint":
            extra = checkpoint(self.extra, features, use_reentrant=True)
        else:
            extra = self.extra(features)
        if self.what == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * extra.detach().mean(0)
        if self.what == "detached for a log":
            self.seen = [extra.detach().norm().item(), float(features.detach().sum())]
        return self.head(torch.relu(self.neck(extra)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "more": loss * 2} if self.what == "more outputs" else loss


@pytest.mark.parametrize(
    "what",
    [
        *("weight norm", "spectral norm", "parametrized", "tied", "embedding", "buffer", "lazy"),
        *("compiled", "compiled whole", "scripted"),
        *("dropped at random", "checkpoint", "re-entrant checkpoint", "detached for a log", "more outputs"),
    ],
)
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


class Plain(Net):
    """The tuner's callbacks want a learning rate."""

    lr = 0.1


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
    class Swa(StochasticWeightAveraging):
        pass

    assert found(fit(Net(optimizer=sgd_of_trainable), BackboneFinetuning(1), max_epochs=3)) == {}
    frozen = Net(optimizer=sgd)
    frozen.neck.requires_grad_(False)
    assert found(fit(frozen, Swa(1e-3, swa_epoch_start=1, annealing_epochs=1), max_epochs=4)) == {}
    frozen = Plain(optimizer=sgd)
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


# Frozen values


def add(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1e-3)


WRITES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda net: net.neck.weight.detach().copy_(net.neck.weight.detach() + 1),
    "data": lambda net: net.neck.weight.data.mul_(1.5),
    "data set": lambda net: setattr(net.neck.weight, "data", net.neck.weight.data + 1),
    "in place": lambda net: add(net.neck.weight),
    "state_dict": lambda net: net.neck.load_state_dict({**net.neck.state_dict(), "weight": torch.ones(4, 4)}),
}


MOMENTS = [
    *(("batch start", 1), ("after backward", 0), ("batch end", 0), ("batch end", 4), ("after backward", 5)),
    *(("epoch end", None), ("epoch start", 5), ("batch start", 9), ("validation end", None)),
]


@pytest.mark.parametrize(
    ("write", "moment", "batch"),
    swept(
        ((write, *moment) for write in WRITES for moment in MOMENTS),
        lambda write, moment, batch: write == "data" or (moment, batch) == ("batch end", 0),
    ),
)
def test_frozen_parameter_written_by_hand_is_found(write: str, moment: str, batch: int | None) -> None:
    net = Hooked(WRITES[write], moment, batch)
    net.neck.requires_grad_(False)
    audit = fit(net)
    assert found(audit) == {"frozen_value_moved": {"neck.weight"}}
    assert ".data" in audit.report[0].cause
    assert "TargetNetwork" in audit.report[0].fix


@pytest.mark.parametrize("first", [True, False])
def test_write_to_what_the_schedule_froze_is_found(first: bool) -> None:
    schedule = FreezeSchedule([Phase("*", epochs=1), Phase("head")], verbose=False)
    net = Hooked(lambda net: net.backbone[0].weight.data.zero_(), "batch end", 8)
    audit = GradientAudit()
    run = trainer(callbacks=[audit, schedule] if first else [schedule, audit], max_epochs=2)
    run.fit(net, loader())
    assert found(audit) == {"frozen_value_moved": {"backbone.0.weight"}}


def test_write_between_seldom_audits_is_found() -> None:
    net = Hooked(WRITES["data"], "batch end", 8)
    net.neck.requires_grad_(False)
    assert found(fit(net, audit=GradientAudit(every_n_epochs=5), max_epochs=2)) == {
        "frozen_value_moved": {"neck.weight"}
    }


def freeze_neck(net: Any) -> None:
    net.neck.requires_grad_(False)


class KeepsZeros(Hooked):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_frozen_parameter_that_an_optimizer_steps_is_found(optimizer: Any, batch: int) -> None:
    # Before validation, Lightning sets every gradient to None.
    audit = fit(KeepsZeros(freeze_neck, "batch start", batch, optimizer=optimizer), limit_val_batches=0)
    neck = {"neck.weight", "neck.bias"}
    assert found(audit)["frozen_in_step"] == neck
    assert found(audit) == {"frozen_in_step": neck, "frozen_value_moved": neck}
    assert "zero_grad(set_to_none=False)" in cause_of(audit, "frozen_in_step")
    assert "An optimizer holds it together with a gradient" in cause_of(audit, "frozen_value_moved")


def cause_of(audit: GradientAudit, kind: str) -> str:
    (only,) = {finding.cause for finding in audit.report if finding.kind == kind}
    return only


def test_zero_gradients_are_no_finding_while_everything_trains() -> None:
    assert found(fit(KeepsZeros(lambda net: None, "never"))) == {}


# Running statistics


def test_batchnorm_that_updates_with_frozen_parameters_is_found() -> None:
    net = Net()
    net.backbone.requires_grad_(False)
    audit = fit(net)
    assert found(audit) == {"frozen_statistics_moved": statistics(net, "backbone")}
    assert len(audit.report) == 6
    assert "runs in training mode" in audit.report[0].cause
    assert "FreezeBatchNorm" in audit.report[0].fix


@pytest.mark.parametrize("fix", ["FreezeBatchNorm", "FreezeSchedule", "eval"])
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_fixes_that_a_finding_names_help(fix: str) -> None:
    net = Net()
    net.backbone.requires_grad_(False)
    others: list[Callback] = []
    if fix == "FreezeBatchNorm":
        others = [FreezeBatchNorm("backbone")]
    elif fix == "FreezeSchedule":
        others = [FreezeSchedule([Phase(["head", "neck"])], verbose=False)]
    else:
        net.backbone.eval()
    assert found(fit(net, *others)) == {}


def test_statistics_of_a_layer_frozen_alone_are_found() -> None:
    net = Net()
    net.backbone[1].requires_grad_(False)
    assert found(fit(net)) == {"frozen_statistics_moved": statistics(net, "backbone.1.")}


def test_statistics_written_in_eval_mode_are_found() -> None:
    net = Hooked(lambda net: net.backbone[1].running_var.data.fill_(3), "batch end", 1)
    audit = fit(net, FreezeBatchNorm(train_affine=True))
    assert found(audit) == {"frozen_statistics_moved": {"backbone.1.running_var"}}
    assert "something wrote to it" in audit.report[0].cause


class Counting(nn.Module):
    """Learns in a buffer too, as codebooks and queues do."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(()))
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            self.calls += 1
        return x * self.scale


@pytest.mark.parametrize(
    ("mode", "always", "expected"), [(None, False, True), ("batchnorm", False, True), ("eval", False, False)]
)
def test_any_buffer_of_a_frozen_module_that_moves_is_found(mode: Any, always: bool, expected: bool) -> None:
    net = Net()
    net.neck = nn.Sequential(net.neck, Counting(always))
    net.neck.requires_grad_(False)
    others = [FreezeSchedule([Phase(["*", "!neck"])], frozen_mode=mode, verbose=False)] if mode else []
    audit = fit(net, *others)
    assert found(audit) == ({"frozen_statistics_moved": {"neck.1.calls"}} if expected else {})
    for finding in audit.report:
        assert "runs in training mode" in finding.cause
        assert "frozen_mode='eval'" in finding.fix
    assert found(fit(net, *others, audit=GradientAudit(ignore="neck"))) == {}


def test_buffer_that_moves_in_eval_mode_is_found() -> None:
    net = Net()
    net.neck = nn.Sequential(net.neck, Counting(always=True))
    audit = fit(net, FreezeSchedule([Phase(["*", "!neck"])], frozen_mode="eval", verbose=False))
    assert found(audit) == {"frozen_statistics_moved": {"neck.1.calls"}}
    assert "is in eval mode now" in audit.report[0].cause


def test_buffer_of_a_module_that_trains_is_no_finding() -> None:
    net = Net()
    net.neck = nn.Sequential(net.neck, Counting(always=True))
    assert found(fit(net)) == {}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_named_where_it_moves_a_frozen_embedding(kind: Any) -> None:
    class Words(Net):
        def __init__(self) -> None:
            super().__init__()
            self.words = kind(3, 4, max_norm=0.5)

        def forward(self, x: Tensor) -> Tensor:
            words = self.words(torch.tensor([[0], [1], [2], [1]])).view(4, 4)
            return self.head(torch.relu(self.neck(self.backbone(x).mean((2, 3)) + words[: len(x)])))

    net = Words()
    audit = fit(net, FreezeSchedule([Phase(["*", "!words"])], verbose=False))
    assert found(audit) == {"frozen_value_moved": {"words.weight"}}
    assert f"{kind.__name__} has max_norm=0.5" in audit.report[0].cause
    assert "max_norm=None" in audit.report[0].fix
    net.words.max_norm = None
    assert found(fit(net, FreezeSchedule([Phase(["*", "!words"])], verbose=False))) == {}


# No gradient


class Faulty(Net):
    def __init__(self, fault: str, **options: Any) -> None:
        super().__init__(**options)
        self.fault = fault
        self.branch = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x).mean((2, 3)) * self.scale
        self.kept = None
        if self.fault == "detach":
            features = features + self.branch(features).detach()
        elif self.fault == "detach_":
            features = features + self.branch(features).detach_()
        elif self.fault == "data":
            features = features + self.branch(features).data
        elif self.fault == "item":
            with torch.no_grad():
                extra = self.branch(features).sum().item()
            features = features + extra
        elif self.fault == "numpy":
            features = features + torch.from_numpy(self.branch(features).detach().numpy())
        elif self.fault == "no_grad":
            with torch.no_grad():
                extra = self.branch(features)
            features = features + extra
        elif self.fault == "inference":
            with torch.inference_mode():
                extra = self.branch(features.detach())
            features = features + extra.clone()
        elif self.fault == "left out":
            self.branch(features)
        elif self.fault == "re-entrant checkpoint":
            features = features + checkpoint(self.branch, features.detach(), use_reentrant=True)
        elif self.fault == "copy":
            features = features + nn.functional.linear(features, self.branch.weight.detach(), self.branch.bias.data)
        elif self.fault == "its backward gives none":
            features = features + Stops.apply(self.branch(features))
        elif self.fault == "argmax":
            features = features + self.branch(features).argmax(1, keepdim=True)
        else:
            assert self.fault in ("unused", "none")
            features = features if self.fault == "unused" else self.branch(features)
        return self.head(torch.relu(self.neck(features)))


CAUSES = {
    "unused": "never uses it",
    "detach": r".detach() at audit/test_callback.py:",
    "detach_": r".detach_() at audit/test_callback.py:",
    "data": r".data at audit/test_callback.py:",
    "item": "only where no graph is recorded (audit/test_callback.py:",
    "numpy": r".detach() at audit/test_callback.py:",
    "no_grad": "only where no graph is recorded (audit/test_callback.py:",
    "inference": "only where no graph is recorded (audit/test_callback.py:",
    "re-entrant checkpoint": "only where no graph is recorded (audit/test_callback.py:",
    "left out": "the loss does not depend on what comes of it",
    "argmax": "the loss does not depend on what comes of it",
    "its backward gives none": "the loss does not depend on what comes of it",
    "copy": "Only a copy without a graph is used",
}


@pytest.mark.parametrize("fault", CAUSES)
@no_gradients_in_checkpoint
def test_parameter_without_gradient_is_found_with_what_cuts_it_off(fault: str) -> None:
    audit = fit(Faulty(fault))
    assert found(audit) == {"no_gradient": {"branch.weight", "branch.bias"}}
    for finding in audit.report:
        assert CAUSES[fault] in finding.cause
        assert "freeze it" in finding.fix
        assert finding.step == 3


def test_cause_names_the_line_of_the_detach() -> None:
    source = Path(__file__).read_text().splitlines()
    (line,) = [number for number, text in enumerate(source, 1) if "self.branch(features).detach()\n" in f"{text}\n"]
    assert f"test_callback.py:{line}." in cause(fit(Faulty("detach")), "branch.bias")


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_missing_gradient_is_found_after_first_n_steps(steps: int, options: dict[str, Any]) -> None:
    audit = fit(Faulty("detach"), audit=GradientAudit(first_n_steps=steps), **options)
    assert {(finding.kind, finding.step) for finding in audit.report} == {("no_gradient", steps)}


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 1}, {"limit_train_batches": 1}], ids=str)
def test_missing_gradient_is_found_in_a_fit_shorter_than_first_n_steps(options: dict[str, Any]) -> None:
    audit = fit(Faulty("no_grad"), **options)
    assert found(audit) == {"no_gradient": {"branch.weight", "branch.bias"}}


def test_zero_gradient_left_over_counts_as_none() -> None:
    class LeavesZeros(Faulty):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)

    net = LeavesZeros("unused")
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert found(fit(net)) == {"no_gradient": {"branch.weight", "branch.bias"}}


def test_gradient_set_by_hand_counts() -> None:
    net = Hooked(lambda net: setattr(net.extra, "grad", torch.ones(2)), "after backward")
    net.extra = nn.Parameter(torch.zeros(2))
    assert found(fit(net)) == {}
    assert net.extra.abs().sum() > 0


def test_missing_gradient_in_a_later_phase_is_found() -> None:
    class CutLater(Faulty):
        def forward(self, x: Tensor) -> Tensor:
            self.fault = "unused" if self.trainer.fit_loop.total_batch_idx >= 6 else "none"
            return super().forward(x)

    phases = [Phase(["*", "!backbone"], steps=6), Phase("*")]
    audit = fit(CutLater("none"), FreezeSchedule(phases, verbose=False), num_sanity_val_steps=0)
    assert found(audit) == {"no_gradient": {"branch.weight", "branch.bias"}}


def test_missing_gradient_in_a_later_epoch_is_found() -> None:
    class CutLater(Faulty):
        def forward(self, x: Tensor) -> Tensor:
            self.fault = "detach" if self.trainer.current_epoch >= 1 else "none"
            return super().forward(x)

    audit = fit(CutLater("none"), audit=GradientAudit(first_n_steps=1), max_epochs=4)
    assert found(audit) == {"no_gradient": {"branch.weight", "branch.bias"}}
    assert "test_callback.py" in audit.report[0].cause
    assert audit.report[0].step == 6 + 10


@compiled
def test_cause_in_a_compiled_module_says_what_cannot_be_seen() -> None:
    net = Faulty("unused")
    net.neck = torch.compile(net.neck, backend="eager")
    audit = fit(net)
    assert found(audit) == {"no_gradient": {"branch.weight", "branch.bias"}}
    assert "cannot be seen" in audit.report[0].cause


def test_network_of_a_gan_without_gradient_is_found() -> None:
    class Cut(Gan):
        def _turn(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
            super()._turn(optimizer, lambda: loss() if "AdamW" in str(type(optimizer)) else self.critic[0].bias.sum())

    audit = fit(Cut("plain"))
    assert found(audit) == {"no_gradient": parameters(audit_net(), "generator")}


def audit_net() -> Gan:
    return Gan("plain")


class AllCut(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("train", ["*", "head"])
@pytest.mark.parametrize("first", [True, False])
def test_error_of_a_loss_without_graph_is_explained(train: str, first: bool) -> None:
    net, audit, schedule = AllCut(), GradientAudit(), FreezeSchedule([Phase(train)], verbose=False)
    run = trainer(callbacks=[audit, schedule] if first else [schedule, audit])
    with pytest.raises(RuntimeError, match="does not require grad"):
        run.fit(net, loader())
    assert found(audit) == {"no_gradient": parameters(net, train.strip("*"))}
    assert all("no graph is recorded" in finding.cause for finding in audit.report)


def test_error_of_another_kind_adds_no_finding() -> None:
    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    net, audit = Breaks(), GradientAudit()
    with pytest.raises(ZeroDivisionError):
        fit(net, audit=audit)
    assert audit.report == []
    assert "training_step" not in vars(net)


class Ends(Net):
    """Ends by an error in the second step's forward, or in the first one's backward."""

    def __init__(self, error: type[BaseException], where: str) -> None:
        super().__init__(optimizer=sgd)
        self.error, self.where = error, where
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        error = self.error

        def fail(*_: Tensor) -> None:
            raise error("as of DDP, where a parameter was not used")

        if batch_idx == 1 and self.where == "forward":
            fail()
        loss = super().training_step(batch, batch_idx) * self.scale
        if self.where == "backward":
            loss.register_hook(fail)
        return loss


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("phases", [[Phase("head", epochs=1), Phase("*")], [Phase("*")]], ids=["frozen", "all"])
def test_fit_that_ends_by_an_error_has_no_false_finding(
    error: type[BaseException], where: str, phases: list[Phase], first: bool
) -> None:
    """FreezeSchedule gives flags back in ``on_exception``, and the step that the error cuts short proves nothing."""
    schedule, audit = FreezeSchedule(phases, verbose=False), GradientAudit()
    run = trainer(callbacks=[audit, schedule] if first else [schedule, audit])
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        run.fit(Ends(error, where), loader())
    assert audit.report == []
    assert audit.report.checks == (2 if where == "forward" else 1)


def test_gradient_missing_before_an_error_is_reported() -> None:
    class Unused(Ends):
        def __init__(self) -> None:
            super().__init__(ValueError, "forward")
            self.branch = nn.Linear(2, 2)

    audit = GradientAudit()
    schedule = FreezeSchedule([Phase(["head", "branch"])], verbose=False)
    with pytest.raises(ValueError, match="not used"):
        fit(Unused(), schedule, audit=audit)
    assert found(audit) == {"no_gradient": {"branch.weight", "branch.bias"}}
    assert "in the step that was audited" in audit.report[0].cause


# Optimizers


def test_parameter_in_no_optimizer_is_found() -> None:
    net = Net(optimizer=lambda params: sgd([p for p in params if p.ndim > 1]))
    audit = fit(net)
    assert found(audit) == {"in_no_optimizer": {name for name, p in net.named_parameters() if p.ndim == 1}}
    assert {finding.step for finding in audit.report} == {0}
    assert found(fit(net, FreezeSchedule([Phase("*")], verbose=False))) == {}


def test_parameter_in_two_optimizers_is_found() -> None:
    class Two(Gan):
        def configure_optimizers(self) -> Any:
            return sgd([*self.generator.parameters(), self.critic[0].weight]), adamw(self.critic.parameters())

    audit = fit(Two("plain"))
    assert found(audit) == {"in_two_optimizers": {"critic.0.weight"}}
    assert audit.report[0].cause.startswith("It is in SGD 0, group 0 and in AdamW 1, group 0")


def test_parameter_twice_in_one_optimizer_is_found() -> None:
    def twice(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        optimizer = sgd(params)
        optimizer.param_groups[0]["params"].append(params[-1])
        return optimizer

    assert found(fit(Net(optimizer=twice))) == {"in_two_optimizers": {"head.bias"}}


def test_training_without_an_optimizer_is_no_finding() -> None:
    class ByHand(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for parameter in self.parameters():
                parameter.grad = None
            super().training_step(batch, batch_idx).backward()
            for parameter in self.parameters():
                parameter.data.sub_(0.1 * parameter.grad)

        def configure_optimizers(self) -> None:
            return None

    with pytest.warns(UserWarning, match="will run with no optimizer"):
        audit = fit(ByHand())
    assert found(audit) == {}


# Graphs


LOSSES: list[Tensor] = []


class Keeps(Net):
    shared: list[Tensor] = []  # noqa: RUF012

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.losses: list[Tensor] = []
        self.neck.cache: dict[str, Any] = {}
        self.register_buffer("mean", torch.zeros(()))
        kept: list[Tensor] = []
        self.remember = lambda loss: kept.append(loss)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.how == "list":
            self.losses.append(loss)
        elif self.how == "detached":
            self.losses.append(loss.detach())
        elif self.how == "attribute":
            self.last = loss
        elif self.how == "nest":
            self.neck.cache.setdefault("all", []).append({"loss": (1, loss)})
        elif self.how == "buffer":
            self.mean = self.mean.detach() + loss
        elif self.how == "class":
            self.shared.append(loss)
        elif self.how == "view":
            with torch.no_grad():
                self.losses.append(loss[None])
        elif self.how == "closure":
            self.remember(loss)
        elif self.how == "global":
            LOSSES.append(loss)
        elif self.how == "callback":
            self.trainer.callbacks[0].seen = loss
        elif self.how == "cycle":
            cycle: list[Any] = [loss]
            cycle.append(cycle)
        return loss


KEPT = {
    "list": {"self.losses[0]"},
    "attribute": {"self.last"},
    "nest": {"self.neck.cache['all'][0]['loss'][1]"},
    "buffer": {"self.mean"},
    "class": {"self.shared[0]"},
    "view": {"self.losses[0]._base (self.losses[0] is a view of it)"},
    "closure": {"self.remember.kept[0]"},
    "callback": {"Probe.seen"},
    "global": {"tests.audit.test_callback.LOSSES[0]"},
    "detached": None,
    "cycle": None,
}


@pytest.mark.parametrize("how", KEPT)
def test_tensor_that_keeps_a_graph_is_found(how: str) -> None:
    audit = fit(Keeps(how), Probe())
    LOSSES.clear()
    Keeps.shared.clear()
    expected = {"graph_kept": KEPT[how]} if KEPT[how] else {}
    assert found(audit) == expected
    for finding in audit.report:
        assert ".detach()" in finding.fix


def test_list_of_graphs_emptied_at_the_epoch_end_is_found() -> None:
    class Empties(Keeps):
        def on_train_epoch_end(self) -> None:
            self.losses.clear()

    assert found(fit(Empties("list"))) == {"graph_kept": {"self.losses[0]"}}


def test_kept_graph_is_found_after_one_batch() -> None:
    assert found(fit(Keeps("list"), fast_dev_run=True)) == {"graph_kept": {"self.losses[0]"}}


def test_graph_from_before_the_fit_is_no_finding() -> None:
    before = torch.ones(2, requires_grad=True) * 2
    assert found(fit(Net())) == {}
    assert before.grad_fn is not None


def test_batch_with_a_graph_is_no_finding() -> None:
    class Augments(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * self.gain, batch[1]

    assert found(fit(Augments())) == {}


# Words


def test_finding_is_raised_as_an_error_with_its_report() -> None:
    net, audit = Faulty("unused"), GradientAudit(on_violation="raise")
    with pytest.raises(AuditError, match=r"branch\.weight, branch\.bias: trainable, but it gets no gradient") as caught:
        fit(net, audit=audit)
    assert caught.value.report is audit.report
    assert str(caught.value) == str(audit.report)
    assert len(audit.report) == 2
    assert isinstance(caught.value, MisconfigurationException)
    assert not net._forward_hooks
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())


def test_finding_of_the_start_is_raised_before_the_first_step() -> None:
    net = Net(optimizer=lambda params: sgd(list(params)[:-1]))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(AuditError, match=r"head\.bias: trainable, but in no optimizer"):
        fit(net, audit=GradientAudit(on_violation="raise"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_each_finding_is_logged_once_and_the_end_is_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_freeze"):
        audit = fit(Faulty("unused"), max_epochs=3)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("branch.weight, branch.bias" in message for message in messages) == 1
    assert messages[-1] == audit.report.summary
    assert messages[-1].startswith("audit: 2 findings in ")
    assert messages[-1].endswith(f" over {len(list(Faulty('unused').parameters()))} parameters")
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == [f"audit, step 3: {str(audit.report).split(chr(10), 1)[1]}"]


def test_ignored_parameters_have_no_finding_and_unknown_ones_are_refused() -> None:
    net = Hooked(WRITES["data"], "batch end", 1)
    net.neck.requires_grad_(False)
    net.unused = nn.Linear(2, 2)
    assert found(fit(net, audit=GradientAudit(ignore=["neck", "unused"]))) == {}
    with pytest.raises(ValueError, match=r'GradientAudit\(ignore="necks"\) matches no parameter. Did you mean "neck"'):
        fit(net, audit=GradientAudit(ignore="necks"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_violation": "rise"}, ValueError, r"on_violation='rise'.*Did you mean 'raise'"),
        ({"every_n_epochs": 0}, ValueError, r"every_n_epochs=0\): every_n_epochs is at least 1"),
        ({"first_n_steps": 0}, ValueError, r"first_n_steps=0\): first_n_steps is at least 1"),
        ({"first_n_steps": 1.5}, TypeError, r"first_n_steps=1.5\): first_n_steps is a whole number"),
        ({"every_n_epochs": True}, TypeError, r"every_n_epochs=True"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientAudit(**options)


def test_strategy_that_shards_is_refused() -> None:
    run = trainer()
    run.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match="does not work with FSDPStrategy"):
        GradientAudit().on_fit_start(run, Net())


def test_no_hook_stays_behind_and_the_callback_pickles() -> None:
    net, audit = Faulty("unused"), GradientAudit()
    run = trainer(callbacks=[audit], max_epochs=1)
    run.fit(net, loader())
    assert "training_step" not in vars(net)
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())
    del audit.log, audit.log_dict  # Lightning lends every callback the model's log functions
    twin = pickle.loads(pickle.dumps(audit))
    assert twin.report == audit.report
    assert str(twin.report) == str(audit.report)


def test_validation_and_test_are_not_audited() -> None:
    audit = GradientAudit(on_violation="raise")
    run = trainer(callbacks=[audit])
    run.validate(Faulty("unused"), loader(8), verbose=False)
    assert audit.report.checks == 0


def test_batch_that_is_not_audited_costs_the_same_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are calls of the package's own functions: no time is measured."""
    calls: list[int] = []

    class Counts(Net):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.more = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.neck(self.more(self.backbone(x).mean((2, 3))))))

    def counted(layers: int) -> list[int]:
        looks = 0

        def look(*_: Any, **__: Any) -> Any:
            nonlocal looks
            looks += 1
            return original(*_, **__)

        original = nn.Module.named_parameters
        monkeypatch.setattr(nn.Module, "named_parameters", look)
        probe = Probe(start=lambda *_: calls.append(looks), end=lambda *_: calls.append(looks))
        calls.clear()
        fit(Counts(layers), probe, audit=GradientAudit(first_n_steps=2), max_epochs=1)
        monkeypatch.setattr(nn.Module, "named_parameters", original)
        return [b - a for a, b in itertools.pairwise(calls)]

    assert counted(2)[5:] == counted(20)[5:] == [0] * 6


# Processes


class Rank(Hooked):
    """Does it on one process only."""

    def _do(self, moment: str) -> None:
        if self.trainer.global_rank == 1:
            super()._do(moment)


def push_apart(net: Any) -> None:
    add(net.neck.weight)


def on_ddp(kind: str) -> dict[str, Any]:
    """Train on two processes with a planted fault, and give what was found."""
    share = Subset(data(24), range(dist.get_rank(), 24, 2))
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
    callbacks: list[Callback] = []
    net: LightningModule = Net(optimizer=sgd)
    if kind == "scheduled":
        callbacks = [FreezeSchedule([Phase("head", steps=2), Phase("*")], verbose=False)]
    elif kind == "apart":
        net = Rank(push_apart, "batch end", 1, optimizer=sgd)
    elif kind in ("frozen apart", "averaged"):
        net = Rank(push_apart, "batch end", 1, optimizer=sgd)
        net.neck.requires_grad_(False)
        if kind == "averaged":
            options["strategy"] = HookedDDP(**post_local_sgd())
    elif kind == "late":
        net = Hooked(lambda net: net.neck.requires_grad_(True), "epoch start", 2, optimizer=sgd)
        net.neck.requires_grad_(False)
    elif kind == "statistics":
        net = Rank(lambda net: net.backbone[1].running_mean.fill_(3), "train start", optimizer=sgd)
        callbacks = [FreezeBatchNorm("backbone")]
        options["strategy"] = trainer_strategy()
    elif kind == "used on one":
        net = OnOne()
        options["strategy"] = "ddp_find_unused_parameters_true"
    elif kind == "unused":
        net = Faulty("unused", optimizer=sgd)
        options["strategy"] = "ddp_find_unused_parameters_true"
    elif kind == "kept on one":
        net = KeepsOnOne("list")
    audit = GradientAudit(on_violation="raise" if kind == "raised" else "warn", first_n_steps=2)
    if kind == "raised":
        net = Rank(push_apart, "batch end", 0, optimizer=sgd)
        net.neck.requires_grad_(False)
    run = trainer(callbacks=[*callbacks, audit], **options)
    raised = False
    try:
        run.fit(net, DataLoader(share, batch_size=4))
    except AuditError:
        raised = True
    return {"found": [[f.kind, f.name, f.cause] for f in audit.report], "raised": raised, "end": audit.report.summary}


def trainer_strategy() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(broadcast_buffers=False)


class OnOne(Faulty):
    """One process uses the branch in every step, the other never."""

    def __init__(self) -> None:
        super().__init__("none", optimizer=sgd)

    def forward(self, x: Tensor) -> Tensor:
        self.fault = "none" if dist.get_rank() else "unused"
        return super().forward(x)


class KeepsOnOne(Keeps):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.how = "list" if dist.get_rank() else "nothing"
        return super().training_step(batch, batch_idx)


NECK = [["replicas_differ", "neck.weight"]]
ON_DDP: dict[str, list[list[str]]] = {
    "clean": [],
    "scheduled": [],
    "apart": NECK,
    "frozen apart": [["frozen_value_moved", "neck.weight"], *NECK],
    "averaged": [["frozen_value_moved", "neck.weight"], *NECK],
    "late": [["replicas_differ", "neck.weight"], ["replicas_differ", "neck.bias"]],
    "statistics": [["replicas_differ", "backbone.1.running_mean"]],
    "used on one": [],
    "unused": [["no_gradient", "branch.weight"], ["no_gradient", "branch.bias"]],
    "kept on one": [["graph_kept", "self.losses[0]"]],
    "raised": [["frozen_value_moved", "neck.weight"], *NECK],
}


def every_kind() -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {}
    for kind in ON_DDP:
        torch.manual_seed(0)
        results[kind] = on_ddp(kind)
    return results


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(every_kind, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("kind", ON_DDP)
def test_findings_are_the_same_on_two_processes(ddp: list[dict[str, Any]], kind: str) -> None:
    for rank in ddp:
        assert [one[:2] for one in rank[kind]["found"]] == ON_DDP[kind]
        assert rank[kind]["raised"] == (kind == "raised")
    assert ddp[0][kind] == ddp[1][kind]


def test_causes_on_two_processes_name_the_rank(ddp: list[dict[str, Any]]) -> None:
    causes = {kind: [one[2] for one in result["found"]] for kind, result in ddp[0].items()}
    assert "never reduces the gradient" in causes["late"][0]
    assert "One process wrote to it alone" in causes["apart"][0]
    assert all(causes[kind][0].endswith("(On rank 1 only.)") for kind in ("frozen apart", "kept on one", "raised"))


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


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_zeroed_in_place_counts_as_none(set_to_none: bool, manual: bool) -> None:
    """However a step clears gradients, one that comes no more is missed after a while."""

    class Detaches(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual

        def forward(self, x: Tensor) -> Tensor:
            features = self.neck(self.backbone(x).mean((2, 3)))
            return self.head(torch.relu(features if self.current_epoch == 0 else features.detach()))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad(set_to_none=set_to_none)
            self.manual_backward(loss)
            optimizer.step()
            return None

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=set_to_none)

    net = Detaches()
    # Before a validation Lightning sets all gradients to None.
    audit = fit(net, audit=GradientAudit(first_n_steps=1), max_epochs=4, limit_val_batches=0)
    assert found(audit) == {"no_gradient": parameters(net, "backbone") | parameters(net, "neck")}
