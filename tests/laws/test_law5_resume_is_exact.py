"""Law 5: stop anywhere and resume: every parameter, buffer, optimizer state, rate and counter as if never stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Plateau
from tests.nets import Net, Probe, adamw, loader, same, sgd, trainer

STEPS = 6


class SeededNet(Net):
    """Draws its dropout from the step's number: Lightning does not save the state of random generators."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.default_generator.manual_seed(self.trainer.fit_loop.total_batch_idx)
        return super().training_step(batch, batch_idx)


def head_only(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(params)[-2:], lr=1e-2)


SCHEDULES: dict[str, Any] = {
    "epochs": lambda: [Phase("head", epochs=1), Phase("*", epochs=1, lr_scale={"backbone": 0.1}), Phase("neck")],
    "steps": lambda: [Phase("*", steps=4), Phase("head", steps=5), Phase("*", steps=6, lr_scale=0.3), Phase("head")],
    "plateau": lambda: [
        Phase("head", until=Plateau("val_loss", patience=1, min_delta=10.0)),
        Phase("*", until=Plateau("train_loss", patience=1, min_delta=10.0)),
        Phase("neck"),
    ],
    "plateau of validation": lambda: [
        Phase("head", until=Plateau("val_loss", patience=1, min_delta=10.0)),
        Phase("*", until=Plateau("val_loss", patience=1)),
    ],
}
# Not here: ReduceLROnPlateau, which Lightning never steps in the epoch in which a run resumes, with us or without.
SETUPS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": adamw},
    "sgd, cosine per step": {
        "optimizer": sgd,
        "scheduler": lambda o: lrs.CosineAnnealingLR(o, 30, eta_min=1e-3),
        "interval": "step",
    },
    "adamw, one cycle": {
        "optimizer": adamw,
        "scheduler": lambda o: lrs.OneCycleLR(o, 1e-1, total_steps=40),
        "interval": "step",
    },
    "adopted, sequential": {
        "optimizer": head_only,
        "scheduler": lambda o: lrs.SequentialLR(
            o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.ExponentialLR(o, 0.9)], milestones=[4]
        ),
        "interval": "step",
    },
}


def sampled(schedules: Iterable[str], **options: Any) -> list[Any]:
    """Return pairs of a schedule and a setup, each of either in one; the others with ``options``, if there are any."""
    pairs = [(one, other, (i - j) % 3 == 0) for i, one in enumerate(schedules) for j, other in enumerate(SETUPS)]
    return [pytest.param(one, other, **({} if is_in else options)) for one, other, is_in in pairs if is_in or options]


