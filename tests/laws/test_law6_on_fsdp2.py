"""Law 6, and laws 1 to 5 and 7 beside it, on FSDP2 through ModelParallelStrategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase
from tests.devices import Even, share, whole
from tests.nets import Probe, adamw, same, sgd, trainer
from tests.replicas import WORLD, on_two_processes

# Whole units, single parameters inside a unit, and back; backbone.0, neck and head are units, the rest is the root's.
PHASES = [
    Phase("head", steps=3),
    Phase("*", steps=4, lr_scale={"backbone": 0.5}),
    Phase(["neck.bias", "backbone.0.weight"], steps=3),
    Phase(["*", "!neck"], steps=5, lr_scale=2.0),
    Phase("backbone.4", steps=1),
    Phase("*"),
]


class Units(Even):
    """Sharded in units of three layers and the rest."""

    def configure_model(self) -> None:
        if (
            not isinstance(self.head, FSDPModule)
            and self._trainer is not None
            and isinstance(self.trainer.strategy, ModelParallelStrategy)
        ):
            mesh = self.device_mesh["data_parallel"]
            for unit in self.units():
                fully_shard(unit, mesh=mesh)

    def units(self) -> tuple[torch.nn.Module, ...]:
        return self.backbone[0], self.neck, self.head, self


class Roots(Units):
    """Sharded in parts of which none contains another: FSDP2 leaves one gathered when nothing in it trains."""

    def units(self) -> tuple[torch.nn.Module, ...]:
        return self.backbone, self.neck, self.head


class HeadOnly(Units):
    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.head.parameters())


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd, clipped by norm": {"optimizer": sgd, "options": {"gradient_clip_val": 0.05}},
    "accumulated": {"options": {"accumulate_grad_batches": 2}},
    "adopted": {"net": HeadOnly},
    "parts": {"net": Roots},
    "state dropped": {"state": "drop"},
    "adamw, in one file": {"in_one_file": True},
}


RESUMED = ["adopted", "parts", "adamw, in one file"]


def full(state: Any) -> Any:
    """The same nest with every shard gathered."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def fit(
    case: dict[str, Any], *, ranks: int, saver: ModelCheckpoint | None = None, resume: Path | None = None
) -> dict[str, Any]:
    torch.manual_seed(0)
    net = case.get("net", Units)(optimizer=case.get("optimizer", adamw))
    seen: list[Any] = []

    def start(run: Trainer, module: LightningModule) -> None:
        held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
        named = {id(p): name for name, p in everything.items()}
        seen.append((schedule.phase_index, sorted(named[id(p)] for p in held)))

    def end(run: Trainer, module: LightningModule) -> None:
        trains = {name for name, p in everything.items() if p.requires_grad}
        with_gradient = {name for name, p in everything.items() if p.grad is not None}
        seen[-1] += (sorted(trains), trains == with_gradient)

    everything: dict[str, Any] = {}

    class Naming(FreezeSchedule):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            everything.update(pl_module.named_parameters())
            super().on_fit_start(trainer, pl_module)

    schedule = Naming(PHASES, optimizer_state=case.get("state", "keep"), verbose=False)
    callbacks = [schedule, FreezeBatchNorm(train_affine=True), Probe(start, end), *([saver] if saver else [])]
    options: dict[str, Any] = {**case.get("options", {}), "max_epochs": 4, "use_distributed_sampler": False}
    if ranks > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=not case.get("in_one_file")
        )
        options |= {"strategy": strategy, "devices": ranks}
    run = trainer(callbacks=callbacks, enable_checkpointing=saver is not None, **options)
    run.fit(net, share(stateful=True) if ranks > 1 else whole(), ckpt_path=resume)
    hooks = [name for name in vars(run.optimizers[0]) if name.endswith("_hooks") and vars(run.optimizers[0])[name]]
    return {
        "weights": full(net.state_dict()),
        "state": [full(run.optimizers[0].state.get(p, {})) for p in everything.values()],
        "groups": [
            {key: value for key, value in group.items() if key != "params"} for group in run.optimizers[0].param_groups
        ],
        "history": schedule.history,
        "seen": seen,
        "left": [hooks, sorted({"optimizer_state", "load_checkpoint"} & vars(run.strategy).keys())],
        "sharded": ranks == 1 or all(isinstance(p, DTensor) for p in net.parameters()),
        "flags": all(p.requires_grad for p in net.parameters()),
    }


def resumed(case: dict[str, Any], folder: Path) -> list[tuple[str, list[str]]]:
    """Stop in mid-epoch in several phases and resume: what differs from the uninterrupted run."""
    saver = ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=5, save_on_train_epoch_end=False
    )
    through = fit(case, ranks=WORLD, saver=saver)
    dist.barrier()
    found = []
    for stop in sorted(folder.iterdir()):
        again = fit(case, ranks=WORLD, resume=stop)
        keys = ("weights", "state", "groups", "history")
        found.append((stop.name, [key for key in keys if not same(again[key], through[key])]))
    return found


def every_case(folder: Path) -> dict[str, Any]:
    results = {}
    for name, case in CASES.items():
        results[name] = fit(case, ranks=WORLD)
        if name in RESUMED:
            results[name]["resumed"] = resumed(case, folder / name)
    return results


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp2")
    return on_two_processes(every_case, folder, folder / "checkpoints")


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_process_on_the_joined_batch(on_two: Any, name: str) -> None:
    alone = fit(CASES[name], ranks=1)
    for rank in on_two:
        assert rank[name]["history"] == alone["history"]
        assert rank[name]["seen"] == alone["seen"]
        for key, value in alone["weights"].items():
            torch.testing.assert_close(rank[name]["weights"][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_optimizer_holds_what_trains_and_that_gets_gradients(on_two: Any, name: str) -> None:
    for rank in on_two:
        assert {index for index, *_ in rank[name]["seen"]} == {index for *_, index in rank[name]["history"]}
        assert len(rank[name]["history"]) >= 4
        for _, held, trains, all_have_gradients in rank[name]["seen"]:
            assert held == trains
            assert all_have_gradients


@pytest.mark.parametrize("name", CASES)
def test_replicas_hold_the_same_and_nothing_stays_behind(on_two: Any, name: str) -> None:
    first, second = (rank[name] for rank in on_two)
    assert same(first["weights"], second["weights"])
    for rank in (first, second):
        assert rank["left"] == [[], []]
        assert rank["sharded"]
        assert rank["flags"]


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(on_two: Any, name: str) -> None:
    for rank in on_two:
        assert len(rank[name]["resumed"]) == 4
        assert [found for found in rank[name]["resumed"] if found[1]] == []
