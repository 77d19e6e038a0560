"""Starts the processes that benchmarks of several devices need: on this machine, known to each other through gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

WORLD = 2


def on_two_processes(function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """Call ``function(*args)`` in both at once and give both results.

    Args:
        function: A function of a module's top level; it returns plain data and tensors.
        *args: Its arguments, the same for both.
        seconds: After this long both are killed.

    Raises:
        TimeoutError: If they have not ended by then.
        ProcessRaisedException: If one of them raises.
    """
    # The server imports once what takes long to import.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["lightning.pytorch", "lightning_freeze"])
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _work, (function, folder, args), nprocs=WORLD, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} has not ended after {seconds:.0f} s.")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _work(rank: int, function: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What torchrun sets: it makes Lightning take part instead of starting processes of its own.
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "benchmark", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def trainer(**options: Any) -> Trainer:
    """Return a quiet Trainer that takes part in both processes."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": WORLD,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **options})


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows, the first of which is the heading, in columns as wide as they need to be."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip())
