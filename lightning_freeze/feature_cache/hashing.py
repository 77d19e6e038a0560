"""Hashes of samples, 128 bits each: xxh3 on the host; on an accelerator multilinear hashing, so that nothing leaves it.

Multilinear hashing with secret random coefficients is strongly universal (Lemire and Kaser, *Strongly universal string
hashing is fast*, 2014): whoever chooses the samples, two of them collide by chance only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from lightning_freeze.tensors import digest, shared_bytes

_BLOCK = 4096  # words that are hashed to four; so long are the coefficients
_AT_ONCE = 1 << 22  # words that are multiplied at once: their products fit into a large card's cache


class Hash:
    """Hashes tensors on the host, with xxh3."""

    def samples(self, columns: Sequence[Tensor], shared: Sequence[Tensor]) -> list[bytes]:
        """Return 16 bytes for each entry along the first dimension of ``columns``, in which ``shared`` counts, too."""
        rows: list[Any] = [shared_bytes(_byte_rows(column).cpu()).reshape(len(column), -1) for column in columns]
        keys = [list(map(xxhash.xxh3_128_digest, row)) for row in rows]
        return joined(keys + [[key] * len(keys[0]) for key in self.tensors(shared)])

    def tensors(self, tensors: Sequence[Tensor]) -> list[bytes]:
        """Return 16 bytes for all that each tensor holds."""
        return list(map(digest, tensors))


class DeviceHash(Hash):
    """Hashes tensors where they lie, by multilinear hashing; its keys are of no use in another process.

    Rows are split into blocks of words of 32 bits; each block becomes four words, one a set of coefficients, and what
    has become of a row's blocks is hashed the same way. Two rows of one length collide by a chance of about 2⁻¹²⁸.
    """

    def __init__(self) -> None:
        self._coefficients: dict[tuple[torch.device, int], Tensor] = {}

    def samples(self, columns: Sequence[Tensor], shared: Sequence[Tensor]) -> list[bytes]:
        """Return 16 bytes for each entry along the first dimension, with one copy to the host."""
        parts = [self._digest(_byte_rows(column)) for column in columns]
        where, size = parts[0].device, len(parts[0])
        parts += [self._digest(_byte_rows(tensor.unsqueeze(0))).expand(size, 4) for tensor in shared]
        words = torch.cat([part.to(where) for part in parts], 1)
        return _as_bytes(words if len(parts) == 1 else self._digest(words.view(torch.uint8)))

    def tensors(self, tensors: Sequence[Tensor]) -> list[bytes]:
        """Return 16 bytes for all that each tensor holds, and its shape and dtype, with one copy to the host."""
        digests = [self._digest(_byte_rows(tensor.detach().unsqueeze(0))) for tensor in tensors]
        found = _as_bytes(torch.cat([one.to(digests[0].device) for one in digests])) if digests else []
        return [key + f"{tuple(t.shape)}{t.dtype}".encode() for key, t in zip(found, tensors, strict=True)]

    def _digest(self, rows: Tensor) -> Tensor:
        """Hash rows of bytes to four words each."""
        missing = -rows.shape[1] % 4
        words = (nn.functional.pad(rows, (0, missing)) if missing else rows).contiguous().view(torch.int32)
        for level in range(8):
            count, length = words.shape
            blocks = max(1, -(-length // _BLOCK))
            each = min(length, _BLOCK)
            words = nn.functional.pad(words, (0, blocks * each - length)).view(count * blocks, each)
            words = self._multilinear(words, level).view(count, 4 * blocks)
            if blocks == 1:
                break
        return words

    def _multilinear(self, words: Tensor, level: int) -> Tensor:
        """Return the upper halves of ``c[0] + c[1] * word[0] + c[2] * word[1] + …`` modulo 2⁶⁴, for four sets of c."""
        place = (words.device, level)
        if place not in self._coefficients:
            secret = torch.frombuffer(bytearray(os.urandom(4 * (_BLOCK + 1) * 8)), dtype=torch.int64)
            self._coefficients[place] = secret.view(4, _BLOCK + 1).to(words.device)
        coefficients, length = self._coefficients[place], words.shape[1]
        found = torch.empty(len(words), 4, dtype=torch.int32, device=words.device)
        step = max(1, _AT_ONCE // max(1, length))
        for start in range(0, len(words), step):
            part = words[start : start + step].to(torch.int64) & 0xFFFFFFFF
            for i, row in enumerate(coefficients):
                found[start : start + step, i] = ((part * row[1 : 1 + length]).sum(1) + row[0]) >> 32
        return found


def joined(columns: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Return one key for each sample, of columns of keys."""
    if len(columns) == 1:
        return list(columns[0])
    return [xxhash.xxh3_128_digest(b"".join(keys)) for keys in zip(*columns, strict=True)]


def _byte_rows(tensor: Tensor) -> Tensor:
    """Return the bytes of each entry along the first dimension, in memory order: uint8 ``(entries, bytes)``."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.is_contiguous():
        strides = plain.stride()
        plain = plain.permute(0, *sorted(range(1, plain.dim()), key=lambda d: -strides[d])).contiguous()
    count = math.prod(plain.shape[1:])
    return plain.as_strided((len(plain), count), (count, 1), plain.storage_offset()).view(torch.uint8)


def _as_bytes(words: Tensor) -> list[bytes]:
    raw = words.cpu().contiguous().numpy().tobytes()
    return [raw[start : start + 16] for start in range(0, len(raw), 16)]
