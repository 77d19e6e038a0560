from __future__ import annotations

import logging
import subprocess
import sys


def test_log_level_set_before_the_import_is_kept() -> None:
    runs = []
    for before in ("", "WARNING"):
        lines = [
            "import logging",
            f"logging.getLogger('lightning_freeze').setLevel({before!r} or 0)",
            "import lightning_freeze.logs",
            "lightning_freeze.logs.get_logger('lightning_freeze.some')",
            "print(logging.getLogger('lightning_freeze').level)",
        ]
        command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    printed = [run.communicate(timeout=500) for run in runs]
    assert [out.split() for out, _ in printed] == [[str(logging.INFO)], [str(logging.WARNING)]], printed
