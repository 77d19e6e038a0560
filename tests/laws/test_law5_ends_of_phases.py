"""Law 5 for what ends phases: stopped anywhere, in mid-phase too, a fit goes on and ends as if never stopped."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_freeze import FreezeSchedule, Phase, Plateau
from tests.laws.test_law5_resume_is_exact import SeededNet, check_every_stop, fit
from tests.nets import adamw, loader, same, sgd, trainer


class Asks(SeededNet):
    """Asks for the next phase in its hooks, at some steps."""

    def _ask(self, *steps: int) -> None:
        (schedule,) = [one for one in self.trainer.callbacks if isinstance(one, FreezeSchedule)]
        if self.trainer.global_step in steps:
            schedule.next_phase()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._ask(3)
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, *_: Any) -> None:
        self._ask(9)

    def on_validation_epoch_end(self) -> None:
        self._ask(14)


class Looks(SeededNet):
    """Its metric is at its best in the third look, and then worse; a module of it learns in a buffer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log("score", abs(float(self.trainer.global_step) - 6) + 1)


def grown(trainer: Trainer, pl_module: LightningModule) -> bool:
    return trainer.global_step % 7 == 5


BEST = {"patience": 2, "restore_best": True}
SCHEDULES: dict[str, Any] = {
    "restore_best": lambda: [
        Phase(["head", "neck"], until=Plateau("score", **BEST)),
        Phase("*", until=Plateau("score", **BEST)),
    ],
    "min_epochs, threshold": lambda: [
        Phase("head", until=Plateau("score", threshold=3.5, min_epochs=1)),
        Phase("*", until=Plateau("score", patience=1, min_epochs=2)),
    ],
    "function": lambda: [Phase("head", until=grown), Phase("*", until=grown), Phase("neck", until=grown)],
    "fraction": lambda: [Phase("head", fraction=0.2), Phase("*", fraction=0.33), Phase("neck", fraction=0.3)],
    "next_phase": lambda: [Phase("head", epochs=9), Phase("*", epochs=9), Phase("neck", epochs=9)],
}
NETS: dict[str, Any] = {"restore_best": Looks, "min_epochs, threshold": Looks, "next_phase": Asks}
STEP = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
# Not after a batch at which validation is due: Lightning then resumes without it, with us or without.
LOOK = {"monitor": "score", "save_on_train_epoch_end": False}
# What saves, with which options, and at which step the fit ends.
CASES: dict[str, Any] = {
    "restore_best": [(LOOK, {"val_check_interval": 2}, 16), (STEP, {"max_epochs": 7}, 36)],
    "min_epochs, threshold": [(LOOK, {"val_check_interval": 2}, 18), (STEP, {"max_epochs": 5}, 18)],
    "function": [(STEP, {}, 19), (STEP, {"accumulate_grad_batches": 2}, 12)],
    "fraction": [(STEP, {}, 20), (STEP, {"accumulate_grad_batches": 2}, 10)],
    "next_phase": [(STEP, {"val_check_interval": 2}, 14), (STEP, {"accumulate_grad_batches": 2}, 12)],
}


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_in_mid_epoch(tmp_path: Path, name: str, case: int) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES[name](), verbose=False)

    setup = {"net": NETS.get(name, SeededNet)}
    every, options, end = CASES[name][case]
    options = {"max_epochs": 4, **options}
    assert check_every_stop(tmp_path, schedule, setup, every, **options) >= 4
    assert fit(tmp_path, schedule(), setup, **options)["progress"][1] == end


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_every_epoch(tmp_path: Path, name: str) -> None:
    def schedule() -> FreezeSchedule:
        return FreezeSchedule(SCHEDULES[name](), verbose=False)

    setup = {"net": NETS.get(name, SeededNet)}
    every = {"save_on_train_epoch_end": True}
    assert check_every_stop(tmp_path, schedule, setup, every, max_epochs=5, val_check_interval=3) >= 2


