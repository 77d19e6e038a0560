"""Law 5 for runs that are killed: SIGKILL to both ranks in mid-epoch, resume, and every bit is as if nothing had been.

A run is killed, resumed, killed later, resumed, killed while it writes a checkpoint, and resumed to the end. Then it
and the run that nobody touched agree in their results on both ranks and in every checkpoint that they wrote.
"""

from __future__ import annotations

import os
import signal
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing import ProcessExitedException
from torch.optim import lr_scheduler as lrs
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_freeze import FreezeSchedule, Phase, Plateau
from tests.nets import Net, Probe, adamw, data, loader, same, sgd, trainer
from tests.replicas import WORLD, on_two_processes

EPOCHS, STEPS = 4, 6
EVERY = 2  # optimizer steps between two checkpoints

# Where each run is killed, as the step that has just been made; at the last one it is killed in writing its checkpoint.
# Lightning skips an epoch if it resumes from the end of an epoch's last batch, so no kill here leaves that to it.
RUNS: dict[str, dict[str, Any]] = {
    # Phases begin in mid-epoch, at steps 4, 9 and 15. The second kill leaves the checkpoint of the step before the
    # unfreeze, in which it is due and not yet done.
    "steps, adamw, one cycle": {
        "phases": [Phase("head", steps=4), Phase("*", steps=5, lr_scale=0.3), Phase("neck", steps=6), Phase("*")],
        "optimizer": adamw,
        "scheduler": partial(lrs.OneCycleLR, max_lr=1e-1, total_steps=EPOCHS * STEPS + 1),
        "interval": "step",
        "kills": [3, 5, 10],
        "begins": [0, 4, 9, 15],
    },
    # The second look at val_loss ends the first phase, so everything trains from epoch 2 on.
    "plateau, sgd, exponential": {
        "phases": [Phase("head", until=Plateau("val_loss", patience=1, min_delta=10.0)), Phase("*")],
        "optimizer": sgd,
        "scheduler": partial(lrs.ExponentialLR, gamma=0.9),
        "interval": "epoch",
        "kills": [9, 17, 22],
        "begins": [0, 12],
    },
}


class SeededNet(Net):
    """Draws its dropout from the step's number: Lightning does not save the state of random generators."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.default_generator.manual_seed(WORLD * self.trainer.fit_loop.total_batch_idx + self.global_rank)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)


def kill_all(processes: list[int]) -> NoReturn:
    for process in processes:
        if process != os.getpid():
            os.kill(process, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("A process has outlived SIGKILL.")


def write_half_and_kill(processes: list[int], file: LocalFileOpener, content: bytes) -> NoReturn:
    file.f.write(content[: len(content) // 2])
    file.f.flush()
    kill_all(processes)


def fit(folder: str, name: str, kill: int | None, in_writing: bool) -> dict[str, Any]:
    """Train from the newest checkpoint on, and give all that must be equal, unless the kill comes first."""
    run = RUNS[name]
    tempfile.tempdir = unfinished(folder)  # fsspec writes a file there before it moves it to its place
    processes: list[Any] = [None] * WORLD
    dist.all_gather_object(processes, os.getpid())
    rates: list[Any] = []

    def start(trainer: Trainer, _: LightningModule) -> None:
        rates.append([dict(group, params=len(group["params"])) for group in trainer.optimizers[0].param_groups])
        if trainer.is_global_zero and kill is not None and trainer.global_step == kill - in_writing:
            if not in_writing:
                kill_all(processes)
            LocalFileOpener.write = lambda file, content: write_half_and_kill(processes, file, content)

    torch.manual_seed(0)
    net = SeededNet(run["optimizer"], run["scheduler"], interval=run["interval"])
    schedule = FreezeSchedule(run["phases"], verbose=False)
    saver = ModelCheckpoint(
        folder, "{step:02d}", every_n_train_steps=EVERY, save_top_k=-1, save_on_train_epoch_end=False
    )
    fitting = trainer(
        folder,
        callbacks=[schedule, Probe(start), saver],
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        devices=WORLD,
        strategy="ddp",
    )
    samples = data(4 * WORLD * STEPS)
    # With the sampler that Lightning puts in, the resumed epoch has another order if it shuffles, with us or without.
    batches = StatefulDataLoader(samples, batch_size=4, sampler=StatefulDistributedSampler(samples))
    fitting.fit(net, batches, loader(), ckpt_path=newest(folder), weights_only=True)
    return {
        "weights": dict(net.state_dict()),
        "optimizer": fitting.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in fitting.lr_scheduler_configs],
        "callback": schedule.state_dict(),
        "progress": (fitting.current_epoch, fitting.global_step),
        "rates": rates,
    }


def unfinished(folder: str | Path) -> str:
    return f"{folder}-unfinished"


def newest(folder: str | Path) -> Path | None:
    return max(Path(folder).glob("*.ckpt"), default=None)


def saved(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, but for where ModelCheckpoint has put it."""
    checkpoint = torch.load(path, weights_only=True)
    others = {key: state for key, state in checkpoint["callbacks"].items() if "ModelCheckpoint" not in key}
    return {**checkpoint, "callbacks": others}


@pytest.mark.parametrize("name", RUNS)
def test_resumes_as_if_never_killed(tmp_path: Path, name: str) -> None:
    def work(title: str) -> Path:
        (tmp_path / title).mkdir()
        return tmp_path / title

    untouched, killed = work("untouched"), work("killed")
    for folder in (untouched, killed):
        Path(unfinished(folder)).mkdir()

    whole = on_two_processes(fit, work("a"), str(untouched), name, None, False)
    assert [step for _, step, _ in whole[0]["callback"]["history"]] == RUNS[name]["begins"]
    assert len(list(untouched.iterdir())) == EPOCHS * STEPS // EVERY

    *elsewhere, in_writing = RUNS[name]["kills"]
    for step in (*elsewhere, in_writing):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            on_two_processes(fit, work(f"killed at {step}"), str(killed), name, step, step == in_writing)
        whole_files = (step - 1) // EVERY if step == in_writing else step // EVERY
        assert len(list(killed.iterdir())) == whole_files
    assert len(list(Path(unfinished(killed)).iterdir())) == 1

    resumed = on_two_processes(fit, work("b"), str(killed), name, None, False)
    assert [path.name for path in sorted(killed.iterdir())] == [path.name for path in sorted(untouched.iterdir())]
    for path in sorted(untouched.iterdir()):
        one, other = saved(path), saved(killed / path.name)
        assert one.keys() == other.keys()
        for key in one:
            assert same(one[key], other[key]), (path.name, key)
    for rank in range(WORLD):
        left = len(resumed[rank]["rates"])
        assert 0 < left < len(whole[rank]["rates"])
        assert same(resumed[rank].pop("rates"), whole[rank].pop("rates")[-left:])
        for key in whole[rank]:
            assert same(resumed[rank][key], whole[rank][key]), (rank, key)
