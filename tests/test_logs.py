from __future__ import annotations

import io
import logging
import runpy
import sys
from pathlib import Path

import pytest

from lightning_freeze import FreezeSchedule, GradientAudit, Phase, logs
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


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_log_level_set_before_the_import_is_kept(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    package = logging.getLogger("lightning_freeze")
    monkeypatch.setattr(package, "level", level)
    monkeypatch.setattr(package, "handlers", [])
    runpy.run_path(logs.__file__)
    assert package.level == (level or logging.INFO)


def test_lines_are_printed_unless_the_user_has_configured_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    package, stream = logging.getLogger("lightning_freeze"), io.StringIO()
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(sys, "stderr", stream)
    log = runpy.run_path(logs.__file__)["get_logger"]("lightning_freeze.some")
    for handlers in ([], [logging.NullHandler()]):
        monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
        log.warning("%d of the user's", len(handlers))
    assert stream.getvalue() == "0 of the user's\n"
