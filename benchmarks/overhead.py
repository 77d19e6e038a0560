"""What the callback costs: time in it in a training step and at a transition, beside BackboneFinetuning.

The hooks are timed as the Trainer calls them in a real fit. A recorder stands around every hook of the callback (and
around what the callback does inside ``optimizer.step()``). A bare ``Callback`` in the same Trainer is recorded in the
same way: what it takes is the recorder's own cost, and is subtracted, step by step. Another one leads, so that neither
of the two pays for waking up the interpreter after the step. Fits alternate, so that whatever else the machine does
hits all of them. Printed is minimum / median / maximum over the fits, of each fit's median.

Run it with ``python benchmarks/overhead.py``; ``--quick`` leaves out the largest network, ``--cpu-time`` does not count
what the thread waits for the processor, ``--device cuda`` trains on a GPU: timed is what the host does, as ever.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeSchedule, Phase
from lightning_freeze.freezing.steps import Steps

STEPS = 60  # in a fit
WARM_UP = 10  # first steps of a fit that do not count
GRADIENT = attrgetter("grad")


class Many(LightningModule):
    """A backbone of as many parameter tensors as wanted, half of them BatchNorm's, and a head that does the work.

    The head alone makes the loss: the backbone is there to be frozen, grouped and looked through, and a step takes a
    few milliseconds whatever its size.
    """

    def __init__(self, tensors: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)) for _ in range(tensors // 4)]
        self.backbone = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        # BackboneFinetuning's documentation asks for the filter; ours sees every parameter through it.
        optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclass
class Recorder:
    """Adds up the time inside the outermost of the functions that it stands around."""

    clock: ClassVar[Callable[[], float]] = time.perf_counter
    seconds: float = 0.0
    inside: bool = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self.inside:
                return function(*args, **options)
            self.inside = True
            start = Recorder.clock()
            try:
                return function(*args, **options)
            finally:
                self.seconds += Recorder.clock() - start
                self.inside = False

        return timed

    def watch(self, callback: Callback) -> None:
        for name in dir(Callback):
            if name.startswith("on_") or name in ("setup", "teardown"):
                setattr(callback, name, self.around(getattr(callback, name)))

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass
class Lap(Callback):
    """Last in the Trainer: reads the recorders after each step and after each start of an epoch."""

    watched: Recorder
    bare: Recorder
    steps: list[float] = field(default_factory=list)
    epoch_starts: list[float] = field(default_factory=list)

    def lap(self) -> float:
        return self.watched.take() - self.bare.take()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_starts.append(self.lap())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = self.lap()
        if batch_idx >= WARM_UP:
            self.steps.append(seconds)

    __hash__ = object.__hash__


DEVICE = "cpu"


def fit(callback: Callback, tensors: int, epochs: int, steps: int = STEPS) -> Lap:
    torch.manual_seed(0)
    watched, bare = Recorder(), Recorder()
    lead, nothing = Callback(), Callback()
    Recorder().watch(lead)
    watched.watch(callback)
    bare.watch(nothing)
    hooks = Steps._begin, Steps._resume, Steps._end
    Steps._begin, Steps._resume, Steps._end = map(watched.around, hooks)  # type: ignore[method-assign]
    lap = Lap(watched, bare)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="gpu" if DEVICE == "cuda" else DEVICE,
        devices=1,
        logger=False,
        callbacks=[lead, callback, nothing, lap],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(
            Many(tensors), DataLoader(TensorDataset(torch.randn(64 * steps, 256), torch.arange(64 * steps) % 10), 64)
        )
    finally:
        Steps._begin, Steps._resume, Steps._end = hooks  # type: ignore[method-assign]
    return lap


def a_step(callback: Callback, tensors: int) -> float:
    return statistics.median(fit(callback, tensors, epochs=1).steps)


def a_transition(callback: Callback, tensors: int, transitions: int) -> float:
    return statistics.median(fit(callback, tensors, epochs=transitions + 1, steps=2).epoch_starts[1:])


def by_epoch() -> Callback:
    return FreezeSchedule([Phase("head", epochs=100), Phase("*")])


def by_step() -> Callback:
    return FreezeSchedule([Phase("head", steps=10**6), Phase("*")])


def scaled() -> Callback:
    return FreezeSchedule([Phase("head", epochs=100, lr_scale={"head": 0.5}), Phase("*", lr_scale={"backbone": 0.1})])


def scaled_and_trained() -> Callback:
    return FreezeSchedule([Phase("*", lr_scale={"backbone": 0.1})])


class Floor(Callback):
    """What no callback that sees steps and looks for stray gradients can go below: hooks with nothing else."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps, self.frozen = Steps(), list(pl_module.backbone.parameters())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pass

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        list(map(GRADIENT, self.frozen)).count(None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pass

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.steps.close()


def back_and_forth(scale: float | None = None) -> Callback:
    head = Phase("head", epochs=1)
    everything = Phase("*", epochs=1, lr_scale={"backbone": scale} if scale else None)
    return FreezeSchedule([head, everything] * 4 + [head])


def spread(values: list[float], unit: float) -> str:
    return " / ".join(f"{value / unit:9,.2f}" for value in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="leave out 10,000 tensors")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the thread, for a machine that has other work to do"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    global DEVICE
    DEVICE = options.device
    if options.cpu_time:
        Recorder.clock = time.thread_time
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    log = logging.getLogger("lightning_freeze")
    log.handlers = [logging.NullHandler()]  # the transition lines are composed as ever, but not shown
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {Recorder.clock.__name__}")
    print("minimum / median / maximum of fits")
    sizes = [100, 1_000] if options.quick else [100, 1_000, 10_000]

    step_cases: dict[str, Callable[[], Callback]] = {
        "FreezeSchedule, phases of epochs": by_epoch,
        "FreezeSchedule, phases of steps": by_step,
        "FreezeSchedule, lr_scale": scaled,
        "FreezeSchedule, lr_scale, all train": scaled_and_trained,
        "the floor: the same hooks, empty": Floor,
        "BackboneFinetuning": lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=100),
    }
    for size in sizes:
        steps: dict[str, list[float]] = {}
        transitions: dict[str, list[float]] = {}
        for _ in range(options.repetitions):
            for name, make in step_cases.items():
                steps.setdefault(name, []).append(a_step(make(), size))
            for name, scale in {"FreezeSchedule": None, "FreezeSchedule, lr_scale": 0.1}.items():
                transitions.setdefault(name, []).append(a_transition(back_and_forth(scale), size, 8))
            if size <= 1_000:  # it compares every parameter with every other one: minutes at 10,000
                rival = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
                transitions.setdefault("BackboneFinetuning", []).append(a_transition(rival, size, 1))
        for name, values in steps.items():
            print(f"{size:>6,} tensors  a step, µs        {name:<36}{spread(values, 1e-6)}")
        for name, values in transitions.items():
            print(f"{size:>6,} tensors  a transition, ms  {name:<36}{spread(values, 1e-3)}", flush=True)


if __name__ == "__main__":
    main()
