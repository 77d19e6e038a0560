"""Rows in a folder: SQLite, one file a rank, each row with a checksum; ranks read each other's files."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lightning_freeze.feature_cache.rows import Entry
from lightning_freeze.tensors import shared_bytes

_PAGE = 4096
_SETUP = f"""
PRAGMA page_size = {_PAGE};
PRAGMA journal_mode = TRUNCATE;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, batch INTEGER, place INTEGER, row BLOB, checksum BLOB);
"""
_FIND = "SELECT key, batch, place, row, checksum FROM rows WHERE key = ?"
_BESIDE = 150  # bytes that a row takes in the file beside its content, about


class FolderRows:
    """Rows in a folder that one run uses at a time; what other runs have left there is checked before it serves.

    The run keeps a write transaction open, which SQLite grants to one process a file, also after a run was killed. The
    folder grows to ``max_bytes``; by default all ranks may use half of what is free without it.
    """

    remedy = "dtype=torch.float16, or removing features of other weights from the folder"

    def __init__(self, path: Path, rank: int = 0, *, max_bytes: int | None = None, ranks: int = 1) -> None:
        self.path, self.count = path, 0
        self.error: str | None = None  # why nothing is written any more
        self._file = path / f"features-{rank}.sqlite"
        self._others: dict[Path, sqlite3.Connection] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not all(file.name.startswith("features-") and ".sqlite" in file.name for file in path.iterdir()):
                raise ValueError(
                    f'storage="{path}" holds something that is no feature store. Name a folder of its own.'
                )
            self._own = self._open()
        except (OSError, sqlite3.OperationalError) as error:
            if "locked" in str(error):
                raise RuntimeError(
                    f'storage="{path}" is in use by another run or FeatureCache. Wait for it, or name another folder.'
                ) from None
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f'storage="{path}" cannot be used: {why}. Name a folder that can be made and written to.'
            ) from error
        there = self.bytes_taken
        half = (shutil.disk_usage(path).free + there) // 2
        self._room = max_bytes - there if max_bytes is not None else (half - there) // ranks
        self._room += self._own_size()

    @property
    def bytes_taken(self) -> int:
        """The bytes that lie in the folder."""
        size = 0
        for path in self.path.glob("*"):
            with suppress(OSError):  # removed meanwhile
                size += path.stat().st_size
        return size

    def find(self, family: bytes, samples: Sequence[bytes], size: int, row_bytes: int) -> list[Entry | None]:
        """Return the entries of samples that were computed in batches of one size."""
        keys = [_key(family, sample, size) for sample in samples]
        found: dict[bytes, Entry] = {}
        for connection in (self._own, *self._others.values()):
            try:
                lines = [line for key in keys for line in connection.execute(_FIND, (key,)).fetchall()]
            except sqlite3.OperationalError:  # somebody is writing there right now
                continue
            except sqlite3.DatabaseError:
                if connection is self._own:
                    self._own = self._anew(connection)
                continue
            for key, batch, place, row, checksum in lines:
                if len(row) == row_bytes and checksum == _checksum(key, batch, place, row):
                    found.setdefault(key, Entry(batch, place, size, row))
        return list(map(found.get, keys))

    def read(self, entries: Sequence[Entry], device: torch.device) -> Tensor:
        """Return rows, uint8 of shape ``(entries, row_bytes)``."""
        content = bytearray(b"".join(entry.where for entry in entries))
        return torch.frombuffer(content, dtype=torch.uint8).view(len(entries), -1).to(device)

    def put(self, family: bytes, samples: Sequence[bytes], batch: int, rows: Tensor, new: Sequence[int]) -> int:
        """Keep the rows at ``new`` of a whole batch; return for how many there is room."""
        if self.error is not None:
            return len(new)
        size, each = rows.shape
        kept = new[: max(0, self._room - self._own_size() - 2 * _PAGE) // (each + _BESIDE)]
        content, lines = shared_bytes(rows.cpu()), []
        for i in kept:
            row, key = content[i * each : (i + 1) * each].tobytes(), _key(family, samples[i], size)
            lines.append((key, batch, i, row, _checksum(key, batch, i, row)))
        try:
            self._own.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", lines)
            self._own.execute("COMMIT")
            self._own.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self.error = str(error)
            with suppress(sqlite3.Error):
                self._own.rollback()
        self.count += len(kept)
        return len(kept)

    def free(self, family: bytes) -> None:
        """Leave the rows of one family for later runs."""

    def end_epoch(self) -> None:
        """Look for files of other ranks."""
        for path in self.path.glob("features-*.sqlite"):
            if path != self._file and path not in self._others:
                with suppress(sqlite3.Error):
                    self._others[path] = _connect(path)

    def close(self) -> None:
        """Let others use the folder."""
        for connection in (*self._others.values(), self._own):
            with suppress(sqlite3.Error):
                connection.commit()
            connection.close()

    def _open(self) -> sqlite3.Connection:
        self._file.touch()
        connection = _connect(self._file)
        try:
            connection.executescript(_SETUP)
            connection.execute("BEGIN IMMEDIATE")
            self.count = connection.execute("SELECT COUNT(*) FROM rows").fetchone()[0]
        except sqlite3.OperationalError as error:
            if "full" not in str(error) and "I/O" not in str(error):
                raise
            self.error = str(error)
        except sqlite3.DatabaseError:  # not of SQLite, or cut off
            return self._anew(connection)
        return connection

    def _anew(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """Make a damaged file anew."""
        connection.close()
        for name in (self._file, Path(f"{self._file}-journal")):
            name.unlink(missing_ok=True)
        return self._open()

    def _own_size(self) -> int:
        with suppress(sqlite3.Error):
            return int(self._own.execute("PRAGMA page_count").fetchone()[0]) * _PAGE
        return 0


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0, isolation_level=None)


def _key(family: bytes, sample: bytes, size: int) -> bytes:
    return family + size.to_bytes(4, "big") + sample


def _checksum(key: bytes, batch: int, place: int, row: bytes) -> bytes:
    return xxhash.xxh3_64_digest(b"%b%d %d " % (key, batch, place) + row)
