"""What happens to the folder of a FeatureCache from outside does not end a fit, and changes no bit of it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from lightning_freeze import FeatureCache
from lightning_freeze.feature_cache.folder import FolderRows
from tests.feature_cache.test_callback import Frozen
from tests.nets import Probe, loader, moved, snapshot, trainer
from tests.replicas import on_two_processes

resource = pytest.importorskip("resource")


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_freeze")


class Narrow(Frozen):
    """Its features are narrower than their entries in the index, so that it is the index that outgrows a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 1, 5), nn.ReLU()).requires_grad_(False)
        self.neck = nn.Linear(1, 4)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system refuses to make a file longer, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fit(make: type[Frozen], callbacks: list[Any], samples: int = 24, epochs: int = 4, batch_size: int = 4) -> Frozen:
    torch.manual_seed(0)
    net = make()
    trainer(callbacks=callbacks, max_epochs=epochs).fit(net, loader(samples, batch_size))
    return net


def check_same(one: Frozen, other: Frozen) -> None:
    assert torch.equal(torch.stack(one.losses), torch.stack(other.losses))
    assert moved(snapshot(one), snapshot(other)) == set()


def sentences(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("FeatureCache")]


# A full disk


@pytest.mark.parametrize("end", [0, 30, 10_000, 50_000, 90_000])
def test_a_full_disk_costs_speed_only(end: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All rows would take about 200 kB."""
    options: dict[str, Any] = {"samples": 1024, "epochs": 3, "batch_size": 64}
    plain = fit(Narrow, [], **options)
    cache = FeatureCache("backbone", storage=tmp_path / "features")
    with files_end_at(end):
        cached = fit(Narrow, [cache], **options)
    check_same(plain, cached)
    said = [sentence for sentence in sentences(caplog) if "cannot be written to" in sentence]
    assert len(said) == 1
    if end >= 50_000:
        assert cache.stats.hits > end // 1000
    else:
        assert "off, because the folder cannot be written to" in said[0]
    again = FeatureCache("backbone", storage=tmp_path / "features")
    check_same(plain, fit(Narrow, [again], **options))
    assert "refused" not in caplog.text
    assert again.stats.hits >= 1024


def test_a_folder_full_of_features_of_other_weights_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in (1, 0):
        torch.manual_seed(seed)
        net = Frozen()
        cache = FeatureCache("backbone", storage=tmp_path / "features", max_bytes=40_000)
        trainer(callbacks=[cache]).fit(net, loader())
    (said,) = (sentence for sentence in sentences(caplog) if "the cache is full" in sentence)
    assert "or removing features of other weights from the folder would make room" in said


# Another place


def at_step(step: int, do: Callable[[], Any]) -> Probe:
    return Probe(lambda trainer, _: do() if trainer.global_step == step else None)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_a_relative_folder_stays_where_it_is_when_the_user_moves(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    plain = fit(Frozen, [])
    cache = FeatureCache("backbone", storage="features")
    move = at_step(step, lambda: monkeypatch.chdir(tmp_path / "elsewhere"))
    check_same(plain, fit(Frozen, [cache, move]))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert cache.stats.hits > 24
    misses = cache.stats.misses
    fit(Frozen, [cache])
    assert cache.stats.misses == misses + 4  # it finds its folder from elsewhere, too


def test_no_name_is_no_folder() -> None:
    with pytest.raises(ValueError, match=r'storage=""'):
        FeatureCache("backbone", storage="")


def test_a_folder_can_be_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fit(Frozen, [FeatureCache("backbone", storage="~/features")])
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert list((tmp_path / "home" / "features").glob("*.sqlite"))


# A folder that is gone


@pytest.mark.parametrize(("step", "make"), [(0, Frozen), (3, Frozen), (3, Narrow), (6, Frozen), (23, Narrow)])
def test_a_folder_can_be_removed_in_mid_fit(
    step: int, make: type[Frozen], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "features"
    plain = fit(make, [])
    cache = FeatureCache("backbone", storage=folder)
    check_same(plain, fit(make, [cache, at_step(step, lambda: shutil.rmtree(folder))]))
    said = [sentence for sentence in sentences(caplog) if "cannot be written to" in sentence]
    assert len(said) == (step < 6)  # there is nothing to write after that
    assert cache.stats.hits > 0 or step < 6 or make is Narrow
    assert not folder.exists()
    fit(make, [cache])
    assert len(list(folder.glob("*.sqlite"))) == 1


def test_a_default_room_does_not_count_what_lies_there_twice(tmp_path: Path) -> None:
    """Half of what is free and of what lies there, which is what was free before, for all ranks together."""
    (tmp_path / "features").mkdir()
    with (tmp_path / "features" / "features-7.sqlite").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 200_000_000)
    free = shutil.disk_usage(tmp_path).free
    for ranks in (1, 2):
        folder = FolderRows(tmp_path / "features", ranks=ranks)
        expected = (free // 2 - 100_000_000) // ranks
        assert abs(folder._room - expected) < 50_000_000  # others use the disk meanwhile
        folder.close()
    folder = FolderRows(tmp_path / "features", max_bytes=300_000_000, ranks=2)
    assert folder._room <= 100_000_000
    folder.close()


# Runs that are killed


def fit_and_be_killed(folder: Path, step: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cache = FeatureCache("backbone", storage=folder, **options)
    kill = at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    trainer(callbacks=[cache, kill], max_epochs=4).fit(Frozen(), loader())


def be_killed(folder: Path, step: int, **options: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.nets"])
    process = context.Process(target=fit_and_be_killed, args=(folder, step, options))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("step", [3, 8])
def test_the_run_after_one_that_was_killed(step: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    be_killed(tmp_path / "features", step)
    cache = FeatureCache("backbone", storage=tmp_path / "features")
    check_same(fit(Frozen, []), fit(Frozen, [cache]))
    assert "refused" not in caplog.text
    assert cache.stats.misses <= 24 - 4 * min(step, 6) + 8  # one batch or two show that what was there is right


# Two processes


def train_on_two(folder: Path, kill: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Frozen()
    cache = FeatureCache("backbone", storage=folder)
    probes = []
    if kill and os.environ["RANK"] == "1":
        probes.append(at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    plain = Frozen()
    plain.load_state_dict(net.state_dict())
    for one, callbacks in ((plain, []), (net, [cache, *probes])):
        trainer(callbacks=callbacks, max_epochs=4, strategy="ddp", devices=2).fit(one, loader(32))
    check_same(plain, net)
    return {"misses": torch.tensor(cache.stats.misses)}


def test_one_of_two_ranks_is_killed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        on_two_processes(train_on_two, tmp_path / "one", tmp_path / "features", True)
    results = on_two_processes(train_on_two, tmp_path / "two", tmp_path / "features", False)
    for result in results:
        assert result["misses"] <= 8


# Folders that cannot be


@pytest.mark.parametrize("name", ["file", "file/below", "link", "n" * 300])
def test_a_folder_that_cannot_be_is_an_error_at_the_start(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"cannot be used: .*Name a folder that can be made and written to"):
        fit(Frozen, [FeatureCache("backbone", storage=tmp_path / name)])
