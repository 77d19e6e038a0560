"""The checks of ``make gpu``, on the device that ``LF_DEVICE`` names: by default those that a CPU can run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu import laws, others
from tests.gpu.fits import NotHereError

DEVICE = os.environ.get("LF_DEVICE", "cpu")
SAMPLE = ("float32: ", "16-mixed, an optimizer at rest: ", "state offloaded: ", "FSDP", "Feature", "waits")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # else DDP sets threads, and sums of more are others
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if dist.is_initialized():  # Lightning leaves it, and the metrics of other tests would meet in it
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, id=name, marks=[] if name.startswith(SAMPLE) else [pytest.mark.slow])
        for name, check in {**laws.CHECKS, **others.CHECKS}.items()
    ],
)
def test_on_the_device(name: str, check: Callable[[str], Any]) -> None:
    try:
        check(DEVICE)
    except NotHereError as reason:
        pytest.skip(str(reason))
