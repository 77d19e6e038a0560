"""Laws 1, 2 and 6: what trains and what is frozen does not depend on flags that other code switches during the fit."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, TargetNetwork
from tests.devices import Even, differing, share
from tests.nets import Probe, adamw, loader, moved, sgd, snapshot, trainer
from tests.replicas import WORLD, on_two_processes


class Switched(Even):
    """Has a target of its neck; switches flags by a function before each loss, or after each batch."""

    def __init__(self, optimizer: Any = sgd, *, before: Any = None, after: Any = None, manual: bool = False) -> None:
        super().__init__(optimizer=optimizer)
        self.target = copy.deepcopy(self.neck)
        self.before, self.after = before, after
        self.automatic_optimization = not manual

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.before is not None:
            self.before(self)
        features = self.backbone(batch[0]).mean((2, 3))
        logits = self.head(torch.relu(self.neck(features) + self.target(features)))
        loss = nn.functional.cross_entropy(logits, batch[1])
        if not self.automatic_optimization:
            self.step(loss, batch_idx)
        return loss

    def step(self, loss: Tensor, batch_idx: int) -> None:
        """Accumulate two batches and clip, as Lightning's documentation does."""
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.after is not None:
            self.after(self)


def online_evaluation(net: Any) -> None:
    net.freeze()
    net(torch.ones(2, 2, 5, 5))
    net.unfreeze()


def other_half_steps(net: Any) -> None:
    net.requires_grad_(False)
    net.requires_grad_(True)


def adapters_off_and_on(net: Any) -> None:
    for flag in (False, True):
        for adapter in (net.neck, net.target, net.backbone[4]):
            adapter.requires_grad_(flag)


