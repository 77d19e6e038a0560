"""Law 4: a checkpoint written in any phase is the one that the user's own code would have written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, freeze, freeze_batchnorm
from tests.nets import Backbone, Net, adamw, loader, moved, sgd, snapshot, trainer

PHASES = [
    Phase("head", epochs=1),
    Phase("*", epochs=1, lr_scale={"backbone": 0.1}),
    Phase("neck", epochs=1, lr_scale=2.0),
    Phase("*"),
]
SCHEDULERS: dict[str, Any] = {
    "one cycle": lambda o: lrs.OneCycleLR(o, 1e-1, total_steps=40),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.LambdaLR(o, lambda step: 0.9**step)], milestones=[4]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 4), lrs.ExponentialLR(o, 0.9)]),
}


def named(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([(f"p{index}", p) for index, p in enumerate(params)], lr=1e-2)


def two_groups(params: Any) -> torch.optim.Optimizer:
    params = list(params)
    return torch.optim.SGD([{"params": params[:3], "name": "a"}, {"params": params[3:], "name": "b"}], 0.01, 0.9)


def saved(tmp_path: Path, epochs: int, callbacks: list[Any], optimizer: Any, scheduler: str) -> Path:
    """Train and save while the fit is on, as ModelCheckpoint does."""
    path = tmp_path / f"{epochs}-{len(callbacks)}.ckpt"

    class Saving(Net):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == epochs - 1:
                self.trainer.save_checkpoint(path)

    torch.manual_seed(0)
    net = Saving(optimizer, SCHEDULERS[scheduler], interval="step")
    trainer(callbacks=callbacks, max_epochs=epochs).fit(net, loader(), loader())
    return path


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", [adamw, named, two_groups])
@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_optimizer_and_scheduler_states_are_those_of_a_plain_run(
    tmp_path: Path, epochs: int, optimizer: Any, scheduler: str
) -> None:
    ours = torch.load(saved(tmp_path, epochs, [FreezeSchedule(PHASES)], optimizer, scheduler), weights_only=True)
    plain = torch.load(saved(tmp_path, epochs, [], optimizer, scheduler), weights_only=True)
    assert ours["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]
    assert ours["lr_schedulers"] == plain["lr_schedulers"]
    assert ours.keys() == plain.keys()


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_resumes_without_the_callback(tmp_path: Path, epochs: int) -> None:
    path = saved(tmp_path, epochs, [FreezeSchedule(PHASES)], adamw, "sequential")
    net = Net(adamw, SCHEDULERS["sequential"], interval="step")
    run = trainer(max_epochs=4)
    run.fit(net, loader(), loader(), ckpt_path=path, weights_only=True)
    assert run.global_step == 24
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_plain_checkpoint_resumes_in_the_phase_it_would_be_in(tmp_path: Path, epochs: int) -> None:
    path = saved(tmp_path, epochs, [], adamw, "sequential")
    schedule = FreezeSchedule(PHASES)
    net = Net(adamw, SCHEDULERS["sequential"], interval="step")
    trainer(callbacks=[schedule], max_epochs=epochs + 1).fit(net, loader(), loader(), ckpt_path=path)
    assert schedule.history == [(epoch, 6 * epoch, epoch) for epoch in range(epochs + 1)]


def test_another_schedule_takes_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, 2, [FreezeSchedule(PHASES)], adamw, "sequential")
    other = FreezeSchedule([Phase("head", steps=9), Phase("backbone", name="late")])
    net = Net(adamw, SCHEDULERS["sequential"], interval="step")
    with caplog.at_level(logging.WARNING):
        trainer(callbacks=[other], max_epochs=3).fit(net, loader(), loader(), ckpt_path=path)
    assert other.history == [(0, 0, 0), (1, 9, 1)]
    (message,) = [record.getMessage() for record in caplog.records if "another schedule" in record.getMessage()]
    assert "It was in phase 2/4 '*'; this schedule is, at epoch 2, step 12, in phase 2/2 'late'" in message
    assert "head epochs=1 -> * epochs=1 lr_scale={'backbone': 0.1}" in message
    assert "head steps=9 -> backbone name=late" in message


def test_the_same_schedule_resumes_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, 2, [FreezeSchedule(PHASES)], adamw, "one cycle")
    caplog.clear()
    net = Net(adamw, SCHEDULERS["one cycle"], interval="step")
    trainer(callbacks=[FreezeSchedule(PHASES)], max_epochs=4).fit(net, loader(), loader(), ckpt_path=path)
    assert "another schedule" not in caplog.text


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        (None, [Phase("*")]),
        ([Phase("*")], [Phase("neck")]),
        ([Phase("*")], [Phase("head")]),
        ([Phase(["neck", "head"])], [Phase("*")]),
    ],
    ids=str,
)
def test_adopted_parameters_between_schedules(tmp_path: Path, wrote: Any, reads: Any) -> None:
    """What was adopted then and is adopted now keeps its state; the rest comes and goes."""

    def head_only(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(params)[-2:], lr=1e-2)

    path = saved(tmp_path, 1, [FreezeSchedule(wrote)] if wrote else [], head_only, "sequential")
    before = torch.load(path, weights_only=True)
    assert [len(group["params"]) for group in before["optimizer_states"][0]["param_groups"]] == [2]
    steps: dict[str, float] = {}

    class Looking(Net):
        def on_train_start(self) -> None:
            (optimizer,) = self.trainer.optimizers
            for name, p in self.named_parameters():
                if p in optimizer.state:
                    steps[name] = float(optimizer.state[p]["step"])

    net = Looking(head_only, SCHEDULERS["sequential"], interval="step")
    trainer(callbacks=[FreezeSchedule(reads)], max_epochs=2).fit(net, loader(), loader(), ckpt_path=path)
    kept = before.get("callbacks", {}).get("FreezeSchedule")
    adopted_then = set(kept["optimizers"][0]["adopted"]) if kept else set()
    names = {name for name, _ in net.named_parameters()}
    wanted = names if reads[0].train == "*" else {name for name in names if name.startswith(f"{reads[0].train}.")}
    heads = {"head.weight", "head.bias"}
    assert steps.keys() - heads == adopted_then & wanted - heads
    assert set(steps.values()) == {6.0}


class Given(Net):
    """Was built with its backbone, and keeps it among its hyperparameters."""

    def __init__(self, backbone: nn.Module, width: int = 4) -> None:
        super().__init__(sgd)
        self.save_hyperparameters()
        self.backbone = backbone


class Saves(Callback):
    """Saves where ModelCheckpoint does: when validation ends and when an epoch ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}-validation.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}-epoch.ckpt")


