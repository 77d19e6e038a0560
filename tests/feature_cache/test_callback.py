from __future__ import annotations

import copy
import logging
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_freeze import FeatureCache, FreezeBatchNorm, FreezeSchedule, Phase
from lightning_freeze.feature_cache.interceptor import is_intercepted
from lightning_freeze.target.callback import TargetNetwork
from tests.laws.test_law7_nothing_stays_behind import anatomy
from tests.nets import Net, Probe, adamw, data, loader, moved, needs_fsdp2, snapshot, trainer
from tests.replicas import on_two_processes

SAMPLES = 26  # batches of 4, and a last one of 2


class Wide(Net):
    """Has features wide enough to be trusted after one comparison, and keeps the losses."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)
        )
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss


class Frozen(Wide):
    """Freezes its backbone by hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()


def shuffled(samples: int = SAMPLES, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(data(samples), batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))


SCHEDULE = [Phase("head", epochs=3), Phase(["head", "neck"], epochs=3), Phase("*", epochs=2), Phase("head")]


def settings(kind: str) -> tuple[type[Wide], list[Callback]]:
    schedule = FreezeSchedule(SCHEDULE, verbose=False)
    cache = FeatureCache("backbone")
    return {
        "by hand": (Frozen, [cache]),
        "schedule first": (Wide, [schedule, cache]),
        "cache first": (Wide, [cache, schedule]),
        "eval": (Wide, [cache, FreezeSchedule(SCHEDULE, frozen_mode="eval", verbose=False)]),
        "batch norm": (Frozen, [FreezeBatchNorm("backbone"), cache]),
        "batch norm and schedule": (Wide, [cache, FreezeBatchNorm("backbone"), schedule]),
        "gradual": (
            Wide,
            [FreezeSchedule([Phase(["head", "backbone.3"], epochs=5), Phase("head")], verbose=False), cache],
        ),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["by hand", "schedule first", "cache first", "eval", "batch norm", "batch norm and schedule", "gradual"]
)
def test_losses_and_weights_are_those_without(kind: str) -> None:
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        make, callbacks = settings(kind)
        net = make(optimizer=adamw)
        caches = [callback for callback in callbacks if isinstance(callback, FeatureCache)]
        used = [callback for callback in callbacks if cached or callback not in caches]
        run = trainer(callbacks=used, max_epochs=10, num_sanity_val_steps=2)
        run.fit(net, shuffled(), loader(8))
        results.append((torch.stack(net.losses), snapshot(net), float(run.callback_metrics["val_loss"])))
    assert torch.equal(results[0][0], results[1][0])
    assert moved(results[0][1], results[1][1]) == set()
    assert results[0][2] == results[1][2]
    (cache,) = caches
    assert cache.stats.hits > 4 * SAMPLES
    assert cache.stats.hits + cache.stats.misses <= 10 * (SAMPLES + 8) + 8


def test_stats_say_whether_it_is_active_and_why_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_freeze")
    cache = FeatureCache("backbone")
    active = []
    probe = Probe(end=lambda *_: active.append((cache.stats.active, cache.stats.why)))
    trainer(callbacks=[FreezeSchedule(SCHEDULE), cache, probe], max_epochs=10).fit(Wide(), shuffled())
    by_epoch = active[::7]
    assert [a for a, _ in by_epoch] == [True] * 6 + [False] * 2 + [True] * 2
    assert by_epoch[6][1] == "backbone.0.weight trains"
    said = [record.message for record in caplog.records if record.message.startswith("FeatureCache")]
    assert said == ["FeatureCache: backbone: off, because backbone.0.weight trains."]
    assert cache.stats.active
    assert cache.stats.covers == ("backbone",)


