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
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    hooks = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    left = [hook for hooks_of in hooks for hook in hooks_of.values()]
    for hooks_of in hooks:
        hooks_of.clear()
    assert not left, f"hooks around every optimizer's step stayed behind: {left}"