@pytest.mark.filterwarnings("ignore:Attribute 'backbone' is an instance of:UserWarning")
@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize("mode", ["batchnorm", "eval"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("by_hand", [False, True], ids=["all trainable", "partly frozen by hand"])
def test_modules_among_hyperparameters(tmp_path: Path, by_hand: bool, swapped: bool, mode: Any) -> None:
    """They are those of a plain run, and `load_from_checkpoint` gives a model that is not frozen any more."""
    callbacks = [FreezeSchedule([Phase("head", epochs=1), Phase("*")], frozen_mode=mode), FreezeBatchNorm("backbone.1")]
    found: list[dict[str, Any]] = []
    for folder, kinds in (("plain", []), ("frozen", callbacks[::-1] if swapped else callbacks)):
        torch.manual_seed(0)
        backbone = Backbone()
        if by_hand:
            freeze(backbone, "4.weight")
            freeze_batchnorm(backbone, "5")
        net = Given(backbone)
        run = trainer(callbacks=[*kinds, Saves(tmp_path / folder)], max_epochs=2)
        run.fit(net, loader(), loader())
        found.append({})
        for path in sorted((tmp_path / folder).iterdir()):
            checkpoint = torch.load(path, weights_only=False)
            module = checkpoint["hyper_parameters"]["backbone"]
            assert checkpoint["hyper_parameters"]["width"] == 4
            weights = {name.removeprefix("backbone."): p for name, p in checkpoint["state_dict"].items()}
            assert all(torch.equal(p, weights[name]) for name, p in module.state_dict().items())
            found[-1][path.name] = (
                {name: p.requires_grad for name, p in module.named_parameters()},
                {name: (child.training, "train" in vars(child)) for name, child in module.named_modules()},
            )
        assert net.hparams.backbone is net.backbone
    assert len(found[0]) == 4
    assert found[1] == found[0]
    again = Given.load_from_checkpoint(path, weights_only=False)
    before = snapshot(again)
    trainer(max_epochs=1).fit(again.train(), loader())
    still = {"backbone.0.bias", "backbone.4.bias"} | ({"backbone.4.weight"} if by_hand else set())
    assert {name for name in before if not (by_hand and ".5." in name)} - moved(before, snapshot(again)) <= still
