"""What ends a phase, and with the last one the fit; what is called and said then."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from torch import nn

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Plateau
from lightning_freeze.schedule.weights import refuse_sharded
from tests.nets import LOADS_ALL, Net, Probe, loader, moved, same, sgd, snapshot, trainer

Lines = pytest.LogCaptureFixture


class Scores(Net):
    """Its metric of validation takes given values, then stays at the last."""

    def __init__(self, *values: float) -> None:
        super().__init__(sgd)
        self.values = list(values)
        self.at_look: list[dict[str, Any]] = []

    def on_validation_epoch_end(self) -> None:
        self.at_look.append(snapshot(self))
        self.log("score", self.values.pop(0) if len(self.values) > 1 else self.values[0])


def schedule_of(net: LightningModule) -> FreezeSchedule:
    (schedule,) = [one for one in net.trainer.callbacks if isinstance(one, FreezeSchedule)]  # type: ignore[attr-defined]
    return schedule


def said(caplog: Lines, level: int = logging.INFO) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("lightning_freeze") and record.levelno == level
    ]


def whys(schedule: FreezeSchedule) -> list[str]:
    return [begin.why for begin in schedule.history]


# The last phase's end ends the fit


@pytest.mark.parametrize(
    ("last", "options", "end", "why"),
    [
        (Phase("*", epochs=2), {}, (3, 18), "2 epochs"),
        (Phase("*", epochs=2), {"val_check_interval": 2}, (3, 18), "2 epochs"),
        (Phase("*", steps=4), {}, (2, 10), "4 steps"),
        (Phase("*", steps=6), {}, (2, 12), "6 steps"),
        (Phase("*", steps=4), {"accumulate_grad_batches": 4}, (3, 6), "4 steps"),
        (Phase("*", fraction=0.25), {"max_epochs": 4}, (2, 12), "6 steps"),
        (Phase("*", fraction=0.25), {"max_steps": 20}, (2, 11), "5 steps"),
        (Phase("*", until=Plateau("val_loss", patience=2, min_delta=9.0)), {}, (4, 24), "val_loss had no better"),
        (
            Phase("*", until=Plateau("val_loss", patience=2, min_delta=9.0)),
            {"val_check_interval": 2},
            (2, 12),
            "val_loss had no better",
        ),
        (Phase("*", until=Plateau("train_loss", patience=2, min_delta=9.0)), {}, (4, 24), "train_loss had no better"),
        (Phase("*", until=lambda trainer, _: trainer.global_step >= 9), {}, (2, 9), "test_ends.<lambda>"),
    ],
)
def test_the_fit_ends_with_the_last_phase(last: Phase, options: Any, end: Any, why: str, caplog: Lines) -> None:
    schedule = FreezeSchedule([Phase("head", epochs=1), last], verbose=False)
    run = trainer(callbacks=[schedule], **{"max_epochs": 20, **options})
    run.fit(Net(log_train="train_loss"), loader(), loader())
    assert (run.current_epoch, run.global_step) == end
    (line,) = said(caplog)
    assert line.startswith("phase 2/2 '*' is over at epoch ")
    assert line.endswith(": the fit ends")
    assert why.rpartition(".")[2] in line
    # Nothing is left to do, in the same Trainer and in another.
    run.fit_loop.max_epochs = 30
    before = snapshot(run.lightning_module)
    run.fit(run.lightning_module, loader(), loader())
    assert run.global_step == end[1]
    assert same(snapshot(run.lightning_module), before)


def test_a_fit_that_was_ended_by_its_last_phase_resumes_to_nothing(tmp_path: Path) -> None:
    phases = [Phase("head", epochs=1), Phase("*", steps=4)]
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
    run = trainer(tmp_path, callbacks=[FreezeSchedule(phases), saver], max_epochs=9, enable_checkpointing=True)
    run.fit(Net(), loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    for path in (tmp_path / "end.ckpt", tmp_path / "epoch=1-step=10.ckpt"):
        calls: list[str] = []
        net = Net()
        schedule, again = FreezeSchedule(phases), trainer(callbacks=[Told(calls)], max_epochs=30)
        again.callbacks.insert(0, schedule)  # type: ignore[attr-defined]
        again.fit(net, loader(), loader(), ckpt_path=path, weights_only=True)
        assert (again.global_step, schedule.history) == (10, [(0, 0, 0), (1, 6, 1)])
        assert same(snapshot(net), snapshot(run.lightning_module))
        assert calls == []


@pytest.mark.parametrize(
    ("options", "end", "line"),
    [
        ({"min_epochs": 4}, (4, 24), "after 1 epoch: the fit goes on to min_epochs=4"),
        ({"min_steps": 15}, (3, 15), "after 1 epoch: the fit goes on to min_steps=15"),
        ({"min_epochs": 2}, (2, 12), "after 1 epoch: the fit ends"),
    ],
)
def test_the_trainers_minimum_comes_first(options: Any, end: Any, line: str, caplog: Lines) -> None:
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", epochs=1)], verbose=False)
    run = trainer(callbacks=[schedule], max_epochs=9, **options)
    run.fit(Net(), loader(), loader())
    assert (run.current_epoch, run.global_step) == end
    assert [one for one in said(caplog) if one.endswith(line)] == said(caplog)
    assert len(said(caplog)) == 1


def test_validation_sees_the_weights_with_which_the_fit_ends() -> None:
    looks = []

    class Looks(Net):
        def on_validation_epoch_end(self) -> None:
            looks.append(self.trainer.global_step)

    trainer(callbacks=[FreezeSchedule([Phase("head", steps=8)])], max_epochs=9).fit(Looks(), loader(), loader())
    assert looks == [6, 8]


def test_the_fit_does_not_end_within_an_accumulation_window() -> None:
    """The plateau is reached after its second batch."""
    schedule, batches = FreezeSchedule([Phase("head", until=Plateau("score", patience=1))]), []
    options = {"accumulate_grad_batches": 4, "val_check_interval": 1, "max_epochs": 2}
    run = trainer(callbacks=[schedule, Probe(end=lambda run, _: batches.append(run.global_step))], **options)
    run.fit(Scores(1.0), loader(), loader())
    assert batches == [0, 0, 0, 1]


# Functions, next_phase()


def test_a_function_is_asked_before_each_step_but_the_first_and_at_the_start_of_epochs() -> None:
    asked = []

    def until(trainer: Trainer, pl_module: LightningModule) -> bool:
        assert pl_module is trainer.lightning_module
        asked.append((trainer.current_epoch, trainer.global_step))
        return len(asked) == 4

    schedule = FreezeSchedule([Phase("head", steps=4), Phase("*", until=until), Phase("neck")])
    trainer(callbacks=[schedule], max_epochs=3).fit(Net(), loader(), loader())
    assert asked == [(0, 5), (1, 6), (1, 7), (1, 8)]
    assert schedule.history == [(0, 0, 0), (0, 4, 1), (1, 8, 2)]
    assert whys(schedule)[2].endswith("until")


HOOKS = [
    "on_train_epoch_start",
    "on_train_batch_start",
    "training_step",
    "on_train_batch_end",
    "on_validation_epoch_end",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_any_hook_may_ask_for_the_next_phase(hook: str, last: bool) -> None:
    """It begins before the next step; asked after our own hook of a batch's start, after the step of that batch."""
    net = Net()
    asked: list[int] = []
    inner = getattr(net, hook)

    def ask(*args: Any) -> Any:
        step = net.trainer.global_step
        if step >= 4 and not asked:
            asked.append(step + (hook in ("on_train_batch_start", "training_step")))
            schedule_of(net).next_phase()
        return inner(*args)

    setattr(net, hook, ask)
    schedule = FreezeSchedule([Phase("head", epochs=9), *([] if last else [Phase("*")])], verbose=False)
    run = trainer(callbacks=[schedule], max_epochs=3)
    run.fit(net, loader(), loader())
    if last:
        assert run.global_step == asked[0]
        assert schedule.progress.ended == "next_phase()"
    else:
        assert [begin[1:] for begin in schedule.history] == [(0, 0), (asked[0], 1)]
        assert whys(schedule) == ["", "next_phase()"]
        assert run.global_step == 18


