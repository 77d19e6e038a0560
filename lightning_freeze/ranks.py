"""Questions to all processes of one fit; every process has to ask at the same point."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat, TypeVar

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
    if _is_alone(strategy):
        return
    facts = tell()
    digests = {name: hashlib.blake2b(repr(fact).encode(), digest_size=8).digest() for name, fact in facts.items()}
    ranks = from_all(digests)
    if differ := [name for name in facts if any(rank[name] != digests[name] for rank in ranks)]:
        shown = "; ".join(f"{name} = {facts[name]!r}"[:500] for name in differ)
        raise RuntimeError(
            f"The ranks do not agree on the schedule's next phase: they differ in {' and '.join(differ)}. Here, on "
            f"rank {dist.get_rank()} of {len(ranks)}: {shown}. Every rank needs the same module, the same "
            "schedule and the same number of training batches."
        )


def refuse_differences(strategy: Strategy, why: str, **facts: Any) -> None:
    """Refuse ranks that differ before the first batch, as :func:`check_agreement` does, and say why they must not."""
    try:
        check_agreement(strategy, lambda: facts)
    except RuntimeError as error:
        raise MisconfigurationException(f"{why} {error}") from None


def mean_over_ranks(strategy: Strategy, value: SupportsFloat | None) -> float | None:
    """Return the mean of a value over the ranks that have one, the same on every rank; None if no rank has one."""
    mine = None if value is None else float(value)
    values = [one for one in ([mine] if _is_alone(strategy) else from_all(mine)) if one is not None]
    return sum(values) / len(values) if values else None


def greatest(strategy: Strategy, value: int) -> int:
    """Return the greatest of the ranks' values, the same on every rank."""
    if _is_alone(strategy):
        return value
    # Not by `from_all`: where a function may end a phase, every step asks.
    return int(strategy.reduce(torch.tensor(value, device=strategy.root_device), reduce_op="max").item())


def _is_alone(strategy: Strategy) -> bool:
    return not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1
