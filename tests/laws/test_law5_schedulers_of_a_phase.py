"""Laws 3, 4, 5 and 7 of rates that a phase says: ramps, and schedulers of its own beside the user's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeSchedule, Phase, Plateau, Ramp
from lightning_freeze.schedule.schedulers import is_scheduled
from tests.laws.test_law3_schedulers import SCHEDULERS
from tests.laws.test_law5_resume_is_exact import SETUPS, Duel, SeededNet, check_every_stop, sampled
from tests.nets import Net, Probe, adamw, loader, same, sgd, trainer
from tests.phased import rates_in_steps

STEPS = 6


def one_cycle(optimizer: Any, steps: int) -> Any:
    return lrs.OneCycleLR(optimizer, 0.1, total_steps=steps)


def each_epoch(optimizer: Any, steps: int) -> Any:
    return {"scheduler": lrs.ExponentialLR(optimizer, 0.5), "interval": "epoch"}


def warm_up(optimizer: Any, steps: int) -> Any:
    first, then = lrs.LinearLR(optimizer, 0.1, total_iters=2), lrs.CosineAnnealingLR(optimizer, steps - 2)
    return lrs.SequentialLR(optimizer, [first, then], milestones=[2])


RESUMED: dict[str, Any] = {
    "ramps": lambda: [
        Phase("head", steps=4, lr_scale=Ramp(0.0)),
        Phase("*", steps=7, lr_scale={"backbone": Ramp(0.01, shape="exponential"), "neck": Ramp(0.0, 2.0, steps=3)}),
        Phase("*", lr_scale={"backbone": Ramp(0.1, epochs=1.5, shape="cosine")}),
    ],
    "schedulers": lambda: [
        Phase("head", steps=4, lr_scheduler=one_cycle),
        Phase("*", steps=4, lr_scale={"backbone": Ramp(0.1)}),
        Phase("*", epochs=1, lr_scheduler=each_epoch),
        Phase("*", lr_scheduler=warm_up),
    ],
    "restart": lambda: [Phase("head", steps=8), Phase("*", steps=5, lr_scheduler="restart"), Phase("neck")],
}


@pytest.mark.parametrize(("phases", "setup"), sampled(RESUMED, marks=pytest.mark.slow))
def test_resume_in_mid_phase(tmp_path: Path, phases: str, setup: str) -> None:
    if phases == "restart" and "scheduler" not in SETUPS[setup]:
        pytest.skip("no scheduler that could begin anew")

    def schedule() -> FreezeSchedule:
        return FreezeSchedule(RESUMED[phases](), verbose=False)

    every = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    assert check_every_stop(tmp_path, schedule, SETUPS[setup], every, max_epochs=3) >= 15


def test_what_is_saved_before_the_schedule_has_taken_over_resumes_too(tmp_path: Path) -> None:
    """A callback that comes before it saves in ``on_train_start`` of a resumed fit."""

    class Saves(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    def run(*callbacks: Callback, path: str | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        net = SeededNet(lambda _: adamw(net.head.parameters()))
        phases = [
            Phase("head", epochs=1),
            Phase("*", epochs=2, lr_scheduler=one_cycle, lr_scale={"backbone": Ramp(0.1)}),
            Phase("neck"),
        ]
        schedule = FreezeSchedule(phases, verbose=False)
        fit = trainer(tmp_path, callbacks=[*callbacks, schedule], max_epochs=4, enable_checkpointing=path is None)
        fit.fit(net, loader(), ckpt_path=tmp_path / path if path else None)
        return net.state_dict()

    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = run(every)
    run(Saves(), path="epoch=1.ckpt")
    assert same(run(path="again.ckpt"), whole)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
@pytest.mark.parametrize("own", [one_cycle, "restart"])
def test_resume_with_two_optimizers(tmp_path: Path, own: Any) -> None:
    """In manual optimization, where `self.lr_schedulers()` returns the phase's."""

    def schedule() -> FreezeSchedule:
        phases = [Phase("head", steps=8), Phase("*", steps=14, lr_scheduler=own, lr_scale=Ramp(0.1))]
        return FreezeSchedule([*phases, Phase("*")], verbose=False)

    every = {"every_n_train_steps": 2, "save_on_train_epoch_end": False}
    assert check_every_stop(tmp_path, schedule, {"net": Duel}, every, max_epochs=3) >= 12


