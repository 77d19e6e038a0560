from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from lightning_freeze import FreezeSchedule, GradientAudit, Phase
from tests.nets import Net, loader, trainer
from tests.replicas import WORLD, on_two_processes


def lines_of_a_fit() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning_freeze").addHandler(handler)
    callbacks = [FreezeSchedule([Phase("head", epochs=1), Phase("*")]), GradientAudit()]
    trainer(strategy="ddp", devices=WORLD, callbacks=callbacks, max_epochs=2).fit(Net(), loader())
    return lines


def test_lines_of_two_processes_come_once(tmp_path: Path) -> None:
    zero, one = on_two_processes(lines_of_a_fit, tmp_path)
    assert [line.partition(" ")[0] for line in zero] == ["phase", "phase", "audit:"]
    assert one == []


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
    printed = [run.communicate(timeout=120) for run in runs]
    assert [out.split() for out, _ in printed] == [[str(logging.INFO)], [str(logging.WARNING)]], printed