SWITCHES: dict[str, dict[str, Callable[[Any], None]]] = {
    "freeze and unfreeze after each batch": {"after": online_evaluation},
    "set_requires_grad before each loss": {"before": other_half_steps},
    "adapters off and on": {"before": adapters_off_and_on},
    "all of it": {"before": adapters_off_and_on, "after": online_evaluation},
}
PHASES = [
    Phase("*", epochs=1),  # momentum and moments are there when the backbone freezes
    Phase(["head", "neck"], steps=4),
    Phase(["*", "!backbone.0"], steps=5, lr_scale={"neck": 0.5}),
    Phase("*"),
]
HOLDERS: dict[str, Callable[[], list[Callback]]] = {
    "schedule": lambda: [FreezeSchedule(PHASES, verbose=False)],
    "schedule, eval mode": lambda: [FreezeSchedule(PHASES, frozen_mode="eval", verbose=False)],
    "batchnorm": lambda: [FreezeBatchNorm()],
    "batchnorm, schedule": lambda: [FreezeBatchNorm("backbone.1"), FreezeSchedule(PHASES, verbose=False)],
    "schedule, batchnorm": lambda: [FreezeSchedule(PHASES, verbose=False), FreezeBatchNorm("backbone.1")],
    "target, schedule": lambda: [
        TargetNetwork("neck", "target", tau=0.1),
        FreezeSchedule(PHASES, verbose=False),
    ],
    "schedule, target": lambda: [
        FreezeSchedule(PHASES, verbose=False),
        TargetNetwork("neck", "target", tau=0.1, eval_mode=True),
    ],
    "target": lambda: [TargetNetwork("neck", "target", every_n_steps=2)],
}
SETUPS: dict[str, dict[str, Any]] = {
    "momentum and decay": {},
    "adamw": {"optimizer": adamw},
    "accumulated": {"options": {"accumulate_grad_batches": 4}},
    "clipped by norm": {"options": {"gradient_clip_val": 0.05}},
    "clipped by value": {"options": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "manual, clipped": {"manual": True},
}


def fit(holders: list[Callback], *others: Callback, options: Any = None, **net: Any) -> Switched:
    torch.manual_seed(0)
    built = Switched(**net)
    trainer(callbacks=[*holders, *others], max_epochs=3, **(options or {})).fit(built, loader(), loader())
    return built


@functools.cache
def without_switches(holders: str, setup: str) -> dict[str, Tensor]:
    return snapshot(fit(HOLDERS[holders](), **SETUPS[setup]))


def equal_with_and_without(switches: Any, holders: str, setup: str) -> None:
    net = fit(HOLDERS[holders](), **SETUPS[setup], **switches)
    assert moved(without_switches(holders, setup), snapshot(net)) == set()


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("switches", SWITCHES)
def test_flags_of_others_change_no_weight(switches: str, setup: str) -> None:
    equal_with_and_without(SWITCHES[switches], "schedule", setup)


@pytest.mark.parametrize("holders", [name for name in HOLDERS if name != "schedule"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_whoever_holds_parameters(switches: str, holders: str) -> None:
    equal_with_and_without(SWITCHES[switches], holders, "momentum and decay")


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("switches", SWITCHES)
def test_frozen_is_bit_identical_and_takes_no_part_in_a_clip(switches: str, manual: bool) -> None:
    """Law 1 itself: the frozen do not move, and where the clip takes place they have no gradient."""
    schedule = FreezeSchedule([Phase("*", epochs=1), Phase(["head", "neck"])], verbose=False)
    before: dict[str, Tensor] = {}
    strays: list[str] = []

    def start(_: Any, module: Any) -> None:
        if schedule.phase_index == 1 and not before:
            before.update(snapshot(module))

    class Clips(Switched):
        def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
            if schedule.phase_index == 1:
                gradients = {name for name, p in self.named_parameters() if p.grad is not None}
                strays.extend(name for name in gradients if not name.startswith(("head.", "neck.")))
            super().clip_gradients(*args, **kwargs)

    torch.manual_seed(0)
    net = Clips(manual=manual, **SWITCHES[switches])
    clip = {} if manual else {"gradient_clip_val": 0.05}
    trainer(callbacks=[schedule, Probe(start)], max_epochs=3, **clip).fit(net, loader())
    assert moved(before, snapshot(net)) == {"head.weight", "head.bias", "neck.weight", "neck.bias"}
    assert strays == []


@pytest.mark.parametrize("place", ["module", "callback before", "callback after"])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_epoch_end", "on_train_epoch_start"])
def test_what_is_switched_off_between_epochs_trains_in_the_next(
    hook: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Hooks of the LightningModule come after those of callbacks; what comes too late is said, once by name."""

    class Off(Switched):
        pass

    class Elsewhere(Callback):
        pass

    def off(*arguments: Any) -> None:
        arguments[-1].requires_grad_(False)

    setattr(Off if place == "module" else Elsewhere, hook, off)
    nets = []
    for kind, others in ((Switched, []), (Off, [Elsewhere()])):
        torch.manual_seed(0)
        nets.append(kind())
        schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")], verbose=False)
        callbacks = [schedule, *others] if place == "callback after" else [*others, schedule]
        trainer(callbacks=callbacks, max_epochs=3).fit(nets[-1], loader(), loader())
    assert moved(snapshot(nets[0]), snapshot(nets[1])) == set()
    late = hook == "on_train_epoch_start" and place != "callback before"
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_freeze")]
    assert [message[:70] for message in said] == [
        "other code has switched off requires_grad of 2 parameter(s) that shall"
    ] * late


def test_what_the_module_freezes_after_the_phase_has_begun_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Late(Switched):
        def on_fit_start(self) -> None:
            self.neck.requires_grad_(False)

    nets = [Switched(), Late()]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        torch.manual_seed(0)
        trainer(callbacks=[FreezeSchedule([Phase("*")], verbose=False)], max_epochs=1).fit(net, loader())
    assert moved(snapshot(nets[0]), snapshot(nets[1])) == set()
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_freeze")]
    assert said == (
        "other code has switched off requires_grad of 2 parameter(s) that shall train: neck.weight, neck.bias. They "
        'train all the same. To keep them frozen, take them away from the phases: ["*", "!neck"].'
    )


class Stages(nn.Sequential):
    """As mmdetection's ResNet: its train() freezes its first stages again."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for parameter in self[0].parameters():
            parameter.requires_grad = False
        return self


@pytest.mark.parametrize("frozen_mode", ["batchnorm", "eval", "train"])
@pytest.mark.parametrize("calls", [False, True])
def test_what_a_train_of_its_own_freezes_trains_in_its_phase(
    calls: bool, frozen_mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the schedule itself calls it, to change the mode; only calls of others are said."""
    before: dict[str, Tensor] = {}

    class Calls(Switched):
        def on_train_epoch_start(self) -> None:
            before.update(snapshot(self))
            if calls:
                self.train()

    net = Calls()
    net.backbone = Stages(*net.backbone)
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")], frozen_mode=frozen_mode, verbose=False)
    trainer(callbacks=[schedule], max_epochs=2).fit(net, loader())
    assert "backbone.0.weight" in moved(before, snapshot(net))
    assert len([record for record in caplog.records if "switched off" in record.getMessage()]) == calls


def test_said_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        fit(HOLDERS["schedule, batchnorm"](), **SWITCHES["all of it"])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("other code has switched on requires_grad of ")
    assert "backbone.1.weight" in message


def test_nothing_is_said_where_nobody_switches(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        for holders in HOLDERS.values():
            fit(holders())
    assert caplog.records == []


DDP = [("schedule, batchnorm", "momentum and decay"), ("target, schedule", "manual, clipped")]


def on_this_rank(cases: list[tuple[str, str, str]]) -> list[Any]:
    """For each case: the weights, and the names that differ between ranks."""
    found = []
    for switches, holders, setup in cases:
        torch.manual_seed(0)
        own: dict[str, Any] = dict(SETUPS[setup])
        options = own.pop("options", {})
        net = Switched(**own, **(SWITCHES[switches] if switches else {}))
        run = trainer(
            callbacks=HOLDERS[holders](),
            strategy="ddp",
            devices=WORLD,
            use_distributed_sampler=False,
            max_epochs=3,
            **options,
        )
        run.fit(net, share())
        found.append([snapshot(net), differing(dict(net.named_parameters()))])
    return found


def test_replicas_agree_whoever_switches_flags(tmp_path: Any) -> None:
    most = ("", "freeze and unfreeze after each batch", "all of it")
    cases = [(switches, *case) for case in DDP for switches in most]
    for rank in on_two_processes(on_this_rank, tmp_path, cases):
        found = dict(zip(cases, rank, strict=True))
        for (switches, *case), (weights, differ) in found.items():
            assert differ == [], (switches, case)
            assert moved(found["", *case][0], weights) == set(), (switches, case)
