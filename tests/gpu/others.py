"""What a GPU has beside the laws: compiled modules, sharded ones, features kept on the device, waits for it."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchmetrics.classification as tm
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_freeze import FeatureCache, FreezeBatchNorm, FreezeSchedule, MetricLogger, NormLogger, Phase
from tests.gpu.fits import NotHereError, Seeded, adamw, sgd, trainer_on
from tests.nets import FSDP2_ON_CPU, Net, Probe, data, loader, moved, same, snapshot


class Even(Net):
    """Without dropout."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def phases() -> list[Phase]:
    return [
        Phase("head", steps=3),
        Phase("*", steps=4, lr_scale={"backbone": 0.5}),
        Phase(["neck.bias", "backbone"], steps=3),
        Phase("*"),
    ]


# Compiled


def compiled(whole: bool) -> Callable[[str], None]:
    """What unfreezes trains, and what is frozen stays, though the graph was made before."""

    def run(device: str) -> None:
        compilers = os.environ.get("CC", "gcc"), "g++", "clang++", "cc"
        if not any(map(shutil.which, compilers)) or (device == "cuda" and find_spec("triton") is None):
            raise NotHereError("inductor needs a compiler, and triton on a GPU")
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = Even(optimizer=adamw())
        if not whole:
            net.backbone = torch.compile(net.backbone)  # type: ignore[assignment]
        schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", epochs=1), Phase("head")], verbose=False)
        found: list[tuple[int, set[str]]] = []
        before: dict[str, Tensor] = {}

        def start(_: Trainer, module: LightningModule) -> None:
            if not found or found[-1][0] != schedule.phase_index:
                found.append((schedule.phase_index, set()))
                before.clear()
                before.update(snapshot(module))

        def end(_: Trainer, module: LightningModule) -> None:
            found[-1][1].update(moved(before, snapshot(module)))

        run = trainer_on(device, callbacks=[schedule, Probe(start, end)], max_epochs=3)
        module = torch.compile(net) if whole else net
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(module, loader())  # type: ignore[arg-type]
        head, everything = {"head.weight", "head.bias"}, {name for name, _ in net.named_parameters()}
        assert [index for index, _ in found] == [0, 1, 2]
        assert found[0][1] == head == found[2][1], f"frozen parts move: {found[0][1]}, {found[2][1]}"
        still = {name for name in everything - found[1][1] if not name.endswith(("0.bias", "4.bias"))}
        assert not still, f"unfrozen and never trained: {sorted(still)}"

    return run


# Sharded


class Sharded(Even):
    """In units for FSDP2."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.head, FSDPModule):
            for unit in (self.backbone[0], self.neck, self.head, self):
                fully_shard(unit, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


class Weights(Callback):
    """Takes whole parameters, by the names of the plain module, when training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = trainer.strategy.model
        is_flat = isinstance(model, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(model, writeback=False) if is_flat else nullcontext():
            self.found = {
                name.replace("_fsdp_wrapped_module.", ""): (p.full_tensor() if isinstance(p, DTensor) else p)
                .detach()
                .clone()
                .cpu()
                for name, p in pl_module.named_parameters()
            }


def fit_sharded(device: str, strategy: Any, saver: ModelCheckpoint | None = None, resume: Path | None = None) -> Any:
    torch.manual_seed(0)
    net, weights = Sharded(optimizer=adamw()), Weights()
    schedule = FreezeSchedule(phases(), verbose=False)
    callbacks = [schedule, FreezeBatchNorm(train_affine=True), weights, *([saver] if saver else [])]
    options = {"use_distributed_sampler": False, "enable_checkpointing": saver is not None, "max_epochs": 3}
    run = trainer_on(device, callbacks=callbacks, strategy=strategy, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(net, loader(), ckpt_path=resume, weights_only=False)
    assert all(p.requires_grad for p in net.parameters())
    return weights.found, schedule.history


def sharded(strategy: Callable[[], Any], needs_cuda: str = "") -> Callable[[str], None]:
    """Sharded over one process it does what one device does, and resumes exactly."""

    def run(device: str) -> None:
        if needs_cuda and device != "cuda":
            raise NotHereError(needs_cuda)
        alone, history = fit_sharded(device, "auto")
        with tempfile.TemporaryDirectory() as place:
            every = {"save_top_k": -1, "save_on_train_epoch_end": True}
            whole, own = fit_sharded(device, strategy(), ModelCheckpoint(place, "{epoch}", **every))
            assert own == history
            assert whole.keys() == alone.keys()
            for name, value in alone.items():
                assert torch.allclose(whole[name], value, rtol=1e-3, atol=1e-5), f"{name} is not as on one device"
            for stop in ("epoch=0.ckpt", "epoch=1.ckpt"):
                again, own = fit_sharded(device, strategy(), resume=Path(place, stop))
                differ = moved(whole, again)
                assert not differ, f"a run resumed from {stop} differs: {sorted(differ)}"
                assert own == history

    return run


def fsdp() -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={nn.Linear, nn.Conv2d})


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)