def seen(net: Net, phases: list[Phase] | None, **options: Any) -> tuple[list[float], Trainer]:
    """Return the head's rate in each step, and the Trainer."""
    callbacks = [FreezeSchedule(phases)] if phases else []
    run = trainer(**{"callbacks": callbacks, "max_epochs": 4, **options})
    with rates_in_steps(net) as rates:
        run.fit(net, loader(), loader())
    return [row["head.weight"] for row in rates], run


def alone(make: Any, steps: int) -> list[float]:
    """Return the rates of a scheduler on an optimizer that has just been made."""
    optimizer = sgd([torch.zeros(1, requires_grad=True)])
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(1.0) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_drives_its_phase_and_the_users_rests(name: str) -> None:
    """The user's goes on where it was; rates, options, traces and the Trainer's list are its own after the fit."""

    def make(optimizer: Any, steps: int) -> Any:
        assert steps == 7
        return {"scheduler": SCHEDULERS[name](optimizer), "interval": "step", "monitor": "freeze/phase"}

    def users(optimizer: Any) -> Any:
        made.append(lrs.ExponentialLR(optimizer, 0.99))
        return made[-1]

    made: list[Any] = []
    phases = [Phase("head", steps=5), Phase("*", steps=7, lr_scheduler=make), Phase("*")]
    rates, run = seen(Net(sgd, users, interval="step"), phases)
    plain = [0.01]
    for _ in range(4 * STEPS - 7):
        plain.append(plain[-1] * 0.99)
    assert rates == [*plain[:5], *alone(SCHEDULERS[name], 7), *plain[5:-1]]
    (config,) = run.lr_scheduler_configs
    assert config.scheduler is made[0]
    (group,) = run.optimizers[0].param_groups
    other = sgd([torch.zeros(1)])
    lrs.ExponentialLR(other, 0.99)
    assert {**group, "params": 0} == {**other.param_groups[0], "params": 0, "lr": plain[-1]}


@pytest.mark.parametrize(
    ("own", "as_a_function"),
    [
        (lrs.CosineAnnealingLR, lambda optimizer: lrs.CosineAnnealingLR(optimizer, 7)),
        (lrs.LinearLR, lambda optimizer: lrs.LinearLR(optimizer, total_iters=7)),
        (partial(lrs.OneCycleLR, max_lr=0.1), lambda optimizer: lrs.OneCycleLR(optimizer, 0.1, 7)),
        (partial(lrs.OneCycleLR, max_lr=0.1, total_steps=9), lambda optimizer: lrs.OneCycleLR(optimizer, 0.1, 9)),
        (partial(lrs.ExponentialLR, gamma=0.5), lambda optimizer: lrs.ExponentialLR(optimizer, 0.5)),
    ],
)
def test_a_class_is_told_the_steps_by_name(own: Any, as_a_function: Any) -> None:
    rates, _ = seen(Net(sgd), [Phase("*", steps=7, lr_scheduler=own), Phase("*")])
    assert rates[:7] == alone(as_a_function, 7)


def test_a_class_that_does_not_take_steps_is_not_given_them() -> None:
    """As a second argument they would be ExponentialLR's gamma: each rate as many times the one before."""
    with pytest.raises(MisconfigurationException, match=r"cannot be made: .* missing .* 'gamma'"):
        seen(Net(sgd), [Phase("*", lr_scheduler=lrs.ExponentialLR)])


