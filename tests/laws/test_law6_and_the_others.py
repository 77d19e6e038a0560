"""Laws 1, 2, 3, 4, 5 and 7 on two processes under DDP."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Plateau
from tests.devices import Even, share
from tests.laws.test_law1_frozen_means_frozen import STATISTICS
from tests.laws.test_law7_nothing_stays_behind import anatomy
from tests.nets import Net, Probe, adamw, loader, members, moved, same, sgd, snapshot, trainer
from tests.replicas import WORLD, on_two_processes

OPTIONS: dict[str, Any] = {"devices": WORLD, "use_distributed_sampler": False}
PHASES = [
    Phase("*", steps=4),  # momentum and Adam's moments are there when the backbone freezes
    Phase("head", steps=3),
    Phase(["head", "neck", "backbone.4"], epochs=1, lr_scale=0.5),
    Phase("*", until=Plateau("val_loss", patience=1, min_delta=10.0)),
    Phase("neck.bias"),
]
SETUPS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": adamw},
    "sgd, one cycle": {
        "optimizer": sgd,
        "scheduler": lambda o: lrs.OneCycleLR(o, 1e-1, total_steps=60),
        "interval": "step",
    },
}


def frozen_means_frozen(setup: dict[str, Any], **options: Any) -> list[Any]:
    """For each phase on this rank: its index, what trains, what moved, and whether optimizer and gradients agree."""
    found: list[Any] = []
    before: dict[str, Any] = {}
    schedule = FreezeSchedule(PHASES, verbose=False)

    def start(_: Trainer, module: LightningModule) -> None:
        if not found or found[-1][0] != schedule.phase_index:
            before.clear()
            before.update(snapshot(module))
            trains = sorted(name for name, p in module.named_parameters() if p.requires_grad)
            found.append([schedule.phase_index, trains, set(), True])

    def end(run: Trainer, module: LightningModule) -> None:
        found[-1][2] |= moved(before, snapshot(module))
        held = sorted(members(run.optimizers[0])) == sorted(map(id, module.parameters()))
        gradients = all((p.grad is not None) == p.requires_grad for p in module.parameters())
        found[-1][3] = found[-1][3] and held and gradients

    run = trainer(callbacks=[schedule, Probe(start, end)], strategy="ddp", max_epochs=5, **OPTIONS, **options)
    run.fit(Net(**setup), share(), share())
    return [[index, trains, sorted(changed), right] for index, trains, changed, right in found]


def saving(setup: dict[str, Any], callbacks: list[Any], folder: Path) -> None:
    """Save after every fifth step, on all ranks, as ModelCheckpoint does."""
    every = {"every_n_train_steps": 5, "save_on_train_epoch_end": False}
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every)
    options = {**OPTIONS, "strategy": "ddp", "max_epochs": 5, "enable_checkpointing": True}
    torch.manual_seed(0)
    net = Even(**setup)
    run = trainer(callbacks=[*callbacks, saver], **options)
    run.fit(net, share(stateful=True), share())
    dist.barrier()


def finished(setup: dict[str, Any], resume: Path | None) -> list[Any]:
    torch.manual_seed(0)
    net, schedule = Even(**setup), FreezeSchedule(PHASES, verbose=False)
    run = trainer(callbacks=[schedule, FreezeBatchNorm("backbone.5")], strategy="ddp", max_epochs=5, **OPTIONS)
    run.fit(net, share(stateful=True), share(), ckpt_path=resume, weights_only=True)
    rates = [config.scheduler.state_dict() for config in run.lr_scheduler_configs]
    return [net.state_dict(), run.optimizers[0].state_dict(), rates, schedule.state_dict(), run.global_step]


def resumed(setup: dict[str, Any], folder: Path) -> list[tuple[str, list[bool]]]:
    through = finished(setup, None)
    saving(setup, [FreezeSchedule(PHASES, verbose=False), FreezeBatchNorm("backbone.5")], folder / "ours")
    saving(setup, [], folder / "plain")
    found = []
    for stop in sorted((folder / "ours").iterdir()):
        step = int(stop.stem.split("=")[1])
        ours, plain = (torch.load(folder / kind / stop.name, weights_only=True) for kind in ("ours", "plain"))
        own = [ours["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]]
        own += [ours["lr_schedulers"] == plain["lr_schedulers"], ours.keys() == plain.keys()]
        if step % 6:  # Lightning skips an epoch if it resumes from the end of an epoch's last batch
            own += [same(a, b) for a, b in zip(finished(setup, stop), through, strict=True)]
        found.append((stop.name, own))
    return found


def left_behind(fails: bool) -> list[str]:
    class Failing(Even):
        fails = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.fails and self.current_epoch == 1:
                raise RuntimeError("lost")
            return super().training_step(batch, batch_idx)

    net = Failing()
    before = anatomy(net)
    net.fails = fails
    strategy = DDPStrategy()
    schedule = FreezeSchedule([Phase("*", epochs=1), Phase("head")], verbose=False)
    run = trainer(callbacks=[FreezeBatchNorm("backbone.1"), schedule], strategy=strategy, max_epochs=2, **OPTIONS)
    found = []
    try:
        run.fit(net, share())
    except RuntimeError as error:
        found += [] if fails and str(error) == "lost" else [repr(error)]
    if anatomy(net) != before:
        found.append("the model's anatomy")
    if any(vars(run.optimizers[0])[name] for name in vars(run.optimizers[0]) if name.endswith("_hooks")):
        found.append("hooks of the optimizer")
    net.fails = False
    net.trainer = None  # type: ignore[assignment]
    copied = copy.deepcopy(net).eval()
    pickle.loads(pickle.dumps(net.backbone))
    x = torch.randn(2, 2, 5, 5)
    torch.export.export(copied.backbone, (x,))
    # No reducer's hook is left on a parameter: ranks that go on alone, on data of their own, go apart.
    weights = snapshot(net)
    torch.manual_seed(dist.get_rank())
    net(torch.randn(4, 2, 5, 5)).sum().backward()
    gradient = net.backbone[0].weight.grad
    both = [torch.empty_like(gradient) for _ in range(WORLD)]
    dist.all_gather(both, gradient)
    if torch.equal(*both):
        found.append("a reducer")
    net.zero_grad()
    trainer(strategy="ddp", max_epochs=1, **OPTIONS).fit(net, share())
    if not {"head.weight", "neck.weight", "backbone.4.weight"} <= moved(weights, snapshot(net)):
        found.append("something frozen")
    return found


def every_law(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "frozen": {name: frozen_means_frozen(setup, gradient_clip_val=0.1) for name, setup in SETUPS.items()},
        "resumed": {name: resumed(setup, folder / name) for name, setup in SETUPS.items()},
        "left": [left_behind(fails) for fails in (False, True)],
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("laws")
    return on_two_processes(every_law, folder, folder / "checkpoints")


@pytest.mark.parametrize("setup", SETUPS)
def test_only_what_trains_moves_on_every_rank(both: Any, setup: str) -> None:
    statistics = {f"backbone.{layer}.{name}" for layer in (1, 5) for name in STATISTICS}
    for rank in both:
        assert [phase[0] for phase in rank["frozen"][setup]] == [0, 1, 2, 3, 4]
        for index, trains, changed, optimizer_agrees in rank["frozen"][setup]:
            moving = statistics if index in (0, 3) else set()
            assert set(changed) <= set(trains) | moving
            assert set(trains) - set(changed) <= {"backbone.0.bias", "backbone.4.bias"}  # in front of a BatchNorm
            assert optimizer_agrees


@pytest.mark.parametrize("setup", SETUPS)
def test_checkpoints_are_the_users_own_and_resume_is_exact(both: Any, setup: str) -> None:
    for rank in both:
        assert len(rank["resumed"][setup]) == 6
        assert [found for found in rank["resumed"][setup] if not all(found[1])] == []


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(both: Any, fails: bool) -> None:
    for rank in both:
        assert rank["left"][fails] == []


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_processes_that_lightning_launches_itself(strategy: str) -> None:
    """The schedule travels to them, and what was learned travels back."""
    net = Net()
    before = snapshot(net)
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase(["head", "neck"])], verbose=False)
    run = trainer(callbacks=[schedule], strategy=strategy, devices=WORLD, max_epochs=2)
    run.fit(net, loader())
    assert moved(before, snapshot(net)) == {"head.weight", "head.bias", "neck.weight", "neck.bias"}
    assert all(p.requires_grad for p in net.parameters())