def test_next_phase_does_not_cut_an_accumulation_window() -> None:
    class Asks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.fit_loop.total_batch_idx == 1:
                schedule_of(self).next_phase()
            return super().training_step(batch, batch_idx)

    schedule, flags = FreezeSchedule([Phase("*", epochs=9), Phase("head")]), []
    probe = Probe(lambda run, _: flags.append(schedule.phase_index))
    trainer(callbacks=[schedule, probe], max_epochs=1, accumulate_grad_batches=4).fit(Asks(), loader(), loader())
    assert flags == [0, 0, 0, 0, 1, 1]


def test_next_phase_needs_a_fit() -> None:
    with pytest.raises(RuntimeError, match="call it from a hook"):
        FreezeSchedule([Phase("head")]).next_phase()


# Shares of a fit


@pytest.mark.parametrize(
    ("options", "border"),
    [
        ({}, 12),
        ({"accumulate_grad_batches": 4}, 4),
        ({"max_steps": 16}, 8),
        ({"max_epochs": -1, "max_steps": 10}, 5),
        ({"limit_train_batches": 3}, 6),
        ({"callbacks": [GradientAccumulationScheduler({0: 2, 2: 3})]}, 5),  # 3 + 3 + 2 + 2 steps
    ],
)
def test_a_fraction_is_of_the_steps_that_the_fit_takes(options: dict[str, Any], border: int) -> None:
    schedule = FreezeSchedule([Phase("head", fraction=0.5), Phase("*")])
    run = trainer(**{"max_epochs": 4, **options, "callbacks": [schedule, *options.get("callbacks", [])]})
    run.fit(Net(), loader(), loader())
    assert schedule.history[1][1] == border
    assert run.global_step == 2 * border


