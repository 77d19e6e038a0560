"""Law 6, and laws 1 to 5 and 7 beside it, on FSDP2 through ModelParallelStrategy."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase
from tests.devices import Even, share, whole
from tests.laws.test_law6_replicas_agree import RATES
from tests.nets import LOADS_ALL, Probe, adamw, needs_fsdp2, same, sgd, trainer
from tests.replicas import WORLD, on_two_processes

pytestmark = needs_fsdp2

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


class Two(Units):
    """Two optimizers, which step one after the other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [
            self.make_optimizer(self.head.parameters()),
            sgd([*self.backbone.parameters(), *self.neck.parameters()]),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()


# In the first phase the second optimizer has nothing to move, so it has no state when the first checkpoint is written.
TWO = [Phase("head", epochs=1), Phase("*", epochs=1), Phase("neck", epochs=1), Phase("head")]

CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd, clipped by norm": {"optimizer": sgd, "options": {"gradient_clip_val": 0.05}},
    "accumulated": {"options": {"accumulate_grad_batches": 2}},
    "parts": {"net": Roots},
    "state dropped": {"state": "drop"},
    "adamw, in one file": {"in_one_file": True},
    "two optimizers, in one file": {"net": Two, "in_one_file": True, "phases": TWO},
    "rates": {"phases": RATES},
    "rates, in one file": {"phases": RATES, "in_one_file": True},
}
RESUMED = ["parts", "adamw, in one file", "two optimizers, in one file", "rates", "rates, in one file"]


def full(state: Any) -> Any:
    """The same nest with every shard gathered."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def fit(
    case: dict[str, Any],
    *,
    ranks: int,
    saver: ModelCheckpoint | None = None,
    resume: Path | None = None,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    torch.manual_seed(0)
    net = case.get("net", Units)(optimizer=case.get("optimizer", adamw))
    seen: list[Any] = []

    def start(run: Trainer, module: LightningModule) -> None:
        held = [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
        named = {id(p): name for name, p in everything.items()}
        seen.append((schedule.phase_index, sorted(named[id(p)] for p in held) == sorted(everything)))

    def end(run: Trainer, module: LightningModule) -> None:
        trains = {name for name, p in everything.items() if p.requires_grad}
        with_gradient = {name for name, p in everything.items() if p.grad is not None}
        seen[-1] += (sorted(trains), trains == with_gradient)

    everything: dict[str, Any] = {}

    class Naming(FreezeSchedule):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            everything.update(pl_module.named_parameters())
            super().on_fit_start(trainer, pl_module)

    schedule = Naming(case.get("phases", PHASES), optimizer_state=case.get("state", "keep"), verbose=False)
    callbacks = [schedule, FreezeBatchNorm(train_affine=True), Probe(start, end), *([saver] if saver else [])]
    options: dict[str, Any] = {"max_epochs": 4, **case.get("options", {}), "use_distributed_sampler": False}
    if ranks > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=not case.get("in_one_file")
        )
        options |= {"strategy": strategy, "devices": ranks}
    run = trainer(callbacks=callbacks, enable_checkpointing=saver is not None, **options)
    run.fit(net, share(stateful=True) if ranks > 1 else whole(), ckpt_path=resume, weights_only=weights_only)
    hooks = [name for one in run.optimizers for name, hook in vars(one).items() if name.endswith("_hooks") and hook]
    return {
        "weights": full(net.state_dict()),
        "state": [full(one.state.get(p, {})) for one in run.optimizers for p in everything.values()],
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for one in run.optimizers
            for group in one.param_groups
        ],
        "history": schedule.history,
        "seen": seen,
        "left": [hooks, sorted({"optimizer_state", "load_checkpoint"} & vars(run.strategy).keys())],
        "sharded": ranks == 1 or all(isinstance(p, DTensor) for p in net.parameters()),
        "flags": all(p.requires_grad for p in net.parameters()),
    }


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=5, save_on_train_epoch_end=False
    )


def resumed(case: dict[str, Any], folder: Path, through: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Resume from where a run was saved, in mid-epoch in several phases: what differs from that run."""
    dist.barrier()
    found = []
    for stop in sorted(folder.iterdir()):
        again = fit(case, ranks=WORLD, resume=stop)
        keys = ("weights", "state", "groups", "history")
        found.append((stop.name, [key for key in keys if not same(again[key], through[key])]))
    return found


def refused(case: dict[str, Any]) -> str:
    try:
        fit(case, ranks=WORLD)
    except MisconfigurationException as error:
        return str(error)
    return ""


class Note:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.makedirs, (self.folder, 0o777, True)


def with_code(folder: Path) -> dict[str, Any]:
    """Resume with ``weights_only`` from one file into which somebody has put code."""
    name, path, trace, error = "adamw, in one file", folder / "code.ckpt", folder / "trace", ""
    if dist.get_rank() == 0:
        checkpoint = torch.load(folder / name / "step=5.ckpt", weights_only=False)
        torch.save({**checkpoint, "code": Note(trace)}, path)
    dist.barrier()
    try:
        fit(CASES[name], ranks=WORLD, resume=path, weights_only=True)
    except pickle.UnpicklingError as raised:
        error = str(raised)
    dist.barrier()
    return {"ran": trace.exists(), "error": error}


def every_case(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"adopted": refused({"net": HeadOnly})}
    for name, case in CASES.items():
        saver = saving(folder / name) if name in RESUMED else None
        results[name] = fit(case, ranks=WORLD, saver=saver)
        if saver is not None:
            results[name]["resumed"] = resumed(case, folder / name, results[name])
    results["with code"] = with_code(folder)
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
def test_the_groups_are_the_users_and_what_trains_gets_gradients(on_two: Any, name: str) -> None:
    for rank in on_two:
        assert {index for index, *_ in rank[name]["seen"]} == {index for *_, index in rank[name]["history"]}
        assert len(rank[name]["history"]) >= 4
        for _, all_are_held, trains, all_have_gradients in rank[name]["seen"]:
            assert trains
            assert all_are_held
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


def test_what_the_optimizer_was_not_given_is_refused(on_two: Any) -> None:
    """It saves in parts, by name: what it does not know cannot be added later."""
    for rank in on_two:
        assert "give them to the optimizer in configure_optimizers" in rank["adopted"]


@pytest.mark.skipif(LOADS_ALL, reason="this Lightning loads whatever is in a file")
def test_weights_only_runs_nothing_that_is_in_a_file(on_two: Any) -> None:
    for rank in on_two:
        assert "weights_only" in rank["with code"]["error"]
        assert not rank["with code"]["ran"]
