from __future__ import annotations

import logging
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("before", "level"), [("", logging.INFO), ("WARNING", logging.WARNING)])
def test_log_level_set_before_the_import_is_kept(before: str, level: int) -> None:
    lines = [
        "import logging",
        f"logging.getLogger('lightning_freeze').setLevel({before!r} or 0)",
        "import lightning_freeze.logs",
        "lightning_freeze.logs.get_logger('lightning_freeze.some')",
        "print(logging.getLogger('lightning_freeze').level)",
    ]
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert run.stdout.split() == [str(level)], run.stderr
