"""Questions to all processes of one fit; every process has to ask at the same point."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_freeze._lightning import MisconfigurationException, ParallelStrategy, Strategy

T = TypeVar("T")


def from_all(value: T) -> list[T]:
    """Return the values that the processes passed, anything that pickles, in the order of ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def check_agreement(strategy: Strategy, tell: Callable[[], Mapping[str, Any]]) -> None:
    """Refuse ranks that are about to do different things.

    ``tell`` returns what must be the same everywhere, by name; what is compared is its ``repr``. Every rank raises
    if one differs.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return
    facts = tell()
    mine = torch.tensor([_digest(repr(fact)) for fact in facts.values()], device=strategy.root_device)
    greatest, least = strategy.reduce(torch.stack([mine, -mine]), reduce_op="max")
    differ = [name for name, same in zip(facts, (greatest == -least).tolist(), strict=True) if not same]
    if not differ:
        return
    shown = "; ".join(f"{name} = {facts[name]!r}"[:500] for name in differ)
    raise RuntimeError(
        f"The ranks do not agree on the schedule's next phase: they differ in {' and '.join(differ)}. Here, on rank "
        f"{strategy.global_rank} of {strategy.world_size}: {shown}. Every rank needs the same module, the same "
        "schedule and the same number of training batches."
    )


def mean_over_ranks(strategy: Strategy, value: float | None) -> float | None:
    """Return the mean of a value over the ranks that have one, the same on every rank; None if no rank has one."""
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return value
    pair = torch.tensor([0.0 if value is None else value, value is not None], dtype=torch.float64)
    total, count = strategy.reduce(pair.to(strategy.root_device), reduce_op="sum").tolist()
    return total / count if count else None


def greatest(strategy: Strategy, value: int) -> int:
    """Return the greatest of the ranks' values, the same on every rank."""
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return value
    return int(strategy.reduce(torch.tensor(value, device=strategy.root_device), reduce_op="max").item())


def refuse_differences(strategy: Strategy, why: str, **facts: Any) -> None:
    """Refuse ranks that differ before the first batch, as :func:`check_agreement` does, and say why they must not."""
    try:
        check_agreement(strategy, lambda: facts)
    except RuntimeError as error:
        raise MisconfigurationException(f"{why} {error}") from None


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
