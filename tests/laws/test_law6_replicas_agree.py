"""Law 6: replicas agree to the bit, and with one process on the joined batch; only what trains travels."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Ramp
from tests.devices import BATCH, SAMPLES, Even, Hooked, Watch, share, whole
from tests.nets import Net, adamw, sgd, snapshot, trainer
from tests.replicas import WORLD, on_two_processes

EPOCHS = [
    Phase("head", epochs=1),
    Phase("*", epochs=1, lr_scale={"backbone": 0.5}),
    Phase(["head", "backbone.4"], epochs=1),
    Phase("*", epochs=1),
    Phase("neck.bias"),
]
STEPS = [
    Phase("*", steps=2),
    Phase("neck", steps=3),
    Phase(["head", "backbone"], steps=1),
    Phase("*", steps=4, lr_scale=2.0),
    Phase("head"),
]


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)


RATES = [
    Phase("head", steps=3),
    Phase("*", steps=6, lr_scale={"backbone": Ramp(0.0)}, lr_scheduler=one_cycle),
    Phase("neck", steps=3),
    Phase("*", lr_scale=Ramp(0.1, shape="exponential")),
]


class Manual(Even):
    """Two optimizers that step every second batch, by hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            self.make_optimizer([*self.backbone.parameters(), *self.neck.parameters()]),
            sgd(self.head.parameters()),
        ]


class HeadOnly(Even):
    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.head.parameters())


def power_sgd() -> dict[str, Any]:
    state = PowerSGDState(None, 1, start_powerSGD_iter=2, min_compression_rate=0.5)
    return {"ddp_comm_state": state, "ddp_comm_hook": powerSGD_hook}


def post_local_sgd() -> dict[str, Any]:
    # Each rank is a subgroup of its own: after the start gradients do not travel, and parameters do every fifth step.
    alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
    state = PostLocalSGDState(process_group=None, subgroup=alone, start_localSGD_iter=2)
    return {"ddp_comm_state": state, "ddp_comm_hook": post_localSGD_hook, "model_averaging_period": 5}


def compiled_inside(net: Net) -> LightningModule:
    net.backbone.compile(backend="aot_eager")
    return net


def compiled_outside(net: Net) -> LightningModule:
    return torch.compile(net, backend="aot_eager")  # type: ignore[return-value]


Case = dict[str, Any]
# What is not given: Even with AdamW, by epochs, BatchNorm held so that the joined batch gives the same.
CASES: dict[str, Case] = {
    "by epochs": {},
    "by steps": {"phases": STEPS},
    "rates": {"phases": RATES},
    "accumulated": {"phases": STEPS, "options": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}},
    "momentum, small buckets": {"optimizer": sgd, "strategy": {"bucket_cap_mb": 1e-4}},
    "static graph": {"phases": STEPS, "strategy": {"static_graph": True}},
    "gradients are views": {"phases": STEPS, "strategy": {"gradient_as_bucket_view": True}},
    "gradients are views, accumulated": {
        "strategy": {"gradient_as_bucket_view": True},
        "options": {"accumulate_grad_batches": 3},
    },
    "adopted": {"net": HeadOnly, "phases": STEPS},
    "manual": {"net": Manual, "strategy": {"gradient_as_bucket_view": True}},
    "manual, static graph": {"net": Manual, "strategy": {"static_graph": True}},
    "state dropped": {"phases": STEPS, "state": "drop"},
    "compiled inside": {"phases": STEPS, "wrap": compiled_inside},
    "compiled outside": {"phases": STEPS, "wrap": compiled_outside},
    "bfloat16": {"options": {"precision": "bf16-mixed"}, "joined": False},
    "statistics that move": {"batchnorm": False, "joined": False},
    "buffers not broadcast": {"strategy": {"forward_sync_buffers": False}},
    "PowerSGD": {"phases": STEPS, "make_strategy": power_sgd, "joined": False},
    "half the bytes": {
        "strategy": {"ddp_comm_hook": allreduce_hook, "ddp_comm_wrapper": fp16_compress_wrapper},
        "joined": False,
    },
    "local steps between averages": {"make_strategy": post_local_sgd, "joined": False, "optimizer": sgd},
}
if not hasattr(Hooked(), "_pl_static_graph_delay_done"):  # Lightning 2.5, where that pair is refused
    del CASES["manual, static graph"]
if "forward_sync_buffers" not in inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters:  # older torch
    del CASES["buffers not broadcast"]


def fit(case: Case, *, ranks: int) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # the first wrap makes replicas equal
    net = case.get("net", Even)(optimizer=case.get("optimizer", adamw))
    if ranks == 1 or dist.get_rank() == 0:
        torch.manual_seed(0)
        net = case.get("net", Even)(optimizer=case.get("optimizer", adamw))
    watch = Watch()
    schedule = FreezeSchedule(case.get("phases", EPOCHS), optimizer_state=case.get("state", "keep"), verbose=False)
    callbacks: list[Callback] = [schedule]
    if case.get("batchnorm", True):
        callbacks.append(FreezeBatchNorm(train_affine=True))
    options: dict[str, Any] = {**case.get("options", {}), "max_epochs": 5, "use_distributed_sampler": False}
    if ranks > 1:
        strategy = Hooked(**case.get("strategy", {}), **case.get("make_strategy", dict)())
        strategy.watch = watch
        options |= {"strategy": strategy, "devices": ranks}
        callbacks.append(watch)
    run = trainer(callbacks=callbacks, **options)
    run.fit(case.get("wrap", lambda net: net)(net), share() if ranks > 1 else whole())
    return {
        "weights": snapshot(net),
        "differ": watch.differ,
        "trains": watch.trains,
        "travelled": watch.travelled,
        "history": schedule.history,
        "groups": [len(group["params"]) for optimizer in run.optimizers for group in optimizer.param_groups],
    }


def every_case(names: list[str]) -> dict[str, Any]:
    return {name: fit(CASES[name], ranks=WORLD) for name in names}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every case gave on both ranks, from one pair of processes."""
    results = on_two_processes(every_case, tmp_path_factory.mktemp("law6"), list(CASES))
    return {name: [rank[name] for rank in results] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_replicas_are_equal_after_every_phase(on_two: Any, name: str) -> None:
    for rank in on_two[name]:
        phases = len(CASES[name].get("phases", EPOCHS))
        assert [begin[2] for begin in rank["history"]] == list(range(phases))
        if name == "local steps between averages":
            # What froze is equal; what trains is meant to differ until the next average.
            assert not any(n.startswith("backbone.0") for n in rank["differ"][2])
            continue
        assert rank["differ"] == [[]] * (phases + 1)
    first, second = on_two[name]
    assert first["history"] == second["history"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("joined", True)])
def test_equal_to_one_process_on_the_joined_batch(on_two: Any, name: str) -> None:
    alone = fit({**CASES[name], "wrap": lambda net: net}, ranks=1)
    assert alone["history"] == on_two[name][0]["history"]
    for key, value in alone["weights"].items():
        torch.testing.assert_close(on_two[name][0]["weights"][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("joined", True)])
def test_only_what_trains_travels(on_two: Any, name: str) -> None:
    rank = on_two[name][0]
    accumulate = CASES[name].get("options", {}).get("accumulate_grad_batches", 1)
    assert len(set(rank["trains"])) >= 3
    expected = [
        n if (i % (SAMPLES // WORLD // BATCH) + 1) % accumulate == 0 else 0 for i, n in enumerate(rank["trains"])
    ]
    assert rank["travelled"] == expected