def test_another_max_epochs_does_not_move_a_border(tmp_path: Path) -> None:
    phases, net = [Phase("head", fraction=0.5), Phase("*")], Net()
    run = trainer(callbacks=[FreezeSchedule(phases)], max_epochs=4, limit_train_batches=5)
    stop = Probe(end=lambda run, _: setattr(run, "should_stop", run.global_step == 7))
    run.callbacks.append(stop)  # type: ignore[attr-defined]
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "early.ckpt")
    schedule = FreezeSchedule(phases)
    again = trainer(callbacks=[schedule], max_epochs=40, limit_train_batches=5)
    again.fit(net, loader(), ckpt_path=tmp_path / "early.ckpt", weights_only=True)
    assert schedule.history[1][1] == 10


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__(sgd)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_a_share_of_what_nobody_knows_is_refused() -> None:
    phases = [Phase("head", fraction=0.25), Phase("*")]
    for net, options in ((ByHand(), {}), (Net(), {"max_epochs": -1})):
        with pytest.raises(MisconfigurationException, match=r"fraction=0.25 of the fit, and how many .* max_steps"):
            trainer(callbacks=[FreezeSchedule(phases)], **options).fit(net, loader())
    schedule = FreezeSchedule(phases)
    trainer(callbacks=[schedule], max_epochs=-1, max_steps=8).fit(ByHand(), loader())
    assert schedule.history == [(0, 0, 0), (0, 2, 1)]


def test_shares_of_more_than_the_fit_are_refused() -> None:
    FreezeSchedule([Phase("a", fraction=0.1) for _ in range(10)])
    with pytest.raises(ValueError, match=r"0\.5 \+ 0\.6, are 1\.1 of the fit"):
        FreezeSchedule([Phase("a", fraction=0.5), Phase("b", fraction=0.6)])


# Plateaus


@pytest.mark.parametrize("frozen_mode", ["batchnorm", "train"])
def test_the_best_weights_and_buffers_come_back_and_nothing_else_moves(frozen_mode: Any) -> None:
    net = Scores(3.0, 1.0, 2.0, 2.0, 5.0, 4.0, 5.0, 5.0)
    phases = [
        Phase(["head", "backbone.4"], until=Plateau("score", patience=2, restore_best=True)),
        Phase("*", until=Plateau("score", patience=2, restore_best=True)),
    ]
    ends: list[dict[str, Any]] = []
    net.on_phase_end = lambda *_: ends.append(snapshot(net))  # type: ignore[attr-defined]
    schedule = FreezeSchedule(phases, frozen_mode=frozen_mode)
    trainer(callbacks=[schedule], max_epochs=9).fit(net, loader(), loader())
    assert schedule.history == [(0, 0, 0), (4, 24, 1)]
    assert schedule.progress.ended == "score had no better value than 4 for 2 looks"
    assert same(ends, [net.at_look[1], net.at_look[5]])
    assert same(snapshot(net), net.at_look[5])
    assert moved(net.at_look[0], net.at_look[1])
    assert schedule.progress.plateau.kept == {}


def test_the_optimizer_goes_on_with_its_state_after_the_best_has_come_back() -> None:
    net = Scores(1.0, 2.0)
    states: list[Any] = []
    net.on_phase_end = lambda *_: states.append(net.optimizers().state_dict())  # type: ignore[attr-defined]
    net.on_phase_start = lambda *_: states.append(net.optimizers().state_dict())  # type: ignore[attr-defined]
    phases = [Phase("head", until=Plateau("score", patience=1, restore_best=True)), Phase("*")]
    trainer(callbacks=[FreezeSchedule(phases)], max_epochs=3).fit(net, loader(), loader())
    assert states[1]["state"]
    assert same(states[1], states[2])