def test_a_scheduler_leaves_nothing_behind() -> None:
    """Neither where there was none, nor after an error."""

    class Breaks(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 3:
                raise RuntimeError("stop")

    for net in (Net(sgd), Breaks(sgd)):
        run = trainer(callbacks=[FreezeSchedule([Phase("*", lr_scheduler=one_cycle)])], max_epochs=1)
        if isinstance(net, Breaks):
            with pytest.raises(RuntimeError, match="stop"):
                run.fit(net, loader(), loader())
        else:
            run.fit(net, loader(), loader())
        assert run.lr_scheduler_configs == []
        if run.optimizers:
            plain = sgd([torch.zeros(1)])
            (group,) = run.optimizers[0].param_groups
            assert {**group, "params": 0} == {**plain.param_groups[0], "params": 0}
            assert vars(run.optimizers[0]).keys() == vars(plain).keys()


@pytest.mark.parametrize("user", [None, "one cycle"])
def test_a_checkpoint_is_the_users_own(tmp_path: Path, user: Any) -> None:
    """Its schedulers and options are those that rest, and a script without the callback goes on from them."""
    make = (lambda o: lrs.OneCycleLR(o, 0.2, total_steps=40)) if user else None
    phases = [Phase("head", epochs=1), Phase("*", epochs=1, lr_scheduler=one_cycle), Phase("*")]
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    net = Net(sgd, make, interval="step")
    trainer(callbacks=[FreezeSchedule(phases), saver], enable_checkpointing=True, max_epochs=3).fit(
        net, loader(stateful=True)
    )
    then, now = (torch.load(tmp_path / f"step={step}.ckpt", weights_only=True) for step in (6, 9))
    assert now["lr_schedulers"] == then["lr_schedulers"]
    assert now["optimizer_states"][0]["param_groups"] == then["optimizer_states"][0]["param_groups"]
    run = trainer(max_epochs=3)
    net = Net(sgd, make, interval="step")
    run.fit(net, loader(stateful=True), ckpt_path=tmp_path / "step=9.ckpt", weights_only=True)
    if user:
        assert run.lr_scheduler_configs[0].scheduler.last_epoch == 6 + 9


def test_restart_begins_the_users_scheduler_anew() -> None:
    phases = [Phase("head", steps=8), Phase("*", lr_scheduler="restart", steps=9), Phase("*")]
    rates, run = seen(Net(sgd, SCHEDULERS["OneCycleLR"], interval="step"), phases)
    plain = alone(SCHEDULERS["OneCycleLR"], 16)
    assert rates == [*plain[:8], *plain]
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 16


def test_a_scheduler_begins_from_the_rate_that_the_optimizer_was_given() -> None:
    """Not from what a warm-up of the user's has made of it."""
    phases = [Phase("head", steps=3), Phase("*", lr_scheduler=lambda o, _: lrs.ExponentialLR(o, 0.5))]
    net = Net(sgd, lambda o: lrs.LinearLR(o, 0.01, total_iters=100), interval="step")
    assert seen(net, phases, max_epochs=1)[0][3:] == [0.01, 0.005, 0.0025]


def test_an_epoch_interval_and_a_metric() -> None:
    """As Lightning has them; a plateau scheduler's interval is the epoch."""

    def plateau(optimizer: Any, steps: int) -> Any:
        return {"scheduler": lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=9.0), **monitor}

    monitor = {"monitor": "val_loss"}
    phases = [Phase("*", epochs=2, lr_scheduler=each_epoch), Phase("*", lr_scheduler=plateau)]
    rates, _ = seen(Net(sgd), phases, max_epochs=5)
    assert rates == [rate for rate in (0.01, 0.005, 0.01, 0.005, 0.0025) for _ in range(STEPS)]


