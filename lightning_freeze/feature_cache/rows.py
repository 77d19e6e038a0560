"""Rows of bytes under keys of samples, in memory: on the device they come from within a budget, then on the host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_KEY_BYTES = 300  # what a key and its entry take in memory, about
_FIRST_BLOCK, _FEWEST_ROWS, _MOST_ROWS, _GROWTH = 4 << 20, 8, 4096, 4
_SHARE_OF_DEVICE = 4  # a quarter of the device's memory that is free when the first rows are kept


class Entry(NamedTuple):
    """A row that is there.

    Args:
        batch: A number of the batch in which it was computed; its upper 32 bits say in which fit.
        place: Of its sample in that batch.
        size: Of that batch.
        where: For the rows to find it.
    """

    batch: int
    place: int
    size: int
    where: Any


class Rows(Protocol):
    """Where rows are kept: in memory, or in a folder."""

    error: str | None  # why nothing is kept any more
    remedy: str  # what would make room, beside a larger budget

    @property
    def count(self) -> int: ...  # noqa: D102
    @property
    def bytes_taken(self) -> int: ...  # noqa: D102
    def find(self, family: bytes, samples: Sequence[bytes], size: int, row_bytes: int) -> list[Entry | None]: ...  # noqa: D102
    def read(self, entries: Sequence[Entry], device: torch.device) -> Tensor: ...  # noqa: D102
    def put(self, family: bytes, samples: Sequence[bytes], batch: int, rows: Tensor, new: Sequence[int]) -> int: ...  # noqa: D102
    def ban(self, family: bytes, origin: int) -> None: ...  # noqa: D102
    def forget(self, family: bytes) -> None: ...  # noqa: D102
    def end_epoch(self) -> None: ...  # noqa: D102


class MemoryRows:
    """Rows in blocks that never move, so that nothing is copied twice and no budget is exceeded on the way.

    Args:
        limit: The most bytes to take.

    Example:
        >>> rows = MemoryRows(100_000)
        >>> rows.put(b"net", [b"first", b"second"], 7, torch.arange(8, dtype=torch.uint8).view(2, 4), [0, 1])
        2
        >>> entries = rows.find(b"net", [b"second", b"third"], 2, 4)
        >>> entries[0].batch, entries[1], rows.read(entries[:1], torch.device("cpu"))
        (7, None, tensor([[4, 5, 6, 7]], dtype=torch.uint8))
    """

    error: str | None = None
    remedy = "or dtype=torch.float16,"

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self._tables: dict[tuple[bytes, int], _Table] = {}
        self._device_left: dict[torch.device, int] = {}
        self._asked: set[tuple[bytes, int]] = set()
        self._idle: set[tuple[bytes, int]] = set()

    @property
    def count(self) -> int:
        """The number of rows."""
        return sum(len(table.index) for table in self._tables.values())

    @property
    def bytes_taken(self) -> int:
        """The bytes that rows and their keys take."""
        return sum(len(table.index) * (table.row_bytes + _KEY_BYTES) for table in self._tables.values())

    def find(self, family: bytes, samples: Sequence[bytes], size: int, row_bytes: int) -> list[Entry | None]:
        """Return the entries of samples that were computed in batches of one size."""
        table = self._tables.get((family, size))
        if table is None or table.row_bytes != row_bytes:
            return [None] * len(samples)
        self._asked.add((family, size))
        self._idle.discard((family, size))
        return list(map(table.index.get, samples))

    def read(self, entries: Sequence[Entry], device: torch.device) -> Tensor:
        """Return rows, uint8 of shape ``(entries, row_bytes)``."""
        blocks = {id(entry.where[0]): entry.where[0] for entry in entries}
        if len(blocks) == 1:
            (block,) = blocks.values()
            return _pick(block, [entry.where[1] for entry in entries], device)
        rows = torch.empty(len(entries), entries[0].where[0].shape[1], dtype=torch.uint8, device=device)
        for key, block in blocks.items():
            places = [i for i, entry in enumerate(entries) if id(entry.where[0]) == key]
            picked = _pick(block, [entries[i].where[1] for i in places], device)
            rows[_index(places, device)] = picked
        return rows

    def put(self, family: bytes, samples: Sequence[bytes], batch: int, rows: Tensor, new: Sequence[int]) -> int:
        """Keep the rows at ``new`` of a whole batch; return for how many there is room."""
        size, row_bytes = rows.shape
        table = self._tables.setdefault((family, size), _Table(row_bytes))
        self._asked.add((family, size))
        kept = 0
        while kept < len(new) and (block := self._room(table, rows.device)) is not None:
            part = new[kept : kept + len(block) - table.filled]
            block[table.filled : table.filled + len(part)] = rows if len(part) == size else rows[part]
            for slot, i in enumerate(part, table.filled):
                table.index[samples[i]] = Entry(batch, i, size, (block, slot))
            table.filled += len(part)
            kept += len(part)
        return kept

    def ban(self, family: bytes, origin: int) -> None:
        """Forget the rows of one fit."""
        for key, table in self._tables.items():
            if key[0] == family:
                table.index = {k: entry for k, entry in table.index.items() if entry.batch >> 32 != origin}

    def clear(self) -> None:
        """Forget all rows."""
        self._tables.clear()
        self._device_left.clear()
        self.taken = 0

    def forget(self, family: bytes) -> None:
        """Free the memory of one family."""
        for key in [key for key in self._tables if key[0] == family]:
            self._drop(key)

    def end_epoch(self) -> None:
        """Note which rows nobody has asked for: they make room for others."""
        self._idle, self._asked = self._tables.keys() - self._asked, set()

    def _drop(self, key: tuple[bytes, int]) -> None:
        table = self._tables.pop(key)
        self.taken -= sum(len(block) for block in table.blocks) * (table.row_bytes + _KEY_BYTES)
        for block in table.blocks:
            if block.device in self._device_left:
                self._device_left[block.device] += block.nbytes

    def _room(self, table: _Table, device: torch.device) -> Tensor | None:
        """Return a block with room for a row, None if there is none."""
        if table.blocks and table.filled < len(table.blocks[-1]):
            return table.blocks[-1]
        each = table.row_bytes + _KEY_BYTES
        first = min(max(_FIRST_BLOCK // each, _FEWEST_ROWS), _MOST_ROWS)
        wanted = first * _GROWTH ** min(len(table.blocks), 8)
        while (left := (self.limit - self.taken) // each) < _FEWEST_ROWS and self._idle:
            self._drop(self._idle.pop())
        count = min(wanted, max(left // _GROWTH, _FEWEST_ROWS), left, available_memory() // 2 // each)
        try:
            block = self._block(count, table.row_bytes, device) if count > 0 else None
        except (MemoryError, RuntimeError):  # the host has less than it says
            block = None
        if block is not None:
            table.blocks.append(block)
            table.filled = 0
            self.taken += count * each
        return block

    @torch.inference_mode(False)  # it serves in training, too
    def _block(self, count: int, row_bytes: int, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return torch.empty(count, row_bytes, dtype=torch.uint8, device=device)
        if device not in self._device_left:
            self._device_left[device] = torch.cuda.mem_get_info(device)[0] // _SHARE_OF_DEVICE
        if self._device_left[device] < count * row_bytes:
            return torch.empty(count, row_bytes, dtype=torch.uint8, pin_memory=True)
        self._device_left[device] -= count * row_bytes
        return torch.empty(count, row_bytes, dtype=torch.uint8, device=device)


class _Table:
    """The rows of samples that were computed in batches of one size."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.index: dict[bytes, Entry] = {}
        self.blocks: list[Tensor] = []
        self.filled = 0  # rows of the last block


def _pick(block: Tensor, slots: list[int], device: torch.device) -> Tensor:
    if device.type == "cpu":
        # Not index_select, whose threads wait for each other longer than the copy takes.
        return torch.from_numpy(block.numpy().take(slots, axis=0))
    if block.device == device:
        return block.index_select(0, _index(slots, device))
    picked = torch.empty(len(slots), block.shape[1], dtype=torch.uint8, pin_memory=block.is_pinned())
    return torch.index_select(block, 0, torch.tensor(slots), out=picked).to(device, non_blocking=True)


def _index(places: list[int], device: torch.device) -> Tensor:
    """Return places as an index, without a wait for the device."""
    return torch.tensor(places, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def available_memory() -> int:
    """Return the bytes of memory that this process can still take, as the system and its container see it.

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
