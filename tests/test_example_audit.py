"""The example runs as a script, finds its four mistakes, and has none left after the fixes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_audit_example_finds_four_mistakes_and_none_after_the_fixes(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "audit.py"), "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("After the fixes:")
    assert "audit: 10 findings" in before
    for where, what in [
        ("backbone.1.running_mean", "running statistics or another buffer of a frozen module that moved"),
        ("gate.weight", "trainable, but it gets no gradient"),
        ("self.losses[0]", "keeps a graph alive between steps"),
        ("temperature", "trainable, but in no optimizer"),
    ]:
        assert any(where in line and what[:20] in line for line in before.splitlines()), where
    assert ".detach() at" in before
    assert "examples/audit.py:" in before
    assert "audit: no finding in" in after
    assert not list(tmp_path.iterdir())