def test_a_phase_that_epochs_end_keeps_its_last_weights() -> None:
    net = Scores(1.0, 2.0)
    phases = [Phase("head", epochs=2, until=Plateau("score", patience=2, restore_best=True)), Phase("neck")]
    trainer(callbacks=[FreezeSchedule(phases)], max_epochs=3).fit(net, loader(), loader())
    last = net.at_look[1]
    assert not {name for name in moved(last, snapshot(net)) if name.startswith("head")}


def test_only_what_can_have_moved_is_kept(tmp_path: Path) -> None:
    class Big(Scores):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.teacher = nn.Linear(100, 100)
            self.register_buffer("table", torch.zeros(3))

    phases = [Phase("head", until=Plateau("score", restore_best=True)), Phase("*")]
    run = trainer(callbacks=[FreezeSchedule(phases), FreezeBatchNorm()], max_epochs=2)
    run.fit(Big(), loader(), loader())
    run.save_checkpoint(tmp_path / "mid.ckpt")
    kept = torch.load(tmp_path / "mid.ckpt", weights_only=True)["callbacks"]["FreezeSchedule"]["plateau"]["kept"]
    assert sorted(kept) == ["head.bias", "head.weight", "table"]


def test_best_weights_in_parts_are_refused() -> None:
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    phases = [Phase("head", until=Plateau("score", restore_best=True))]
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(MisconfigurationException, match=f"Under {type(strategy).__name__} each process"):
            refuse_sharded(strategy, phases)
        refuse_sharded(strategy, [Phase("head", until=Plateau("score"))])


def test_min_epochs_and_threshold() -> None:
    phases = [
        Phase("head", until=Plateau("score", patience=1, min_epochs=3)),
        Phase("*", until=Plateau("score", threshold=0.5)),
        Phase("neck"),
    ]
    schedule, net = FreezeSchedule(phases), Scores(1.0, 1.0, 1.0, 2.0, 0.5, 0.1)
    trainer(callbacks=[schedule], max_epochs=9).fit(net, loader(), loader())
    assert schedule.history == [(0, 0, 0), (3, 18, 1), (5, 30, 2)]
    assert whys(schedule)[1:] == ["score had no better value than 1 for 2 looks", "score reached 0.5"]


def test_a_value_that_is_not_finite_is_said_once_a_phase(caplog: Lines) -> None:
    nan = float("nan")
    phases = [Phase("head", until=Plateau("score", patience=3)), Phase("*", until=Plateau("score", patience=2))]
    schedule = FreezeSchedule(phases, verbose=False)
    trainer(callbacks=[schedule], max_epochs=9).fit(Scores(1.0, nan, nan, nan, float("inf")), loader(), loader())
    assert schedule.history == [(0, 0, 0), (4, 24, 1)]
    line = "phase {} waits for a plateau of 'score', which is {} at epoch {}, step {}: no improvement on any value."
    expected = [line.format("1/2 'head'", nan, 1, 12), line.format("2/2 '*'", "inf", 4, 30)]
    assert said(caplog, logging.WARNING) == expected


def test_a_phase_after_one_of_a_metric_of_validation_may_wait_for_one_of_training() -> None:
    until = [Plateau(name, patience=1, min_delta=9.0) for name in ("val_loss", "train_loss")]
    schedule = FreezeSchedule([Phase("head", until=until[0]), Phase("neck", until=until[1]), Phase("*")])
    trainer(callbacks=[schedule], max_epochs=5).fit(Net(log_train="train_loss"), loader(), loader())
    assert schedule.history == [(0, 0, 0), (2, 12, 1), (4, 24, 2)]


def test_without_validation_a_metric_that_nobody_logs_is_missed_after_an_epoch() -> None:
    run = trainer(callbacks=[FreezeSchedule([Phase("head", until=Plateau("score")), Phase("*")])])
    with pytest.raises(MisconfigurationException, match=r"no metric of that name was logged\. Logged are: none\.$"):
        run.fit(Net(), loader())
    assert run.global_step == 6


