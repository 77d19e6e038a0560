"""What the processes of one fit tell each other."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_all(value: T) -> list[T]:
    """Give what each process gave, in the order of ranks; every process has to call it at the same point.

    Args:
        value: Anything that pickles.

    Example:
        >>> from_all("alone")
        ['alone']
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]
