"""Rows of bytes under 128-bit keys, in memory or in a folder.

What a :class:`Shelf` finds in a folder, from an earlier run or another rank, is checked row by row before it is used.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import repeat, starmap
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lightning_freeze.feature_cache.features import Bytes

Slots: TypeAlias = NDArray[np.int64]

_FIRST_BLOCK = 4 << 20  # bytes, within bounds that keep rows from being many blocks or one block from being large
_FEWEST_ROWS, _MOST_ROWS = 8, 4096
_GROWTH = 4
_ZEROS = 1 << 20
_MARK = "lightning-freeze-features"
_LOCK = "lock-"
_MAGIC = b"lightning-freeze features 1\n"
_HEADER = struct.Struct(f"<{len(_MAGIC)}sQ8s")  # magic, bytes of a row, checksum of both
_ENTRY = struct.Struct("<16sQ8s")  # key, mark, checksum of both and the row
_KEY_BYTES = 200  # what a key, its slot and its place in a dictionary take in memory, about


class Damaged(ValueError):  # noqa: N818 - says what is wrong with a file
    """Says why files in a folder are not used."""


class Budget:
    """Bytes that may be taken, over all shelves.

    Args:
        limit: The number of bytes.

    Example:
        >>> budget = Budget(100)
        >>> budget.take(60), budget.take(60), budget.used
        (True, False, 60)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return self.limit - self.used

    def take(self, count: int) -> bool:
        """Take ``count`` bytes if as many are left."""
        if count > self.left:
            return False
        self.used += count
        return True