def fit(
    tmp_path: Path,
    schedule: FreezeSchedule | None,
    setup: dict[str, Any],
    *,
    checkpoint: Callback | None = None,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train, and give all that must be equal."""
    torch.manual_seed(0)
    net = setup["net"]() if "net" in setup else SeededNet(**setup, log_train="train_loss")
    if options.get("precision") == "64-true":
        net.double()  # Lightning restores weights before it converts them, and so would round them
    rates: list[Any] = []

    def start(trainer: Trainer, _: LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates.append([dict(group, params=len(group["params"])) for group in groups])

    callbacks = [callback for callback in (schedule, Probe(start), checkpoint) if callback is not None]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=checkpoint is not None, **options)
    run.fit(net, loader(stateful=True), loader(), ckpt_path=resume, weights_only=True)
    return {
        "weights": net.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in run.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "callback": schedule.state_dict() if schedule else None,
        "rates": rates,
        "progress": (run.current_epoch, run.global_step),
    }


def _step(stop: Path) -> int:
    return int(stop.stem.split("step=")[1])


def check_every_stop(
    tmp_path: Path, schedule: Any, setup: dict[str, Any], every: dict[str, Any], **options: Any
) -> int:
    saver = ModelCheckpoint(tmp_path / "all", filename="{epoch}-{step}", save_top_k=-1, **every)
    whole = fit(tmp_path, schedule(), setup, checkpoint=saver, **options)
    stops = sorted((tmp_path / "all").iterdir())
    if not saver._save_on_train_epoch_end:
        # Lightning, with or without us, skips an epoch if it resumes from the end of an epoch's last batch.
        epochs = [stop.stem.split("-")[0] for stop in stops]
        ends = {max((s for s in stops if s.stem.startswith(f"{epoch}-")), key=_step) for epoch in epochs}
        stops = [stop for stop in stops if stop not in ends]
    for stop in stops:
        resumed = fit(tmp_path, schedule(), setup, resume=stop, **options)
        left = len(resumed["rates"])
        assert same(resumed["rates"], whole["rates"][len(whole["rates"]) - left :]), stop.name
        for key in ("weights", "optimizer", "schedulers", "callback", "progress"):
            assert same(resumed[key], whole[key]), (stop.name, key)
    return len(stops)


@pytest.mark.parametrize(("phases", "setup"), sampled(SCHEDULES))
def test_after_every_epoch(tmp_path: Path, phases: str, setup: str) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES[phases](), verbose=False)

    every = {"save_on_train_epoch_end": True}
    assert check_every_stop(tmp_path, schedule, SETUPS[setup], every, max_epochs=4) == 4


# The mean of a training metric over an epoch is not here: Lightning forgets on resume what it had summed up.
@pytest.mark.parametrize(("phases", "setup"), sampled(["epochs", "steps", "plateau of validation"]))
def test_in_mid_epoch(tmp_path: Path, phases: str, setup: str) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES[phases](), verbose=False)

    every = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    assert check_every_stop(tmp_path, schedule, SETUPS[setup], every, max_epochs=3) >= 15


@pytest.mark.parametrize("policy", ["drop", "offload"])
def test_with_state_that_is_not_kept(tmp_path: Path, policy: Any) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES["steps"](), optimizer_state=policy, verbose=False)

    every = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    assert check_every_stop(tmp_path, schedule, SETUPS["adamw"], every, max_epochs=3) >= 15


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_in_other_precisions(tmp_path: Path, precision: Any) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES["steps"](), verbose=False)

    every = {"every_n_train_steps": 2, "save_on_train_epoch_end": False}
    setup = SETUPS["adopted, sequential"]
    assert check_every_stop(tmp_path, schedule, setup, every, max_epochs=3, precision=precision) >= 6


class LogsLate(SeededNet):
    """Logs in a hook that comes after all callbacks have seen the epoch's end, but before it is saved."""

    def on_train_epoch_end(self) -> None:
        self.log("late", 1.0)


def test_with_a_metric_logged_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    def schedule() -> FreezeSchedule:
        phases = [Phase("head", until=Plateau("late", patience=1)), Phase("*", until=Plateau("late", patience=1))]
        return FreezeSchedule([*phases, Phase("neck")], verbose=False)

    every = {"save_on_train_epoch_end": True}
    assert check_every_stop(tmp_path, schedule, {"net": LogsLate}, every, max_epochs=5) == 5


class Duel(SeededNet):
    """Two optimizers in manual optimization, each with a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [adamw(self.backbone.parameters()), sgd([*self.neck.parameters(), *self.head.parameters()])]
        return optimizers, [lrs.LambdaLR(optimizer, lambda step: 0.95**step) for optimizer in optimizers]


# Lightning's, of a checkpoint after the step, which is the one meant
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
def test_with_two_optimizers(tmp_path: Path) -> None:
    def schedule() -> FreezeSchedule:
        phases = [Phase("head", steps=8), Phase("*", steps=10, lr_scale={"backbone": 0.1, "neck": 2.0}), Phase("neck")]
        return FreezeSchedule(phases, verbose=False)

    every = {"every_n_train_steps": 4, "save_on_train_epoch_end": False}
    assert check_every_stop(tmp_path, schedule, {"net": Duel}, every, max_epochs=3) >= 6


@pytest.mark.parametrize("phases", ["steps", "plateau of validation"])
def test_where_validation_saves_in_mid_epoch(tmp_path: Path, phases: str) -> None:
    """Validation sees the metric, the checkpoint is written, and only then the phase ends."""

    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES[phases](), verbose=False)

    every = {"monitor": "val_loss", "save_on_train_epoch_end": False}
    options = {"max_epochs": 3, "val_check_interval": 2}
    assert check_every_stop(tmp_path, schedule, SETUPS["sgd, cosine per step"], every, **options) >= 6


# Lightning's: with this callback it looks for a checkpoint to go on from
@pytest.mark.filterwarnings("ignore:.*.fit.ckpt_path=:UserWarning")
def test_after_an_exception(tmp_path: Path) -> None:
    """What a checkpoint holds that is written because of the exception: by then everything has been given back."""

    class Breaking(SeededNet):
        broken = True

        # Elsewhere than after a batch, Lightning skips the batch or the epoch on resume, with us or without.
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.broken and self.current_epoch == 2 and batch_idx == 2:
                raise RuntimeError("power cut")

    def run(broken: bool, path: Path | None) -> dict[str, Any]:
        torch.manual_seed(0)
        net = Breaking(**SETUPS["adopted, sequential"])
        net.broken = broken
        phases = [Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.1}, epochs=2), Phase("neck")]
        schedule = FreezeSchedule(phases, verbose=False)
        callbacks = [schedule, *([OnExceptionCheckpoint(tmp_path, "last")] if broken else [])]
        fitting = trainer(tmp_path, callbacks=callbacks, max_epochs=4, enable_checkpointing=broken)
        with pytest.raises(RuntimeError, match="power cut") if broken else contextlib.nullcontext():
            fitting.fit(net, loader(stateful=True), loader(), ckpt_path=path, weights_only=True)
        return {"weights": net.state_dict(), "history": schedule.history}

    run(True, None)
    assert same(run(False, tmp_path / "last.ckpt"), run(False, None))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("phases", ["epochs", "steps", "plateau of validation"])
def test_sweep_in_mid_epoch(tmp_path: Path, phases: str, setup: str, policy: Any, accumulate: int) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES[phases](), optimizer_state=policy, verbose=False)

    every = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    options = {"max_epochs": 4, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    assert check_every_stop(tmp_path, schedule, SETUPS[setup], every, **options) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("mode", ["batchnorm", "eval", "train"])
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("phases", SCHEDULES)
def test_sweep(tmp_path: Path, phases: str, setup: str, mode: Any, accumulate: int) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES[phases](), frozen_mode=mode, verbose=False)

    every = {"save_on_train_epoch_end": True}
    options = {"max_epochs": 4, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    assert check_every_stop(tmp_path, schedule, SETUPS[setup], every, **options) == 4


def test_batchnorm_beside_it(tmp_path: Path) -> None:
    """FreezeBatchNorm has nothing to save; a resumed run has it frozen again."""

    def run(resume: Path | None, epochs: int) -> tuple[Any, Path]:
        torch.manual_seed(0)
        net = SeededNet()
        callbacks = [FreezeBatchNorm(), FreezeSchedule(SCHEDULES["steps"](), verbose=False)]
        fitting = trainer(tmp_path, callbacks=callbacks, max_epochs=epochs)
        fitting.fit(net, loader(), loader(), ckpt_path=resume, weights_only=True)
        fitting.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return net.state_dict(), tmp_path / f"{epochs}.ckpt"

    whole, _ = run(None, 4)
    _, half = run(None, 2)
    assert same(run(half, 4)[0], whole)


def test_the_same_trainer_goes_on(tmp_path: Path) -> None:
    """Raising max_epochs and fitting again continues the schedule; a new Trainer begins it anew."""
    schedule = FreezeSchedule([Phase("head", epochs=2), Phase("*", epochs=2), Phase("neck")])
    net, run = Net(), trainer(callbacks=[schedule], max_epochs=3)
    run.fit(net, loader(), loader())
    run.fit_loop.max_epochs = 5
    run.fit(net, loader(), loader())
    assert schedule.history == [(0, 0, 0), (2, 2 * STEPS, 1), (4, 4 * STEPS, 2)]
    trainer(callbacks=[schedule], max_epochs=1).fit(net, loader(), loader())
    assert schedule.history == [(0, 0, 0)]
