"""Rows of bytes under keys of samples, in memory: on the device they come from within a budget, then on the host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_freeze.tensors import shared_bytes

_KEY_BYTES = 300  # what a key and its entry take in memory, about
_FIRST_BLOCK, _FEWEST_ROWS = 4 << 20, 8
_SHARE = 4  # of the device's memory that is free at first, and of what is left, a block takes at most a quarter


class Entry(NamedTuple):
    """A row that is there: the batch in which it was computed, and the place of its sample."""

    batch: int  # a number
    place: int
    size: int
    where: Any  # for the rows to find it

    @property
    def fit(self) -> int:
        """The fit in which it was computed."""
        return self.batch >> 32


class MemoryRows:
    """Rows in blocks that never move, so that nothing is copied twice and no budget is exceeded on the way."""

    error = None  # it is there as long as the process
    remedy = "or dtype=torch.float16,"

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self._tables: dict[tuple[bytes, int], _Table] = {}
        self._device_left: dict[torch.device, int] = {}
        self._epoch = 0

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
        table.epoch = self._epoch
        return list(map(table.index.get, samples))

    def read(self, entries: Sequence[Entry], device: torch.device) -> Tensor:
        """Return rows, uint8 of shape ``(entries, row_bytes)``."""
        if all(type(block) is np.ndarray for _, _, _, (block, _) in entries):
            found = np.concatenate([block[slot] for _, _, _, (block, slot) in entries])
            return _moved(torch.from_numpy(found).view(len(entries), -1), device)
        rows = torch.empty(len(entries), entries[0].where[0].shape[1], dtype=torch.uint8, device=device)
        for block in {id(entry.where[0]): entry.where[0] for entry in entries}.values():
            places = [i for i, entry in enumerate(entries) if entry.where[0] is block]
            slots: Any = [entries[i].where[1] for i in places]
            if isinstance(block, Tensor):
                picked = block[_moved(torch.tensor(slots), block.device)]
            else:
                picked = _moved(torch.from_numpy(block[slots]), device)
            rows[_moved(torch.tensor(places), device)] = picked
        return rows

    def put(self, family: bytes, samples: Sequence[bytes], batch: int, rows: Tensor, new: Sequence[int]) -> int:
        """Keep the rows at ``new`` of a whole batch; return for how many there is room."""
        size, row_bytes = rows.shape
        table = self._tables.setdefault((family, size), _Table(row_bytes))
        table.epoch = self._epoch
        kept = 0
        while kept < len(new) and (block := self._room(table, rows.device)) is not None:
            part = new[kept : kept + len(block) - table.filled]
            values: Any = rows if len(part) == size else rows[part]
            if not isinstance(block, Tensor):
                values = shared_bytes(values.cpu()).reshape(len(part), row_bytes)
            block[table.filled : table.filled + len(part)] = values
            for slot, i in enumerate(part, table.filled):
                table.index[samples[i]] = Entry(batch, i, size, (block, slot))
            table.filled += len(part)
            kept += len(part)
        return kept

    def free(self, family: bytes) -> None:
        """Free the memory of one family."""
        for key in [key for key in self._tables if key[0] == family]:
            self._drop(key)

    def end_epoch(self) -> None:
        """Note that an epoch is over: rows that nobody asks for in the next one make room for others."""
        self._epoch += 1

    def _drop(self, key: tuple[bytes, int]) -> None:
        table = self._tables.pop(key)
        self.taken -= sum(len(block) for block in table.blocks) * (table.row_bytes + _KEY_BYTES)
        for block in table.blocks:
            if isinstance(block, Tensor):
                self._device_left[block.device] += block.nbytes

    def _room(self, table: _Table, device: torch.device) -> Any:
        """Return a block with room for a row, None if there is none."""
        if table.blocks and table.filled < len(table.blocks[-1]):
            return table.blocks[-1]
        each = table.row_bytes + _KEY_BYTES
        if (self.limit - self.taken) // each < _FEWEST_ROWS:
            for key in [key for key, other in self._tables.items() if other.epoch < self._epoch - 1]:
                self._drop(key)
        left = (self.limit - self.taken) // each
        count = min(max(_FIRST_BLOCK // each, 3 * len(table.index)), max(left // _SHARE, _FEWEST_ROWS), left)
        if count <= 0:
            return None
        table.blocks.append(self._block(count, table.row_bytes, device))
        table.filled = 0
        self.taken += count * each
        return table.blocks[-1]

    def _block(self, count: int, row_bytes: int, device: torch.device) -> Any:
        """Return an array on the host, or a tensor where there is room on the device."""
        left = 0
        if device.type == "cuda":
            left = self._device_left.setdefault(device, torch.cuda.mem_get_info(device)[0] // _SHARE)
        if left < count * row_bytes:
            return np.empty((count, row_bytes), np.uint8)
        self._device_left[device] = left - count * row_bytes
        with torch.inference_mode(False):  # it serves in training, too
            return torch.empty(count, row_bytes, dtype=torch.uint8, device=device)


class _Table:
    """The rows of samples that were computed in batches of one size."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes, self.epoch = row_bytes, 0
        self.index: dict[bytes, Entry] = {}
        self.blocks: list[Any] = []
        self.filled = 0  # rows of the last block


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without a wait for the device."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def available_memory() -> int:
    """Return the bytes of memory that this process can still take, as the system and its container see it."""
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