# Features kept


class Features(LightningModule):
    """A backbone that a cache can answer for, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for channels in (2, 8)]
        self.backbone = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(8, 3)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.head(self.backbone(batch[0]).float()), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(list(self.parameters()))


def cached(precision: str, storage: str = "memory", schedule: str = "frozen") -> Callable[[str], str]:
    """Ten epochs with a cache give the losses and weights of ten without, and samples come back."""

    def run(device: str) -> str:
        with tempfile.TemporaryDirectory() as place:
            results = []
            for on in (False, True):
                cache = FeatureCache("backbone", storage=storage if storage == "memory" else place)
                results.append(fit_cached(device, precision, cache if on else None, schedule))
        plain, kept = results
        stats = cache.stats
        # Before the first ones may, some are computed a second time, as proof.
        assert stats.hit_rate > 0.1, f"{stats.hits} hits, {stats.misses} misses; {stats.why}"
        if stats.difference == 0:
            assert same(plain, kept), "losses or weights differ, and the cache has not seen why"
            return f"{stats.hit_rate:.0%} hits, bit for bit"
        torch.testing.assert_close(plain, kept, rtol=1e-2, atol=1e-3)
        return f"{stats.hit_rate:.0%} hits; the module's own bits differ by {stats.difference:.1e}"

    return run


def fit_cached(device: str, precision: str, cache: FeatureCache | None, schedule: str) -> Any:
    torch.manual_seed(0)
    net = Features()
    plans = {
        "frozen": [Phase("head")],
        "gradual": [Phase("head", epochs=5), Phase(["head", "backbone.1"])],
    }
    freezing = FreezeSchedule(plans[schedule], frozen_mode="eval", verbose=False)
    order = torch.Generator().manual_seed(3)
    batches = DataLoader(data(28), 8, shuffle=True, generator=order)
    run = trainer_on(device, callbacks=[freezing, *([cache] if cache else [])], max_epochs=10, precision=precision)
    run.fit(net, batches)
    return [net.losses, snapshot(net)]


# Waits

SYNCHRONIZES = "called a synchronizing CUDA operation"


class Waits(Callback):
    """Counts, for each step, how often the host waits for the device between a batch's first and last hook."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._caught = warnings.catch_warnings(record=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._caught = warnings.catch_warnings(record=True)
        self._log = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def close(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.steps.append(sum(SYNCHRONIZES in str(one.message) for one in self._log or ()))
        self._caught.__exit__(None, None, None)


class Closes(Callback):
    """Last in the Trainer."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_end(self, *_: Any) -> None:
        self.waits.close()


def count_waits(device: str, *callbacks: Callback) -> list[int]:
    waits = Waits()
    run = trainer_on(device, callbacks=[waits, *callbacks, Closes(waits)], max_epochs=2)
    run.fit(Seeded(optimizer=adamw()), loader())
    return waits.steps


def norms_wait(device: str) -> str:
    """One wait a logged step, however many tensors there are."""
    return waits_of(device, NormLogger(every_n_steps=1, per="parameter"), 1)


def metrics_wait(device: str) -> str:
    """A metric that does not wait by itself is updated without waiting for the device."""
    metrics = {"accuracy": tm.MulticlassAccuracy(3, average="micro", validate_args=False)}
    return waits_of(device, MetricLogger(metrics, stages=("train",)), 0)


def schedule_waits(device: str) -> str:
    """A step without a transition waits for nothing."""
    return waits_of(device, FreezeSchedule([Phase("head")], verbose=False), 0)


def waits_of(device: str, callback: Callback, most: int) -> str:
    if device != "cuda":
        raise NotHereError("torch counts waits for a GPU only")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # some of those wait
    try:
        plain, with_it = count_waits(device), count_waits(device, callback)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    more = [b - a for a, b in zip(plain[1:], with_it[1:], strict=True)]  # the first step sets up
    assert max(more) <= most, f"waits a step: {with_it}, without it {plain}"
    return f"{max(more)} waits a step more than the {max(plain[1:])} without it"


CHECKS: dict[str, Callable[[str], Any]] = {
    "compile, the backbone": compiled(whole=False),
    "compile, the LightningModule": compiled(whole=True),
    "FSDP of one process": sharded(fsdp, "Lightning allows FSDPStrategy on a GPU only"),
    "FSDP2 of one process": sharded(fsdp2, "" if FSDP2_ON_CPU else "this torch has FSDP2 on a GPU only"),
    "FeatureCache, float32": cached("32-true"),
    "FeatureCache, bf16-mixed": cached("bf16-mixed"),
    "FeatureCache, 16-mixed": cached("16-mixed"),
    "FeatureCache, a chain that shrinks": cached("32-true", schedule="gradual"),
    "FeatureCache in a folder": cached("32-true", storage="folder"),
    "waits of NormLogger": norms_wait,
    "waits of MetricLogger": metrics_wait,
    "waits of FreezeSchedule": schedule_waits,
}
