from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch.optim import optimizer


@pytest.fixture(autouse=True)
def _quiet_and_deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_freeze").setLevel(logging.INFO)  # the main jobs are quiet
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    left = [*optimizer._global_optimizer_pre_hooks.values(), *optimizer._global_optimizer_post_hooks.values()]
    optimizer._global_optimizer_pre_hooks.clear()
    optimizer._global_optimizer_post_hooks.clear()
    assert not left, "a fit has left its hooks around steps"
