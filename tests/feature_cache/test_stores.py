from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightning_freeze.feature_cache.features import Bytes
from lightning_freeze.feature_cache.stores import Budget, Damaged, Folder, Shelf

LENGTH = 40
PRINT, FORM = b"f" * 16, b"g" * 16


def rows(count: int, seed: int = 0) -> tuple[list[bytes], Bytes]:
    numbers = np.random.default_rng(seed)
    return [numbers.bytes(16) for _ in range(count)], numbers.integers(0, 256, (count, LENGTH), np.uint8)


OPEN: list[Shelf | Folder] = []


@pytest.fixture(autouse=True)
def _close_all() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def shelf_in(path: Path, rank: int = 0, limit: int = 10**7) -> tuple[Shelf, Folder]:
    folder = Folder(path, rank)
    OPEN.append(folder)
    shelf = Shelf(LENGTH, Budget(limit), folder.journal(PRINT, FORM))
    OPEN.append(shelf)
    return shelf, folder


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_come_back_over_many_blocks(on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_freeze.feature_cache.stores._FIRST_BLOCK", 5000)
    keys, content = rows(3000)
    shelf = shelf_in(tmp_path / "s")[0] if on_disk else Shelf(LENGTH, Budget(10**7))
    for start in range(0, 3000, 700):
        assert shelf.put(keys[start : start + 700], start, content[start : start + 700]) == len(
            keys[start : start + 700]
        )
    order = np.random.default_rng(1).permutation(3000)
    slots = shelf.find([keys[i] for i in order])
    assert (shelf.read(slots) == content[order]).all()
    assert (shelf.marks[slots] == order // 700 * 700).all()
    assert shelf.find([b"?" * 16]).tolist() == [-1]


@pytest.mark.parametrize("limit", [1, 1000, 100_000])
def test_a_budget_is_never_exceeded_and_comes_back(limit: int) -> None:
    budget = Budget(limit)
    shelves = [Shelf(LENGTH, budget) for _ in range(3)]
    keys, content = rows(1000)
    kept = [shelf.put(keys, 0, content) for shelf in shelves]
    assert budget.used <= limit
    assert sum(kept) * LENGTH <= limit
    assert sum(kept) >= limit // (LENGTH + 200) - 3
    for shelf in shelves:
        shelf.close()
    assert budget.used == 0


def test_no_memory_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_freeze.feature_cache.stores.available_memory", lambda: 0)
    assert Shelf(LENGTH, Budget(10**9)).put(*_with_mark(*rows(3))) == 0


def test_no_disk_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shelf, _ = shelf_in(tmp_path / "s")
    monkeypatch.setattr("os.posix_fallocate", full)
    assert shelf.put(*_with_mark(*rows(3))) == 0


def _with_mark(keys: list[bytes], content: Bytes) -> tuple[list[bytes], int, Bytes]:
    return keys, 5, content


def test_a_folder_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_freeze.feature_cache.stores._FIRST_BLOCK", 5000)
    keys, content = rows(600)
    for part in (slice(0, 250), slice(250, 600)):
        shelf, folder = shelf_in(tmp_path / "s")
        shelf.put(keys[part], 9, content[part])
        shelf.close()
        folder.close()
        OPEN.clear()
    shelf, _ = shelf_in(tmp_path / "s")
    slots = shelf.find(keys)
    assert (shelf.read(slots) == content).all()
    assert set(shelf.marks[slots].tolist()) == {9}
    assert folder.size() < 600 * (LENGTH + 32) + 200


def written(tmp_path: Path, count: int = 300) -> tuple[list[bytes], Bytes, Path, Path]:
    keys, content = rows(count)
    shelf, folder = shelf_in(tmp_path / "s")
    shelf.put(keys, 9, content)
    shelf.close()
    folder.close()
    OPEN.clear()
    (index,), (data,) = ((tmp_path / "s").rglob(f"*.{kind}") for kind in ("index", "rows"))
    return keys, content, index, data


@pytest.mark.parametrize(
    ("which", "cut"), [("rows", 1), ("rows", 17), ("rows", 5000), ("rows", 10**9), ("index", 300 * 32 + 1)]
)
def test_truncated_files_are_refused(which: str, cut: int, tmp_path: Path) -> None:
    _, _, index, data = written(tmp_path)
    file = index if which == "index" else data
    file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - cut)])
    with pytest.raises(Damaged, match=r"cut off|does not begin"):
        shelf_in(tmp_path / "s")


