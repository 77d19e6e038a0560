from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def _only_what_tests_make_is_searched() -> Iterator[None]:
    """Each audit looks through all living objects; those of the imported libraries are half of the time of a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