def test_a_metric_of_several_dataloaders_is_suggested_by_its_longer_name() -> None:
    class Several(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    run = trainer(callbacks=[FreezeSchedule([Phase("head", until=Plateau("val_loss")), Phase("*")])])
    with pytest.raises(MisconfigurationException, match="Did you mean 'val_loss/dataloader_idx_0'"):
        run.fit(Several(log_train="train_loss"), loader(), [loader(), loader()])


# EarlyStopping


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3}, {"check_val_every_n_epoch": 2}])
def test_early_stopping_of_the_same_metric_counts_anew_in_each_phase(options: Any, first: bool) -> None:
    """With the patience of the plateau it ends the last phase only, which may begin worse than others end."""
    phases = [Phase("head", until=Plateau("score", patience=2)), Phase("*")]
    schedule, stopper = FreezeSchedule(phases), EarlyStopping("score", patience=2 + first)
    callbacks = [stopper, schedule] if first else [schedule, stopper]
    net = Scores(1.0, 1.0, 1.0, 5.0, 4.0, 6.0, 6.0, 6.0)
    trainer(callbacks=callbacks, max_epochs=30, **options).fit(net, loader(), loader())
    assert len(schedule.history) == 2
    assert stopper.best_score == 4.0
    assert len(net.at_look) == 7 + first