def test_learning_rate_monitor_shows_the_phases_rates(tmp_path: Path) -> None:
    phases = [Phase("head", steps=2), Phase("*", lr_scheduler=lambda o, _: lrs.ExponentialLR(o, 0.5))]
    monitor = LearningRateMonitor()
    callbacks = [FreezeSchedule(phases), monitor]
    run = trainer(callbacks=callbacks, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(Net(sgd, lambda o: lrs.ExponentialLR(o, 0.9), interval="step"), loader())
    assert monitor.lrs["lr-SGD"] == [0.01, 0.009000000000000001, 0.01, 0.005, 0.0025, 0.00125]


def test_a_plateau_may_end_the_phase_before_its_scheduler() -> None:
    until = Plateau("val_loss", patience=1, min_delta=10.0)
    phases = [Phase("head", until=until, epochs=3, lr_scheduler=one_cycle), Phase("*")]
    rates, _ = seen(Net(sgd, lambda o: lrs.ExponentialLR(o, 1.0)), phases, max_epochs=4)
    assert rates == [*alone(lambda o: one_cycle(o, 18), 12), *[0.01] * 12]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
def test_a_finder_in_the_middle_of_a_phase_leaves_its_scheduler_as_it_was(tmp_path: Path, first: bool) -> None:
    """It saves, exchanges the schedulers, trains and restores."""

    class Finds(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch in (1, 2):
                self.lr_find(trainer, pl_module)

    phases = [Phase("head", steps=4), Phase("*", steps=11, lr_scheduler=warm_up), Phase("*", lr_scheduler="restart")]
    runs = []
    for find in ([], [Finds(num_training_steps=4, update_attr=False)]):
        net = Net(sgd, SCHEDULERS["OneCycleLR"], interval="step")
        rates: list[Any] = []
        probe = Probe(lambda run, _, rates=rates: rates.append(run.optimizers[0].param_groups[0]["lr"]))
        schedule = FreezeSchedule(phases)
        callbacks = [schedule, *find, probe] if first else [*find, schedule, probe]
        run = trainer(tmp_path, callbacks=callbacks, max_epochs=4)
        run.fit(net, loader(), loader())
        (config,) = run.lr_scheduler_configs
        runs.append((rates, schedule.history, config.scheduler.state_dict()))
    assert runs[0] == runs[1]


def test_an_optimizer_that_is_exchanged_gets_a_scheduler_too() -> None:
    def exchange(run: Trainer, net: LightningModule) -> None:
        if run.global_step == 4:
            run.optimizers = [sgd(net.parameters())]

    phases = [Phase("*", steps=8, lr_scheduler=lambda o, _: lrs.ExponentialLR(o, 0.5)), Phase("*")]
    net, rates = Net(sgd), list[float]()
    probe = Probe(exchange, lambda run, _: rates.append(run.optimizers[0].param_groups[0]["lr"]))
    run = trainer(callbacks=[FreezeSchedule(phases), probe], max_epochs=2)
    run.fit(net, loader())
    assert rates == [0.01 * 0.5 ** min(step, 99) for step in (1, 2, 3, 4, 1, 2, 3, 4)] + [0.01] * 4
    assert run.lr_scheduler_configs == []


def test_a_tensor_rate_is_rewritten_in_place() -> None:
    """Captured graphs hold on to it, when a phase's scheduler begins and when it ends."""
    rates: list[tuple[int, float]] = []

    def note(run: Trainer, _: LightningModule) -> None:
        rate = run.optimizers[0].param_groups[0]["lr"]
        rates.append((id(rate), float(rate)))

    phases = [Phase("head", steps=2), Phase("*", steps=2, lr_scheduler=lambda o, _: lrs.ExponentialLR(o, 0.5))]
    net = Net(
        lambda params: torch.optim.AdamW(params, lr=torch.tensor(1.0)), lambda o: lrs.LinearLR(o, 0.5), interval="step"
    )
    trainer(callbacks=[FreezeSchedule([*phases, Phase("*")]), Probe(note)], max_epochs=1).fit(net, loader())
    assert len({place for place, _ in rates}) == 1
    assert [rate for _, rate in rates] == pytest.approx([0.5, 0.6, 1.0, 0.5, 0.7, 0.8])


def test_a_scheduler_sets_rates_and_momentums_and_no_running_sum_of_the_optimizer() -> None:
    options = ("lr", "initial_lr", "betas", "max_momentum", "weight_decay", "weight_sum", "params")
    assert [option for option in options if is_scheduled(option)] == list(options[:5])