def test_stats_say_why_calls_are_not_cached() -> None:
    """The module is frozen and could be cached, but nothing ever is."""

    class Given(nn.Linear):
        def forward(self, batch: UserDict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(batch["x"].mean((2, 3)))

    class Wraps(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Given(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(UserDict(x=x)))

    cache = FeatureCache("backbone")
    trainer(callbacks=[FreezeSchedule([Phase("head")]), cache], max_epochs=2).fit(Wraps(), loader())
    assert (cache.stats.active, cache.stats.covers) == (False, ())
    assert cache.stats.why == "it is called with a UserDict, of which no key can be made"


def test_values_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    cache = FeatureCache("backbone")
    run = trainer(tmp_path, callbacks=[cache], max_epochs=4, logger=logger, log_every_n_steps=1)
    run.fit(Frozen(), loader(24))
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    hits = [float(row.split(",")[names.index("cache/hits")]) for row in rows[1:]]
    misses = [float(row.split(",")[names.index("cache/misses")]) for row in rows[1:]]
    assert hits[0] == 0
    assert hits[-1] == 24
    assert [h + m for h, m in zip(hits, misses, strict=True)] == [24] * 4
    assert {"cache/bytes", "cache/seconds_saved"} <= run.callback_metrics.keys()
    assert sum(hits) == cache.stats.hits


class Augmented(Dataset[Any]):
    def __init__(self) -> None:
        self.data = data(24)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + torch.randn(x.shape), y


def test_random_augmentation_switches_it_off_once_and_for_training_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_freeze")
    cache = FeatureCache("backbone")
    run = trainer(callbacks=[cache], max_epochs=6)
    seen = []
    run.callbacks.append(Probe(end=lambda *_: seen.append(cache.stats)))  # type: ignore[attr-defined]
    run.fit(Frozen(), DataLoader(Augmented(), 4), loader(8))
    said = [record.message for record in caplog.records if "off for train" in record.message]
    assert len(said) == 1
    assert "0 of the 24 samples" in said[0]
    assert [stats.active for stats in seen[::6]] == [True, True, False, False, False, False]
    assert cache.stats.why is not None
    assert "augmented" in cache.stats.why
    assert seen[-1].hits > seen[12].hits  # validation samples come back


def test_features_for_training_stay_where_validation_is_off() -> None:
    misses: list[float] = []
    run = trainer(callbacks=[FeatureCache("backbone")], max_epochs=4)
    read = Probe(start=lambda one, _: misses.append(float(one.callback_metrics.get("cache/misses", 0))))
    run.callbacks.append(read)  # type: ignore[attr-defined]
    run.fit(Frozen(), loader(24), DataLoader(Augmented(), 4))
    assert misses[6] == 24
    assert misses[18] == 0  # of the third epoch


def test_shuffled_data_for_which_there_is_too_little_room_switches_it_off(caplog: pytest.LogCaptureFixture) -> None:
    """Batches of which some samples are missing would be computed for ever, and all that could be gained is lost."""
    caplog.set_level(logging.INFO, "lightning_freeze")
    results = []
    cache = FeatureCache("backbone", max_bytes=25_000)
    for callbacks in ([], [cache]):
        torch.manual_seed(0)
        net = Frozen()
        trainer(callbacks=callbacks, max_epochs=4).fit(net, shuffled(64, 16), loader(16))
        results.append(torch.stack(net.losses))
    assert torch.equal(*results)
    (said,) = [record.message for record in caplog.records if "off for train" in record.message]
    assert "All take 44,800 bytes" in said
    assert not cache.stats.active
    assert cache.stats.why is not None
    assert cache.stats.samples == 0


def test_training_validation_and_test_share_what_is_kept() -> None:
    cache = FeatureCache("backbone")
    net = Frozen()
    run = trainer(callbacks=[cache], max_epochs=4)
    run.fit(net, loader(24), loader(24))
    before = cache.stats
    assert before.samples in (24, 48)  # 48 if this machine's kernels differ with and without gradients
    run.validate(net, loader(24), verbose=False)
    assert cache.stats.hits - before.hits >= 20
    cache.clear()
    run.validate(net, loader(24), verbose=False)
    assert cache.stats.hits - before.hits <= 24


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_another_fit_goes_on_only_with_the_same_weights() -> None:
    cache = FeatureCache("backbone")
    net = Frozen()
    trainer(callbacks=[cache], max_epochs=3).fit(net, loader(24))
    misses = cache.stats.misses
    trainer(callbacks=[cache], max_epochs=1).fit(net, loader(24))
    assert cache.stats.misses == misses + 4  # one batch, to see that code has not changed either
    with torch.no_grad():
        net.backbone[0].weight.mul_(1.5)
    trainer(callbacks=[cache], max_epochs=1).fit(net, loader(24))
    assert cache.stats.misses == misses + 4 + 24


class Stopping(Frozen):
    """Copies its backbone in each step, and raises in its second epoch."""

    error: BaseException | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert any(map(is_intercepted, self.modules()))
        twin, again = copy.deepcopy(self.backbone), pickle.loads(pickle.dumps(self.backbone))
        assert torch.equal(twin(batch[0]), self.backbone(batch[0]))
        assert torch.equal(again(batch[0]), self.backbone(batch[0]))
        if self.error is not None and self.current_epoch == 1:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize("error", [None, RuntimeError("lost"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("module", ["backbone", ["backbone.0", "backbone.1"]])
def test_nothing_stays_behind(error: BaseException | None, module: Any) -> None:
    net = Stopping()
    net.backbone.eval()
    before = anatomy(net)
    net.error = error
    cache = FeatureCache(module)
    run = trainer(callbacks=[cache], max_epochs=3)
    if error is None:
        run.fit(net, loader(), loader())
    else:
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
            run.fit(net, loader(), loader())
    assert anatomy(net) == before
    assert pickle.loads(pickle.dumps(cache)).module == module
    run.validate(net, loader(), verbose=False)
    assert anatomy(net) == before


def test_a_checkpoint_has_nothing_of_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[FeatureCache("backbone")], max_epochs=2, enable_checkpointing=True)
    net = Frozen()
    run.fit(net, loader())
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert torch.load(path, weights_only=True)["state_dict"].keys() == Frozen().state_dict().keys()
    trainer(tmp_path, max_epochs=3).fit(Frozen(), loader(), ckpt_path=path)


def test_a_target_network_moves_all_the_time() -> None:
    """It is frozen and in eval mode, and has other weights after each step."""

    class Student(Net):
        def __init__(self) -> None:
            super().__init__()
            self.target = copy.deepcopy(self.backbone)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, _ = batch
            outputs.append(self.target(x))
            assert torch.equal(outputs[-1], copy.deepcopy(self.target)(x))
            return (self.backbone(x) - outputs[-1]).square().mean() + super().training_step(batch, batch_idx)

    outputs: list[Tensor] = []
    cache = FeatureCache("target")
    trainer(callbacks=[TargetNetwork("backbone", "target", tau=0.1, eval_mode=True), cache]).fit(Student(), loader())
    assert not cache.stats.active


# Folder


def fit_in(folder: Path, *, samples: int = 24, epochs: int = 3, seed: int = 0, **options: Any) -> FeatureCache:
    torch.manual_seed(seed)
    cache = FeatureCache("backbone", storage=folder, **options)
    net = Frozen()
    run = trainer(callbacks=[cache], max_epochs=epochs)
    run.fit(net, loader(samples))
    return cache


def test_a_folder_survives_the_run_and_belongs_to_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    assert fit_in(folder).stats.misses == 24 + 4  # one batch shows that the backbone is not random
    assert fit_in(folder).stats.misses == 4  # one batch shows that what lies there is right
    assert fit_in(folder, seed=1).stats.misses == 24 + 4
    assert fit_in(folder).stats.misses == 4


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "of something else": lambda content: b"dear diary, " * 1000,
    "without its begin": lambda content: content[5:],
    "cut off": lambda content: content[: len(content) // 2],
    "cut off in its first page": lambda content: content[:1000],
    "all zeros": lambda content: bytes(len(content)),
    "zeros behind the first page": lambda content: content[:4096] + bytes(len(content) - 4096),
    "one bit": lambda content: content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:],
    "two pages exchanged": lambda content: (
        content[:8192] + content[-4096:] + content[12288:-4096] + content[8192:12288]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_costs_speed_only(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    fit_in(folder)
    (file,) = folder.glob("*.sqlite")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    results = []
    for callbacks in ([], [FeatureCache("backbone", storage=folder)]):
        torch.manual_seed(0)
        net = Frozen()
        trainer(callbacks=callbacks, max_epochs=3).fit(net, loader(24))
        results.append(net)
    assert torch.equal(torch.stack(results[0].losses), torch.stack(results[1].losses))
    assert moved(snapshot(results[0]), snapshot(results[1])) == set()
    assert fit_in(folder).stats.misses <= 8


def test_a_folder_in_use_or_of_something_else_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "features"

    class Inside(Frozen):
        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            if self.current_epoch == 1:
                with pytest.raises(RuntimeError, match="in use by another run"):
                    fit_in(folder)

    trainer(callbacks=[FeatureCache("backbone", storage=folder)], max_epochs=3).fit(Inside(), loader())
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="no feature store"):
        fit_in(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_max_bytes_holds_for_folders(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    for seed in range(3):
        fit_in(folder, max_bytes=30_000, seed=seed)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 30_000


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"module": 3}, TypeError, 'a dotted name such as "backbone"'),
        ({"module": []}, ValueError, "names nothing"),
        ({"module": ["a", "a"]}, ValueError, "or inside it"),
        ({"module": ["a", "a.b"]}, ValueError, "inside"),
        ({"max_bytes": -1}, ValueError, "at least 1"),
        ({"max_bytes": "1GB"}, TypeError, "a whole number"),
        ({"storage": 3}, TypeError, "a folder"),
        ({"dtype": torch.int8}, ValueError, "float16"),
        ({"dtype": 16}, TypeError, "a dtype"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        FeatureCache(**{"module": "backbone", **arguments})


@pytest.mark.parametrize("module", ["backbon", "", ["backbone.0", "backbone.9"]])
def test_wrong_names_are_errors_at_the_start(module: Any) -> None:
    with pytest.raises(ValueError, match=r"names no module of Frozen(.|\n)*Top-level modules: backbone, neck, head"):
        trainer(callbacks=[FeatureCache(module)]).fit(Frozen(), loader())


def test_a_name_below_a_wrapper_is_suggested() -> None:
    net = Frozen()
    net.wrapper = nn.ModuleDict({"vit": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"Did you mean 'wrapper\.vit'"):
        trainer(callbacks=[FeatureCache("vit")]).fit(net, loader())


def test_containers_that_are_never_called_are_errors_at_the_start() -> None:
    net = Frozen()
    net.experts = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="names a ModuleDict, which is never called"):
        trainer(callbacks=[FeatureCache("experts")]).fit(net, loader())


def test_strings_for_yaml() -> None:
    assert FeatureCache("backbone", dtype="float16").dtype is torch.float16
    assert FeatureCache("backbone", max_bytes=4e9).max_bytes == 4_000_000_000  # type: ignore[arg-type]
    assert FeatureCache("a").state_key != FeatureCache("b").state_key


# Two processes


def train_on_two(folder: Path | None) -> dict[str, Any]:
    results = {}
    for cached in (False, True):
        torch.manual_seed(0)
        net = Frozen()
        cache = FeatureCache("backbone", storage=folder or "memory")
        run = trainer(callbacks=[cache] if cached else [], max_epochs=6, strategy="ddp", devices=2)
        run.fit(net, shuffled(32), loader(8))
        results[f"weights {cached}"] = snapshot(net)
        results[f"losses {cached}"] = torch.stack(net.losses)
    results["hits"], results["misses"] = torch.tensor(cache.stats.hits), torch.tensor(cache.stats.misses)
    results["rank"] = torch.tensor(dist.get_rank())
    return results


@pytest.mark.parametrize("shared", [False, True], ids=["memory", "one folder"])
def test_replicas_have_their_own_store_or_one_folder(shared: bool, tmp_path: Path) -> None:
    results = on_two_processes(train_on_two, tmp_path, tmp_path / "features" if shared else None)
    for result in results:
        assert torch.equal(result["losses False"], result["losses True"])
        assert moved(result["weights False"], result["weights True"]) == set()
        assert result["hits"] > 16
    assert moved(results[0]["weights True"], results[1]["weights True"]) == set()
    if shared:
        assert len(list((tmp_path / "features").glob("*.sqlite"))) == 2


def train_sharded() -> dict[str, Any]:
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Sharded(Frozen):
        def configure_model(self) -> None:
            fully_shard(self.backbone)
            fully_shard(self)

    cache = FeatureCache("backbone")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer(callbacks=[cache], max_epochs=1, strategy=strategy, devices=2).fit(Sharded(), loader(16))
    return {"off": torch.tensor("ModelParallelStrategy" in str(cache.stats.why) and not cache.stats.active)}


@needs_fsdp2
def test_off_with_a_sentence_under_fsdp2(tmp_path: Path) -> None:
    assert all(result["off"] for result in on_two_processes(train_sharded, tmp_path))