def test_early_stopping_of_a_metric_of_training_makes_way_too() -> None:
    class Trains(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            score = [1.0, 1.0, 1.0, 5.0, 4.0, 6.0, 6.0, 6.0][self.current_epoch]
            self.log("score", score, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    schedule = FreezeSchedule([Phase("head", until=Plateau("score", patience=2)), Phase("*")])
    run = trainer(callbacks=[schedule, EarlyStopping("score", patience=2)], max_epochs=8)
    run.fit(Trains(), loader(), loader())
    assert schedule.history == [(0, 0, 0), (3, 18, 1)]
    assert run.current_epoch == 7


# Hooks


class Told(Callback):
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        trains = sum(parameter.requires_grad for parameter in pl_module.parameters())
        self.calls.append(f"{phase.label} begins at {trainer.global_step} with {trains}")

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        trains = sum(parameter.requires_grad for parameter in pl_module.parameters())
        self.calls.append(f"{phase.label} ends at {trainer.global_step} with {trains}")


class Tells(Net):
    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        assert pl_module is self
        self.calls.append(f"module: {phase.label} begins")

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        self.calls.append(f"module: {phase.label} ends")


HEAD = ["head begins at 0 with 2", "module: head begins", "head ends at 6 with 2", "module: head ends"]
NECK = ["neck begins at 6 with 2", "module: neck begins", "neck ends at 10 with 2", "module: neck ends"]
ALL = ["* begins at 10 with 12", "module: * begins", "* ends at {} with 12", "module: * ends"]


@pytest.mark.parametrize("last", [Phase("*"), Phase("*", steps=3)])
def test_hooks_are_called_around_each_phase_in_callbacks_and_module(last: Phase) -> None:
    calls: list[str] = []
    phases = [Phase("head", epochs=1), Phase("neck", steps=4), last]
    run = trainer(callbacks=[Told(calls), FreezeSchedule(phases)], max_epochs=3)
    run.fit(Tells(calls), loader(), loader())
    assert calls == [*HEAD, *NECK, *(line.format(run.global_step) for line in ALL)]


def test_hooks_after_a_resume_are_those_that_were_still_to_come(tmp_path: Path) -> None:
    phases = [Phase("head", epochs=1), Phase("neck", steps=4), Phase("*")]
    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    calls: list[str] = []
    callbacks = [FreezeSchedule(phases), Told(calls), every]
    trainer(tmp_path, callbacks=callbacks, max_epochs=3, enable_checkpointing=True).fit(
        Tells(calls), loader(stateful=True)
    )
    whole = list(calls)
    for step in (1, 5, 7, 9, 11, 13):
        calls.clear()
        again = trainer(callbacks=[FreezeSchedule(phases), Told(calls)], max_epochs=3)
        again.fit(Tells(calls), loader(stateful=True), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        begun = 2 if step < 6 else 6 if step < 10 else 10
        assert calls == whole[begun:]


def test_a_fit_that_ends_in_mid_schedule_ends_no_phase_and_goes_on_without_beginning_it_again() -> None:
    calls: list[str] = []
    run = trainer(callbacks=[FreezeSchedule([Phase("head", epochs=2), Phase("*")]), Told(calls)], max_epochs=1)
    run.fit(net := Net(), loader())
    assert calls == ["head begins at 0 with 2"]
    run.fit_loop.max_epochs = 3
    run.fit(net, loader())
    assert calls[1:] == ["head ends at 12 with 2", "* begins at 12 with 12", "* ends at 18 with 12"]


class FindRate(LearningRateFinder):
    """As docs/how-it-works.md has it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.found: list[tuple[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        before = snapshot(pl_module)
        self.lr_find(trainer, pl_module)
        assert same(snapshot(pl_module), before)
        self.found.append((phase.label, pl_module.lr))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [False, True])
def test_a_learning_rate_finder_at_the_start_of_each_phase(tmp_path: Path, first: bool) -> None:
    schedule, steps = FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"neck": 0.5})]), []
    finder = FindRate(num_training_steps=20, min_lr=1e-4, early_stop_threshold=None)
    probe = Probe(lambda run, _: steps.append((run.global_step, schedule.phase_index, run.optimizers[0])))
    net = Net(sgd)
    net.lr = 1e-3
    callbacks = [finder, schedule, probe] if first else [schedule, finder, probe]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=3)
    run.fit(net, loader(), loader())
    assert [label for label, _ in finder.found] == ["head", "*"]
    assert [step[:2] for step in steps] == [(step, int(step >= 6)) for step in range(18)]
    assert finder.found[1][1] == net.lr != 1e-3
    if not LOADS_ALL:  # Lightning 2.5 puts back the rate of the optimizer
        assert run.optimizers[0].param_groups[0]["lr"] == net.lr
    assert schedule.history == [(0, 0, 0), (1, 6, 1)]


def test_larger_batches_from_a_phase_on() -> None:
    class Larger(Callback):
        def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
            if phase.train == "*":
                trainer.train_dataloader.batch_sampler.batch_size *= 2

    sizes = []

    class Sizes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    trainer(callbacks=[schedule, Larger()], max_epochs=3).fit(Sizes(), loader(), loader())
    assert sizes == [4] * 6 + [8] * 6


# What is said, and tried


def test_history_says_why_and_the_log_and_the_checkpoint_too(tmp_path: Path, caplog: Lines) -> None:
    phases = [Phase("head", epochs=1), Phase("neck", steps=4), Phase("*", until=Plateau("score", patience=1))]
    schedule, net = FreezeSchedule([*phases, Phase("head")]), Scores(1.0)
    run = trainer(callbacks=[schedule], max_epochs=5)
    run.fit(net, loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    expected = ["", "1 epoch", "4 steps", "score had no better value than 1 for 1 look"]
    assert whys(schedule) == expected
    assert schedule.history == [(0, 0, 0), (1, 6, 1), (1, 10, 2), (3, 18, 3)]
    lines = [line for line in said(caplog) if line.startswith("phase ")]
    assert [f", after {why}: trains" in line for why, line in zip(expected[1:], lines[1:], strict=True)] == [True] * 3
    again = FreezeSchedule([*phases, Phase("head")])
    more = trainer(callbacks=[again], max_epochs=6)
    more.fit(net, loader(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert whys(again) == expected


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5])
def test_fast_dev_run_tries_a_phase_with_each_batch(batches: int, caplog: Lines) -> None:
    phases = [
        Phase("head", epochs=3),
        Phase("neck", until=Plateau("val_los")),
        Phase("backbone", fraction=0.5),
        Phase("*", epochs=1),
    ]
    schedule, tried = FreezeSchedule(phases, verbose=False), []
    probe = Probe(lambda *_: tried.append(schedule.phase_index))
    trainer(callbacks=[schedule, probe], fast_dev_run=batches).fit(Net(), loader(), loader())
    assert tried == [min(batch, 3) for batch in range(batches)]
    left = ["'neck', 'backbone', '*'", "'backbone', '*'", "'*'"]
    lines = [line for line in said(caplog) if line.startswith("fast_dev_run")]
    if batches < 4:
        assert lines == [f"fast_dev_run has not tried: {left[batches - 1]}. fast_dev_run=4 tries every phase."]
    else:
        assert lines == []
    (warning,) = said(caplog, logging.WARNING)
    assert "Did you mean 'val_loss'?" in warning


def test_fast_dev_run_tries_phases_between_accumulation_windows() -> None:
    schedule, tried = FreezeSchedule([Phase("head", epochs=1), Phase("*", epochs=1)]), []
    probe = Probe(lambda *_: tried.append(schedule.phase_index))
    run = trainer(callbacks=[schedule, probe], fast_dev_run=6, accumulate_grad_batches=2)
    run.fit(Net(), loader(), loader())
    assert tried == [0, 0, 1, 1, 1, 1]
