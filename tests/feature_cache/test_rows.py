"""Rows in memory, and in a folder: what comes back is what was kept, within a budget, whatever lies there."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_freeze.feature_cache.folder import FolderRows
from lightning_freeze.feature_cache.rows import MemoryRows

LENGTH, NET, CPU = 40, b"n" * 16, torch.device("cpu")
Rows = MemoryRows | FolderRows


def content(count: int, seed: int = 0) -> tuple[list[bytes], Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    keys = torch.randint(256, (count, 16), dtype=torch.uint8, generator=numbers)
    return [row.numpy().tobytes() for row in keys], torch.randint(
        256, (count, LENGTH), dtype=torch.uint8, generator=numbers
    )


def folder_in(path: Path, rank: int = 0) -> FolderRows:
    return FolderRows(path, rank, max_bytes=10**8)


def fill(rows: Rows, keys: list[bytes], values: Tensor, *, batch: int = 7, size: int = 50) -> int:
    kept = 0
    for start in range(0, len(keys), size):
        part = values[start : start + size]
        kept += rows.put(NET, keys[start : start + size], batch + start, part, list(range(len(part))))
    return kept


@pytest.fixture(params=["memory", "folder"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rows]:
    found = MemoryRows(10**8) if request.param == "memory" else folder_in(tmp_path / "s")
    yield found
    if isinstance(found, FolderRows):
        found.close()


def test_rows_of_many_batches_come_back_in_any_order(rows: Rows) -> None:
    keys, values = content(1000)
    assert fill(rows, keys, values) == 1000
    order = torch.randperm(1000).tolist()
    found = rows.find(NET, [keys[i] for i in order], 50, LENGTH)
    assert torch.equal(rows.read([entry for entry in found if entry is not None], CPU), values[order])
    assert [(entry.batch, entry.place) for entry in found if entry] == [(7 + i // 50 * 50, i % 50) for i in order]
    assert rows.count == 1000


def test_what_is_other_in_any_way_is_not_found(rows: Rows) -> None:
    keys, values = content(50)
    fill(rows, keys, values)
    assert rows.find(NET, [b"?" * 16], 50, LENGTH) == [None]
    assert rows.find(b"m" * 16, keys, 50, LENGTH) == [None] * 50
    assert rows.find(NET, keys, 49, LENGTH) == [None] * 50
    assert rows.find(NET, keys, 50, LENGTH + 1) == [None] * 50


@pytest.mark.parametrize("limit", [1, 3000, 100_000])
def test_a_budget_is_never_exceeded_and_comes_back(limit: int) -> None:
    rows = MemoryRows(limit)
    kept = 0
    for name in (b"a" * 16, b"b" * 16, b"c" * 16):
        keys, values = content(100)
        kept += rows.put(name, keys, 1, values, list(range(100)))
        assert rows.bytes_taken <= limit
    assert kept >= 0.8 * min(300, limit // (LENGTH + 300) - 3)
    for name in (b"a" * 16, b"b" * 16, b"c" * 16):
        rows.free(name)
    assert (rows.bytes_taken, rows.count) == (0, 0)


def test_what_nobody_asks_for_makes_room() -> None:
    rows = MemoryRows(20_000)
    keys, values = content(50)
    assert fill(rows, keys, values) == 50
    assert rows.put(b"m" * 16, keys, 1, values, list(range(50))) < 50
    for _ in range(2):
        rows.end_epoch()
        rows.find(b"m" * 16, keys, 50, LENGTH)
    assert rows.put(b"o" * 16, keys, 1, values, list(range(50))) > 0
    assert rows.find(NET, keys, 50, LENGTH) == [None] * 50
    assert any(rows.find(b"m" * 16, keys, 50, LENGTH))


def test_rows_that_were_kept_in_inference_mode_serve_in_training() -> None:
    rows = MemoryRows(10**6)
    keys, values = content(8)
    with torch.inference_mode():
        fill(rows, keys[:4], values[:4], size=8)
    fill(rows, keys[4:], values[4:], size=8)
    found = [entry for size in (4,) for entry in rows.find(NET, keys, size, LENGTH) if entry is not None]
    assert len(found) == 8
    assert not rows.read(found, CPU).is_inference()


def test_rows_of_one_batch_may_lie_on_a_device_and_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a device's share is used up; here both are the host's, one as on a device."""
    rows, on_host = MemoryRows(10**6), MemoryRows._placed
    rows._device_left[CPU] = 0
    monkeypatch.setattr(rows, "_placed", lambda new: new.unbind() if new[0, 0] > 99 else on_host(rows, new))
    keys, values = content(1000)
    assert fill(rows, keys, values) == 1000
    order = torch.randperm(1000).tolist()
    found = [entry for entry in rows.find(NET, [keys[i] for i in order], 50, LENGTH) if entry is not None]
    assert len({type(entry.where) for entry in found}) == 2
    assert torch.equal(rows.read(found, CPU), values[order])
    rows.free(NET)
    assert rows.bytes_taken == 0
    assert rows._device_left[CPU] > 0