class Shelf:
    """Rows of one length, each under a key and with a mark that says in what circumstances it was computed.

    Memory is taken in blocks that grow and never move, so that nothing is copied and no budget is exceeded on the way.

    Args:
        row_bytes: The length of a row, at least 1.
        budget: Where memory is taken from, or space on disk.
        journal: Where the rows live on disk; None for memory.

    Raises:
        Damaged: If the journal's files are not what a shelf left there.

    Example:
        >>> shelf = Shelf(4, Budget(2000))
        >>> shelf.put([b"k" * 16], 8, np.arange(4, dtype=np.uint8)[None])
        1
        >>> slots = shelf.find([b"k" * 16, b"l" * 16])
        >>> slots, shelf.read(slots[:1]), shelf.marks[slots[:1]]
        (array([ 0, -1]), array([[0, 1, 2, 3]], dtype=uint8), array([8], dtype=uint64))
    """

    def __init__(self, row_bytes: int, budget: Budget, journal: Journal | None = None) -> None:
        self.row_bytes = row_bytes
        self.marks: NDArray[np.uint64] = np.empty(0, np.uint64)
        self.damaged = 0
        self.error: OSError | None = None  # what the disk has refused to do; no more rows are taken after that
        self._budget = budget
        self._journal = journal
        self._slots: dict[bytes, int] = {}
        self._blocks: list[Bytes] = []
        self._starts: list[int] = [0]
        self._unchecked: dict[int, bytes] = {}
        # The block that is being filled: its first slot, the next one, its end, and slots less places in the file.
        self._open_rows: Bytes = np.empty((0, row_bytes), np.uint8)
        self._open_start = self._next = self._end = self._offset = 0
        self._taken = 0
        self._each = row_bytes + (_KEY_BYTES if journal is None else _ENTRY.size)
        if journal is not None:
            entries = journal.open(row_bytes)
            budget.used -= journal.trim(len(entries) * row_bytes)
            if entries:
                self._add_block(journal.map(0, len(entries), row_bytes))
                self._next = self._end = len(entries)
                self._enter(0, entries)
            self.refresh()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def size(self) -> int:
        """The bytes that its rows and their keys take."""
        return len(self._slots) * self._each

    def find(self, keys: Sequence[bytes]) -> Slots:
        """Give the slot of each key, -1 for those that are not there or whose row fails its check."""
        slots = np.fromiter(map(self._slots.get, keys, repeat(-1)), np.int64, len(keys))
        if self._unchecked:
            for i, slot in enumerate(slots.tolist()):
                if slot in self._unchecked and not self._check(keys[i], slot):
                    slots[i] = -1
        return slots

    def put(self, keys: Sequence[bytes], mark: int, rows: Bytes) -> int:
        """Keep rows under keys that are not there; give for how many there was room."""
        entries = []
        for key, row in zip(keys, rows, strict=True):
            if not self._has_room():
                break
            slot = self._slots[key] = self._next
            self._next += 1
            self._open_rows[slot - self._open_start] = row
            self.marks[slot] = mark
            entries.append((key, mark, b"" if self._journal is None else _checksum(key, mark, row)))
        if self._journal is not None and entries:
            try:
                self._journal.write(self._next + self._offset - len(entries), entries)
            except OSError as error:
                self.error = error
        return len(entries)

    def read(self, slots: Slots, out: Bytes | None = None) -> Bytes:
        """Copy rows into ``out``, uint8 of shape ``(len(slots), row_bytes)``."""
        if out is None:
            out = np.empty((len(slots), self.row_bytes), np.uint8)
        if len(self._blocks) == 1:
            return self._blocks[0].take(slots, axis=0, out=out, mode="clip")
        blocks = np.searchsorted(self._starts, slots, side="right") - 1
        for block in np.unique(blocks):
            here = blocks == block
            out[here] = self._blocks[block][slots[here] - self._starts[block]]
        return out

    def refresh(self) -> None:
        """Let other ranks see the rows of this one, and see theirs."""
        if self._journal is None:
            return
        for entries, rows in self._journal.read_others(self.row_bytes):
            self._add_block(rows)
            self._enter(self._starts[-2], entries)

    def close(self) -> None:
        """Give the memory back; on disk, leave the rows."""
        self._blocks.clear()
        self._slots.clear()
        self._open_rows = self._open_rows[:0]
        if self._journal is not None:
            try:
                self._journal.trim((self._next + self._offset) * self.row_bytes)
            except OSError as error:
                self.error = error
            self._taken = (self._end - self._next) * self._each  # what was reserved and not used
        self._budget.used -= self._taken

    def discard(self) -> None:
        """Give the memory back, and remove the rows from the disk."""
        self.close()
        if self._journal is not None:
            with suppress(OSError):
                self._journal.delete()

    def _add_block(self, rows: Bytes) -> None:
        self._blocks.append(rows)
        self._starts.append(self._starts[-1] + len(rows))
        self.marks = np.concatenate([self.marks, np.zeros(len(rows), np.uint64)])

    def _enter(self, start: int, entries: Sequence[tuple[bytes, int, bytes]]) -> None:
        for slot, (key, mark, checksum) in enumerate(entries, start):
            if key not in self._slots:
                self._slots[key] = slot
                self.marks[slot] = mark
                self._unchecked[slot] = checksum

    def _check(self, key: bytes, slot: int) -> bool:
        if _checksum(key, int(self.marks[slot]), self.read(np.array([slot]))) == self._unchecked.pop(slot):
            return True
        self.damaged += 1
        del self._slots[key]
        return False

    def _has_room(self) -> bool:
        """Make room for one more row if there is none."""
        if self.error is not None:
            return False
        if self._next < self._end:
            return True
        first = min(max(_FIRST_BLOCK // self._each, _FEWEST_ROWS), _MOST_ROWS)
        rows = min(first * _GROWTH ** min(len(self._blocks), 8), self._budget.left // self._each)
        if rows > 0 and self._journal is None:
            rows = min(rows, available_memory() // 2 // self._each)
        if rows < 1:
            return False
        start = self._next + self._offset
        try:
            block = (
                np.empty((rows, self.row_bytes), np.uint8)
                if self._journal is None
                else self._journal.reserve(start, rows, self.row_bytes)
            )
        except MemoryError:
            return False
        except OSError as error:
            self.error = error
            return False
        self._budget.take(rows * self._each)
        self._taken += rows * self._each
        self._add_block(block)
        self._open_rows, self._open_start, self._next, self._end = block, self._starts[-2], *self._starts[-2:]
        self._offset = start - self._open_start
        return True


class Journal:
    """The two files of a shelf: ``.rows`` is mapped into memory, ``.index`` has an entry with a checksum for each row.

    Args:
        folder: Where they lie.
        name: What they are called, the same for all ranks.
        rank: Whose they are; those of other ranks are only read.
        check: Raises an OSError if the folder is no longer this run's.
    """

    def __init__(self, folder: Path, name: str, rank: int, check: Callable[[], None]) -> None:
        self._check = check
        self._path = folder / f"{name}-{rank}"
        self._others = f"{name}-*.index"
        self._seen: dict[Path, int] = {}

    def open(self, row_bytes: int) -> list[tuple[bytes, int, bytes]]:
        """Give ``(key, mark, checksum)`` of each row that an earlier run left.

        Raises:
            Damaged: If the files are not such a pair, or rows are missing.
            OSError: If there are none and none can be made.
        """
        self._check()
        rows, index = self._files(self._path)
        if not index.exists():
            index.parent.mkdir(exist_ok=True)  # not the folder itself: somebody has removed it
            try:
                rows.write_bytes(b"")
                index.write_bytes(_header(row_bytes))
            except OSError:
                self.delete()
                raise
        return _read_index(index, rows, row_bytes)

    def trim(self, used_bytes: int) -> int:
        """Give space back that was reserved and is not used, also by a run that was killed; give how much that is."""
        self._check()
        rows, _ = self._files(self._path)
        spare = rows.stat().st_size - used_bytes
        os.truncate(rows, used_bytes)
        return spare

    def map(self, start: int, count: int, row_bytes: int, *, path: Path | None = None) -> Bytes:
        """Map rows that are in the file; to be written only if they are this rank's own.

        Raises:
            OSError: If the system refuses to.
        """
        rows, _ = self._files(path or self._path)
        try:
            # np.memmap would keep a file open for each block, and a process may open few.
            mapped = torch.from_file(str(rows), shared=True, size=(start + count) * row_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error)) from error
        return mapped.numpy()[start * row_bytes :].reshape(count, row_bytes)

    def reserve(self, start: int, count: int, row_bytes: int) -> Bytes:
        """Map more rows, from row ``start`` on.

        Raises:
            OSError: If the disk has no room for them.
        """
        self._check()
        with self._files(self._path)[0].open("r+b") as file:
            _fill(file, start * row_bytes, count * row_bytes)
        return self.map(start, count, row_bytes)

    def read_others(self, row_bytes: int) -> list[tuple[list[tuple[bytes, int, bytes]], Bytes]]:
        """Give the rows that other ranks have written since the last time, with their entries."""
        found = []
        for index in sorted(self._path.parent.glob(self._others)):
            path = index.with_suffix("")
            if path == self._path:
                continue
            seen = self._seen.get(path, 0)
            try:
                entries = _read_index(index, self._files(path)[0], row_bytes)
                if len(entries) > seen:
                    found.append((entries[seen:], self.map(seen, len(entries) - seen, row_bytes, path=path)))
            except (Damaged, OSError):  # or removed meanwhile
                continue
            self._seen[path] = len(entries)
        return found

    def write(self, at: int, entries: Sequence[tuple[bytes, int, bytes]]) -> None:
        """Write the entries of rows, from row ``at`` on.

        Raises:
            OSError: If the disk has no room for them, or the file is gone.
        """
        self._check()
        with self._files(self._path)[1].open("r+b") as file:
            file.seek(_HEADER.size + at * _ENTRY.size)
            file.write(b"".join(starmap(_ENTRY.pack, entries)))

    def delete(self) -> None:
        """Remove the files."""
        self._check()
        for file in self._files(self._path):
            file.unlink(missing_ok=True)

    @staticmethod
    def _files(path: Path) -> tuple[Path, Path]:
        return path.with_suffix(".rows"), path.with_suffix(".index")


class Folder:
    """A folder of journals that one run uses at a time, each rank with files of its own.

    Args:
        path: The folder; it is made if there is none.
        rank: Of this process.

    Raises:
        ValueError: If the folder holds something else, or cannot be made or written to.
        RuntimeError: If another run uses it.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self._rank = rank
        try:
            self._open()
        except OSError as error:
            raise ValueError(
                f'storage="{path}" cannot be used: {error.strerror}. Name a folder that can be made and written to.'
            ) from error

    def journal(self, fingerprint: bytes, form: bytes) -> Journal:
        """Give the journal for modules of one fingerprint and arguments of one form."""
        return Journal(self.path / fingerprint.hex(), form.hex(), self._rank, self._check)

    def size(self) -> int:
        """Give the bytes that lie in the folder."""
        size = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with suppress(OSError):  # removed meanwhile
                    size += os.stat(os.path.join(folder, name)).st_size
        return size

    def close(self) -> None:
        """Let others use it."""
        self._mark.close()
        self._lock.release()

    def _check(self) -> None:
        """Refuse a folder that has been removed, also if another run has made one of the same name since."""
        if not os.path.samestat(os.fstat(self._mark.fileno()), os.stat(self.path / _MARK)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def _open(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f'storage="{path}" is a file. Name a folder.')
        if path.exists() and not (path / _MARK).exists() and not all(map(_is_ours, path.iterdir())):
            raise ValueError(f'storage="{path}" holds something that is no feature store. Name a folder of its own.')
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / f"{_LOCK}{self._rank}")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f'storage="{path}" is in use by another run or FeatureCache. Wait for it, or name another folder.'
            ) from None
        self._mark = (path / _MARK).open("ab")


def available_memory() -> int:
    """Give the bytes of memory that this process can still take, as the system and its container see it.

    Example:
        >>> available_memory() > 1_000_000
        True
    """
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        limits += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(limits)) if limits else 4 << 30


def _is_ours(path: Path) -> bool:
    return path.name == _MARK or path.name.startswith(_LOCK)


def _header(row_bytes: int) -> bytes:
    checksum = xxhash.xxh3_64_digest(_MAGIC + row_bytes.to_bytes(8, "little"))
    return _HEADER.pack(_MAGIC, row_bytes, checksum)


def _read_index(index: Path, rows: Path, row_bytes: int) -> list[tuple[bytes, int, bytes]]:
    content = index.read_bytes()
    if content[: _HEADER.size] != _header(row_bytes):
        raise Damaged(f"{index} does not begin as a feature store of rows of {row_bytes} bytes does")
    # The last entry is cut off while it is being written, and stays so where a disk is full.
    count = (len(content) - _HEADER.size) // _ENTRY.size
    found = list(_ENTRY.iter_unpack(content[_HEADER.size :][: count * _ENTRY.size]))
    if not rows.exists() or rows.stat().st_size < count * row_bytes:
        raise Damaged(f"{rows} is cut off")
    return found


def _checksum(key: bytes, mark: int, row: Bytes) -> bytes:
    state = xxhash.xxh3_64(key + mark.to_bytes(8, "little"))
    state.update(np.ascontiguousarray(row))  # type: ignore[arg-type]  # any buffer will do
    return state.digest()


def _fill(file: BinaryIO, start: int, count: int) -> None:
    """Reserve disk space: a mapped file with holes would end the process, not raise, when the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, count)
        return
    file.seek(start)
    for done in range(0, count, _ZEROS):
        file.write(bytes(min(_ZEROS, count - done)))
