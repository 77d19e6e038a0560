from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# Also for processes that tests start: threads that wait for each other keep all cores busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Nothing that an import makes is garbage, and to look for some takes a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True)
def _quiet_and_deterministic() -> Iterator[None]:
    import torch  # not above: of several processes the first runs no tests
    from torch.optim import optimizer

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