@pytest.mark.parametrize("cut", [1, 17, 32, 5000, 300 * 32])
def test_an_index_that_ends_in_the_middle_of_an_entry_serves_up_to_there(cut: int, tmp_path: Path) -> None:
    """So it is after a run that was killed, or whose disk was full; what is missing can be added."""
    keys, content, index, _ = written(tmp_path)
    index.write_bytes(index.read_bytes()[:-cut])
    there = 300 - -(-cut // 32)
    for missing in (300 - there, 0):
        shelf, folder = shelf_in(tmp_path / "s")
        slots = shelf.find(keys)
        assert np.count_nonzero(slots < 0) == missing
        assert (shelf.read(slots[slots >= 0]) == content[slots >= 0]).all()
        shelf.put(keys[300 - missing :], 9, content[300 - missing :])
        shelf.close()
        folder.close()
        OPEN.clear()
    assert shelf.damaged == 0


def test_a_foreign_index_is_refused(tmp_path: Path) -> None:
    _, _, index, _ = written(tmp_path)
    index.write_bytes(b"something else, which is longer than a header would be" * 3)
    with pytest.raises(Damaged, match="does not begin"):
        shelf_in(tmp_path / "s")


@pytest.mark.parametrize("which", ["index", "rows"])
def test_one_wrong_bit_costs_that_row_only(which: str, tmp_path: Path) -> None:
    keys, content, index, data = written(tmp_path)
    file = index if which == "index" else data
    raw = bytearray(file.read_bytes())
    raw[-1 if which == "index" else 7 * LENGTH + 3] ^= 1
    file.write_bytes(raw)
    shelf, _ = shelf_in(tmp_path / "s")
    slots = shelf.find(keys)
    (lost,) = np.flatnonzero(slots < 0)
    assert lost == (299 if which == "index" else 7)
    assert shelf.damaged == 1
    good = slots >= 0
    assert (shelf.read(slots[good]) == content[good]).all()


@pytest.mark.parametrize("inside", ["a photo.jpg", "model.ckpt"])
def test_a_folder_of_something_else_is_refused(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).write_text("dear to somebody")
    with pytest.raises(ValueError, match="no feature store"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        Folder(tmp_path / inside)
    assert [path.name for path in tmp_path.iterdir()] == [inside]


def _try(path: Path, queue: multiprocessing.Queue[str]) -> None:
    try:
        Folder(path)
        queue.put("got it")
    except RuntimeError as error:
        queue.put(str(error))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "s")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_try, args=(tmp_path / "s", queue))
    process.start()
    assert "in use by another run" in queue.get(timeout=60)
    process.join(60)
    with pytest.raises(RuntimeError, match="in use"):
        Folder(tmp_path / "s")
    folder.close()
    Folder(tmp_path / "s").close()


def test_ranks_see_each_others_rows(tmp_path: Path) -> None:
    keys, content = rows(400)
    (one, _), (two, _) = shelf_in(tmp_path / "s", 0), shelf_in(tmp_path / "s", 1)
    one.put(keys[:100], 1, content[:100])
    two.put(keys[100:200], 2, content[100:200])
    assert (two.find(keys[:100]) == -1).all()
    for shelf in (one, two, one):
        shelf.refresh()
    one.put(keys[200:], 3, content[200:])
    one.refresh()
    two.refresh()
    for shelf in (one, two):
        slots = shelf.find(keys)
        assert (shelf.read(slots) == content).all()
        assert shelf.damaged == 0


@pytest.mark.parametrize("act", ["put", "close", "discard", "open"])
def test_whoever_has_lost_its_folder_leaves_the_next_one_alone(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody removes the folder of a run, and another run makes one of the same name, for the same features."""
    monkeypatch.setattr("lightning_freeze.feature_cache.stores._FIRST_BLOCK", 5000)
    keys, content = rows(900)
    first, folder = shelf_in(tmp_path / "s")
    first.put(keys[:50], 1, content[:50])
    shutil.rmtree(tmp_path / "s")
    second, _ = shelf_in(tmp_path / "s")
    second.put(keys[300:], 2, content[300:])
    if act == "put":
        assert first.put(keys[50:300], 1, content[50:300]) < 250
        assert isinstance(first.error, FileNotFoundError)
        assert (first.read(first.find(keys[:50])) == content[:50]).all()
    elif act == "open":
        with pytest.raises(FileNotFoundError):
            Shelf(LENGTH, Budget(10**7), folder.journal(PRINT, b"h" * 16))
    else:
        getattr(first, act)()
    assert (second.read(second.find(keys[300:])) == content[300:]).all()
    (index,), (data,) = ((tmp_path / "s").rglob(f"*.{kind}") for kind in ("index", "rows"))
    assert index.stat().st_size == 44 + 600 * 32
    assert data.stat().st_size >= 600 * LENGTH
