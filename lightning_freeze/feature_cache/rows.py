"""Rows of bytes under keys of samples, in memory: on the device they come from within a budget, then on the host."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_freeze.tensors import shared_bytes

_KEY_BYTES = 300  # what a key and its entry take in memory, about
_SHARE = 4  # of the device's memory that is free at first, rows take at most a quarter


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
    """Rows that stay where they are put, so that nothing is copied twice and no budget is exceeded on the way."""

    error = None  # it is there as long as the process
    remedy = "or dtype=torch.float16,"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tables: dict[tuple[bytes, int, int], _Table] = {}
        self._device_left: dict[torch.device, int] = {}
        self._epoch = 0

    @property
    def count(self) -> int:
        """The number of rows."""
        return sum(len(table.index) for table in self._tables.values())

    @property
    def bytes_taken(self) -> int:
        """The bytes that rows and their keys take."""
        return sum(table.taken for table in self._tables.values())

    def find(self, family: bytes, samples: Sequence[bytes], size: int, row_bytes: int) -> list[Entry | None]:
        """Return the entries of samples that were computed in batches of one size."""
        table = self._tables.get((family, size, row_bytes))
        if table is None:
            return [None] * len(samples)
        table.epoch = self._epoch
        return list(map(table.index.get, samples))

    def read(self, entries: Sequence[Entry], device: torch.device) -> Tensor:
        """Return rows, uint8 of shape ``(entries, row_bytes)``."""
        found = [entry.where for entry in entries]
        if arrays := [row for row in found if type(row) is np.ndarray]:
            on_host = _moved(torch.from_numpy(np.concatenate(arrays)).view(len(arrays), -1), device)
            if len(arrays) == len(found):
                return on_host
            rest = iter(on_host)
            found = [row if isinstance(row, Tensor) else next(rest) for row in found]
        return torch.cat(found).view(len(found), -1)

    def put(self, family: bytes, samples: Sequence[bytes], batch: int, rows: Tensor, new: Sequence[int]) -> int:
        """Keep the rows at ``new`` of a whole batch; return for how many there is room."""
        size, row_bytes = rows.shape
        each = row_bytes + _KEY_BYTES
        if self.limit - self.bytes_taken < len(new) * each:
            for key in [key for key, table in self._tables.items() if table.epoch < self._epoch - 1]:
                self._drop(key)
        kept = new[: (self.limit - self.bytes_taken) // each]
        table = self._tables.setdefault((family, size, row_bytes), _Table())
        table.epoch = self._epoch
        table.taken += len(kept) * each
        with torch.inference_mode(False):  # they serve in training, too
            placed = self._placed(rows[kept])
        for i, row in zip(kept, placed, strict=True):
            table.index[samples[i]] = Entry(batch, i, size, row)
        return len(kept)

    def free(self, family: bytes) -> None:
        """Free the memory of one family."""
        for key in [key for key in self._tables if key[0] == family]:
            self._drop(key)

    def end_epoch(self) -> None:
        """Note that an epoch is over: rows that nobody asks for in the next one make room for others."""
        self._epoch += 1

    def _drop(self, key: tuple[bytes, int, int]) -> None:
        for entry in self._tables.pop(key).index.values():
            if isinstance(entry.where, Tensor):
                self._device_left[entry.where.device] += entry.where.nbytes

    def _placed(self, rows: Tensor) -> Iterable[Any]:
        """Return rows one by one: on their device while there is room, then as arrays on the host."""
        device = rows.device
        if device.type == "cuda":
            left = self._device_left.setdefault(device, torch.cuda.mem_get_info(device)[0] // _SHARE)
            if rows.nbytes <= left:
                self._device_left[device] = left - rows.nbytes
                return rows.unbind()
        return shared_bytes(rows.cpu()).reshape(rows.shape)


@dataclass
class _Table:
    """The rows of samples that were computed in batches of one size."""

    epoch: int = 0  # in which somebody asked for one
    taken: int = 0  # bytes
    index: dict[bytes, Entry] = field(default_factory=dict)


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
