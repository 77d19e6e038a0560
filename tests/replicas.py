"""Runs a function in two processes that know each other through gloo."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
SECONDS = 500  # also on a busy machine


def on_two_processes(function: Callable[..., Any], tmp_path: Path, *args: Any) -> list[Any]:
    """Call ``function(*args)`` in both and give both results; what it returns has to be plain data and tensors."""
    # The server imports once what every process needs.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.nets"])
    context = torch.multiprocessing.start_processes(
        _work, (function, tmp_path, args), nprocs=WORLD, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} has not ended after {SECONDS} s.")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _work(rank: int, function: Callable[..., Any], tmp_path: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What torchrun sets: it makes Lightning take part instead of starting processes of its own.
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=rank, world_size=WORLD)
    # The group ends with the process: destroying one, torch 2.6 may wait forever for a thread that waits for the GIL.
    torch.save(function(*args), tmp_path / f"result-{rank}.pt")
