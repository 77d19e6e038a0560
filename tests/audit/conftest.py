from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _only_what_it_imports(only_what_it_imports: None) -> None:
    """All tests of the audit ask for it."""