@pytest.mark.parametrize(("monitor", "limit"), [("late", {"max_epochs": 8}), ("early", {"max_steps": 48})])
def test_a_metric_of_training_whose_best_weights_come_back(tmp_path: Path, monitor: str, limit: dict[str, int]) -> None:
    """With ``max_steps`` Lightning ends an epoch once more, without a batch, when it resumes from its end."""
    values = [3.0, 2.0, 4.0, 5.0, 1.0, 3.0, 3.0, 3.0]

    class Trains(SeededNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("early", values[self.current_epoch], on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.log("late", values[self.current_epoch])

    def schedule() -> FreezeSchedule:
        until = Plateau(monitor, patience=2, restore_best=True)
        return FreezeSchedule([Phase("*", until=until), Phase(["head", "neck"], until=until)], verbose=False)

    every = {"save_on_train_epoch_end": True}
    assert check_every_stop(tmp_path, schedule, {"net": Trains}, every, **{"max_epochs": -1, **limit}) == 7


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_epoch_end"])
def test_a_metric_that_is_logged_every_second_epoch(tmp_path: Path, hook: str) -> None:
    """An epoch that does not log it is no look, and no reason to miss it in a process that has not seen it."""

    def log(self: LightningModule) -> None:
        if self.current_epoch % 2 == 0:
            self.log("score", 5.0 + self.current_epoch)

    net = type("Scores", (SeededNet,), {hook: log})

    def schedule() -> FreezeSchedule:
        until = Plateau("score", patience=1)
        phases = [Phase("head", until=until), Phase("*", epochs=1), Phase("neck", until=until)]
        return FreezeSchedule(phases, verbose=False)

    every = {"save_on_train_epoch_end": True}
    assert check_every_stop(tmp_path, schedule, {"net": net}, every, max_epochs=9) == 7


@pytest.mark.parametrize(
    ("hook", "breaks"), [("on_phase_start", False), ("on_phase_end", False), ("on_phase_end", True)]
)
@pytest.mark.parametrize("steps", [-1, 28])
def test_saved_by_a_hook_where_a_phase_begins_with_an_epoch(
    tmp_path: Path, hook: str, breaks: bool, steps: int
) -> None:
    """Lightning by itself goes on with the epoch after the one that begins."""
    limit = {"max_epochs": -1, "max_steps": steps} if steps > 0 else {"max_epochs": 5}

    class Saves(Callback):
        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "3.ckpt")

    def save(self: Any, trainer: Trainer, *_: Any) -> None:
        if breaks and trainer.current_epoch == 3:
            raise RuntimeError("out of memory")
        trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def schedule() -> FreezeSchedule:
        until = Plateau("score", patience=1, restore_best=True)
        return FreezeSchedule([Phase("head", epochs=1), Phase("*", until=until), Phase("neck")], verbose=False)

    whole = fit(tmp_path, schedule(), {"net": Looks}, **limit)
    assert [begin[0] for begin in whole["callback"]["history"]] == [0, 1, 3]
    setattr(Saves, hook, save)
    with pytest.raises(RuntimeError) if breaks else contextlib.nullcontext():
        fit(tmp_path, schedule(), {"net": Looks}, checkpoint=Saves(), **limit)
    for epoch in (1, 3):
        resumed = fit(tmp_path, schedule(), {"net": Looks}, resume=tmp_path / f"{epoch}.ckpt", **limit)
        del resumed["rates"]
        assert [name for name in resumed if not same(resumed[name], whole[name])] == []


def test_early_stopping_counts_anew_after_a_resume_too(tmp_path: Path) -> None:
    class Scores(SeededNet):
        def on_validation_epoch_end(self) -> None:
            self.log("score", [1.0, 1.0, 3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 2.5][self.current_epoch])

    def run(resume: Path | None, *more: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        net, schedule = Scores(), FreezeSchedule([Phase("head", epochs=2), Phase("*")], verbose=False)
        stopper = EarlyStopping("score", patience=2)
        options = {"max_epochs": 9, "enable_checkpointing": bool(more)}
        fitting = trainer(tmp_path, callbacks=[stopper, schedule, *more], **options)
        fitting.fit(net, loader(stateful=True), loader(), ckpt_path=resume, weights_only=True)
        return {"weights": net.state_dict(), "epochs": fitting.current_epoch, "stopper": stopper.state_dict()}

    whole = run(None, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
    assert whole["epochs"] == 6  # the best of phase 2 is in epoch 3
    for epoch in range(5):
        assert same(run(tmp_path / f"epoch={epoch}.ckpt"), whole)


@pytest.mark.parametrize("manual", [False, True])
def test_what_was_asked_in_an_accumulation_window_is_in_the_checkpoint(tmp_path: Path, manual: bool) -> None:
    class Windows(SeededNet):
        def __init__(self) -> None:
            super().__init__(sgd if manual else adamw)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (schedule,) = [one for one in self.trainer.callbacks if isinstance(one, FreezeSchedule)]
            if self.trainer.fit_loop.total_batch_idx in (4, 7):
                schedule.next_phase()
            loss = super().training_step(batch, batch_idx)
            if not manual:
                return loss
            self.manual_backward(loss)
            if batch_idx % 3 == 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None

    begins = []

    def run(resume: Path | None, *more: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        net = Windows()
        schedule = FreezeSchedule([Phase("*", epochs=5), Phase("head", epochs=5), Phase("neck")], verbose=False)
        options = {} if manual else {"accumulate_grad_batches": 3}
        callbacks = [schedule, *more]
        fitting = trainer(tmp_path, callbacks=callbacks, max_epochs=3, enable_checkpointing=bool(more), **options)
        fitting.fit(net, loader(stateful=True), ckpt_path=resume, weights_only=True)
        begins.append(schedule.history)
        optimizer = fitting.optimizers[0].state_dict()
        return {"weights": net.state_dict(), "state": schedule.state_dict(), "optimizer": optimizer}

    class Saves(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.total_batch_idx}.ckpt")

    whole = run(None, Saves(tmp_path, save_top_k=0))
    assert begins == [[(0, 0, 0), (1, 2, 1), (1, 3, 2)]]
    # In an open window gradients are lost, with us or without; its progress is compared all the same.
    for batch in (1, 2, 4, 7, 8):
        again = run(tmp_path / f"{batch}.ckpt")
        assert again["state"] == whole["state"]
        if batch % 3 == 2:
            assert same(again, whole)
