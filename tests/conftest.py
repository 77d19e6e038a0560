from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.optim import optimizer


@pytest.fixture(autouse=True)
def _quiet_and_deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_freeze").setLevel(logging.INFO)  # the main jobs are quiet
    torch.default_generator.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    left = [*optimizer._global_optimizer_pre_hooks.values(), *optimizer._global_optimizer_post_hooks.values()]
    optimizer._global_optimizer_pre_hooks.clear()
    optimizer._global_optimizer_post_hooks.clear()
    assert not left, "a fit has left its hooks around steps"


@pytest.fixture(scope="module")
def only_what_it_imports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Modules of other tests are not loaded: an audit searches all modules of the user, as often as it is asked."""
    own = {request.module.__name__, *(getattr(thing, "__module__", "") for thing in vars(request.module).values())}
    others = {name: sys.modules[name] for name in list(sys.modules) if name.startswith("tests.") and ".test_" in name}
    others = {name: module for name, module in others.items() if name not in own}
    for name in others:
        del sys.modules[name]
    yield
    sys.modules.update(others)
