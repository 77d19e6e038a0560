"""Laws 5 and 6 for target networks: a resumed one is exactly where it was, and every process has the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, Subset

from lightning_freeze import FreezeSchedule, Phase, TargetNetwork
from tests.followers import Student
from tests.nets import OptimizerFactory, adamw, data, loader, same, sgd, trainer
from tests.replicas import on_two_processes

PHASES: dict[str, list[Phase] | None] = {
    "alone": None,
    "beside a schedule": [
        Phase("online.5", steps=4),
        Phase("*", steps=5, lr_scale={"online.0": 0.1}),
        Phase("online.0"),
    ],
}


def callbacks(follow: dict[str, Any], phases: str, first: str = "target") -> list[Callback]:
    target: list[Callback] = [TargetNetwork("online", "target", eval_mode=True, **follow)]
    chosen = PHASES[phases]
    schedule: list[Callback] = [FreezeSchedule(chosen, verbose=False)] if chosen else []
    return target + schedule if first == "target" else schedule + target


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lrs.OneCycleLR(optimizer, 0.1, total_steps=20)


def fit(own: list[Callback], optimizer: OptimizerFactory, *others: Callback, **options: Any) -> dict[str, Any]:
    """Train, and give all that must be equal."""
    torch.manual_seed(0)
    student = Student(optimizer, one_cycle)
    resume = options.pop("resume", None)
    run = trainer(callbacks=[*own, *others], enable_checkpointing=bool(others), **{"max_epochs": 3, **options})
    run.fit(student, loader(stateful=True), ckpt_path=resume, weights_only=True)
    return {
        "weights": copy.deepcopy(student.state_dict()),
        "optimizer": run.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "callbacks": [callback.state_dict() for callback in own],
        "progress": (run.current_epoch, run.global_step),
    }


@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize(
    ("follow", "optimizer", "accumulate"),
    [({"tau": 0.3}, adamw, 1), ({"every_n_steps": 4}, sgd, 1), ({"every_n_steps": 2}, adamw, 3), ({"tau": 1}, sgd, 2)],
    ids=["average", "copy every 4", "copy every 2, accumulated", "average of 1, accumulated"],
)
def test_resuming_from_anywhere_is_exact(
    tmp_path: Path, follow: dict[str, Any], optimizer: OptimizerFactory, accumulate: int, phases: str
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    name = {"filename": "{epoch}-{step}", "save_top_k": -1}
    in_mid_epoch = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False, **name)
    after_epochs = ModelCheckpoint(tmp_path / "epochs", every_n_epochs=1, save_on_train_epoch_end=True, **name)
    whole = fit(callbacks(follow, phases), optimizer, in_mid_epoch, after_epochs, **options)
    per_epoch = 6 // accumulate
    # Lightning, with or without us, skips an epoch if it resumes from the end of an epoch's last batch.
    stops = [stop for stop in tmp_path.glob("*.ckpt") if int(stop.stem.split("step=")[1]) % per_epoch]
    stops = [*stops, *(tmp_path / "epochs").iterdir()]
    assert len(stops) >= 3 * per_epoch
    for stop in stops[:: 1 if phases == "alone" else 2]:
        resumed = fit(callbacks(follow, phases), optimizer, resume=stop, **options)
        for what in whole:
            assert same(resumed[what], whole[what]), (stop.name, what)


class Smooth(Student):
    """Without BatchNorm and dropout, so that two halves of a batch are worth the whole."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.online = nn.Sequential(nn.Flatten(), nn.Linear(50, 8), nn.Tanh(), nn.Linear(8, 3))
        self.target = copy.deepcopy(self.online)
        nn.init.ones_(self.target[3].bias)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


SMOOTH = [Phase("online.3", steps=4), Phase("*", steps=5), Phase("online.1")]


def train(follow: dict[str, Any], scheduled: bool, first: str, processes: int) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank() if processes > 1 else 0)  # DDP starts every process from the first one's weights
    student, target = Smooth(), TargetNetwork("online", "target", **follow)
    schedule: list[Callback] = [FreezeSchedule(SMOOTH, verbose=False)] if scheduled else []
    share = Subset(data(), range(dist.get_rank(), 24, 2)) if processes > 1 else data()
    run = trainer(
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        callbacks=[target, *schedule] if first == "target" else [*schedule, target],
        max_epochs=3,
        use_distributed_sampler=False,
    )
    run.fit(student, DataLoader(share, batch_size=4 // processes))
    flags = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    return {"weights": dict(student.state_dict()), "steps": target.steps, "flags": flags}


CASES = [
    ({"tau": 0.3}, False, "target"),
    ({"tau": 0.3}, True, "target"),
    ({"every_n_steps": 4}, True, "schedule"),
]


def every_case(processes: int) -> list[Any]:
    return [train(*case, processes) for case in CASES]


def test_every_process_has_the_target_of_one_process_with_all_data(tmp_path: Path) -> None:
    expected = every_case(1)
    first, second = on_two_processes(every_case, tmp_path, 2)
    assert same(first, second)
    for whole, half in zip(expected, first, strict=True):
        assert half["steps"] == whole["steps"] == 18
        assert half["flags"] == whole["flags"] == dict.fromkeys(whole["flags"], True)
        for name, value in whole["weights"].items():
            torch.testing.assert_close(half["weights"][name], value, rtol=1e-4, atol=1e-6)