# Folders


def test_one_wrong_bit_costs_that_row_only(tmp_path: Path) -> None:
    keys, values = content(200)
    rows = folder_in(tmp_path / "s")
    fill(rows, keys, values)
    rows.close()
    with sqlite3.connect(tmp_path / "s" / "features-0.sqlite") as file:
        file.execute("UPDATE rows SET row = zeroblob(length(row)) WHERE batch = 57 AND place = 3")
        file.execute("UPDATE rows SET place = 9 WHERE batch = 57 AND place = 4")
        file.execute(
            "UPDATE rows SET key = ? WHERE batch = 57 AND place = 5", (NET + (50).to_bytes(4, "big") + b"k" * 16,)
        )
    file.close()
    rows = folder_in(tmp_path / "s")
    found = rows.find(NET, [*keys, b"k" * 16], 50, LENGTH)
    assert [i for i, entry in enumerate(found) if entry is None] == [53, 54, 55, 200]
    good = [i for i in range(200) if found[i] is not None]
    assert torch.equal(rows.read([entry for entry in found if entry is not None], CPU), values[good])
    assert rows.put(NET, keys[50:100], 1, values[50:100], [3, 4, 5]) == 3
    assert None not in rows.find(NET, keys, 50, LENGTH)
    rows.close()


def _try(path: Path, queue: multiprocessing.Queue[str]) -> None:
    try:
        FolderRows(path)
        queue.put("got it")
    except RuntimeError as error:
        queue.put(str(error))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    rows = folder_in(tmp_path / "s")
    fill(rows, *content(50))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.nets"])
    queue = context.Queue()
    process = context.Process(target=_try, args=(tmp_path / "s", queue))
    process.start()
    assert "in use by another run" in queue.get(timeout=60)
    process.join(60)
    rows.close()
    FolderRows(tmp_path / "s").close()


def test_ranks_see_each_others_rows(tmp_path: Path) -> None:
    keys, values = content(100)
    one, two = folder_in(tmp_path / "s", 0), folder_in(tmp_path / "s", 1)
    fill(one, keys[:50], values[:50])
    fill(two, keys[50:], values[50:])
    assert two.find(NET, keys[:50], 50, LENGTH) == [None] * 50
    for rows in (one, two):
        rows.end_epoch()
        found = rows.find(NET, keys, 50, LENGTH)
        assert torch.equal(rows.read([entry for entry in found if entry is not None], CPU), values)
    for rows in (one, two):
        rows.close()


def test_whoever_has_lost_its_folder_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """Somebody removes the folder of a run, and another run makes one of the same name."""
    keys, values = content(150)
    first = folder_in(tmp_path / "s")
    fill(first, keys[:50], values[:50])
    shutil.rmtree(tmp_path / "s")
    second = folder_in(tmp_path / "s")
    fill(second, keys[100:], values[100:])
    fill(first, keys[50:100], values[50:100])
    assert first.error is not None
    found = first.find(NET, keys[:50], 50, LENGTH)
    assert torch.equal(first.read([entry for entry in found if entry is not None], CPU), values[:50])
    first.close()
    found = second.find(NET, keys, 50, LENGTH)
    assert [entry is not None for entry in found] == [False] * 100 + [True] * 50
    second.close()
