from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch.optim import optimizer

from lightning_freeze.freezing.ledger import _LEDGERS


@pytest.fixture(autouse=True)
def _quiet_and_deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    # Tests of parts may leave hooks around steps; a fit may not.
    optimizer._global_optimizer_pre_hooks.clear()
    optimizer._global_optimizer_post_hooks.clear()
    left = list(_LEDGERS)
    _LEDGERS.clear()
    assert not left, "a fit has left its ledger open"
