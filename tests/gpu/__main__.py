"""Runs all checks of this folder on a GPU, then the benchmarks, within eight minutes; prints a summary.

``make gpu``, or ``python -m tests.gpu`` in the repository's root. It needs torch, Lightning, torchmetrics, numpy and
xxhash, and downloads and installs nothing; two of the benchmarks need torchvision. ``LF_DEVICE=cpu`` runs what a CPU
can.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

DEVICE = os.environ.get("LF_DEVICE", "cuda")
SECONDS = float(os.environ.get("LF_SECONDS", "470"))  # for all, so that it ends before eight minutes
ROOT = Path(__file__).parents[2]
# Each in a process of its own: an error on a GPU takes the process with it.
GROUPS = {
    "laws": "tests.gpu.laws",
    "others": "tests.gpu.others",
}
NEEDS = ("torch", "lightning", "torchmetrics", "numpy", "xxhash")
# Name, what it needs, seconds at most, and its arguments.
BENCHMARKS = [
    ("norms", (), 60, ["--repetitions", "11", "--rounds", "3"]),
    ("frozen_step", ("torchvision",), 60, ["--repetitions", "5"]),
    ("overhead", (), 60, ["--quick", "--repetitions", "3"]),
    ("feature_cache", ("torchvision",), 150, ["--rounds", "2", "--batches", "8"]),
]


def absent(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def run(command: list[str], seconds: float) -> tuple[int, list[str]]:
    """Run a command, print its lines as they come, and return its code and lines; it is stopped after its time."""
    environment = os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic algorithms ask for
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    stop = threading.Timer(max(seconds, 1), process.kill)
    stop.start()
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    stop.cancel()
    return process.wait(), lines


def check_group(name: str) -> int:
    """Run a group's checks in this process; a line for each."""
    import logging
    import warnings

    import torch

    from tests.gpu.fits import NotHereError

    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning_freeze"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    failed = 0
    for check, function in importlib.import_module(GROUPS[name]).CHECKS.items():
        began = time.monotonic()
        try:
            verdict, note = "pass", function(DEVICE) or ""
        except NotHereError as reason:
            verdict, note = "skip", str(reason)
        except Exception as error:
            verdict, note = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            failed += 1
        print(f"{verdict}  {check}  ({time.monotonic() - began:.1f} s)  {note}".rstrip(), flush=True)
    return 1 if failed else 0


def machine() -> str:
    import torch

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in NEEDS)
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    return f"{card}; Python {sys.version.split()[0]}, {versions}"


def main() -> int:
    began = time.monotonic()
    if missing := absent(NEEDS):
        print(f"It needs {', '.join(NEEDS)}; not installed: {', '.join(missing)}.")
        return 2
    import torch

    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here. LF_DEVICE=cpu make gpu runs what a CPU can.")
        return 2
    print(machine(), flush=True)
    lines: list[str] = []
    failed = []

    def left() -> float:
        return SECONDS - (time.monotonic() - began)

    for group in GROUPS:
        code, own = run([sys.executable, "-m", "tests.gpu", group], left())
        lines += [line for line in own if line.startswith(("pass  ", "skip  ", "FAIL  "))]
        if code:
            failed.append(group if code > 0 else f"{group} (stopped, out of time)")
    for name, needs, seconds, options in BENCHMARKS:
        reason = f"needs {', '.join(absent(needs))}" if absent(needs) else "the time is up" if left() < 15 else ""
        if reason or DEVICE != "cuda":
            print(f"\nbenchmarks/{name}.py: not run, {reason or 'its figures are for a GPU'}", flush=True)
            continue
        print(f"\nbenchmarks/{name}.py --device {DEVICE} {' '.join(options)}", flush=True)
        command = [sys.executable, f"benchmarks/{name}.py", "--device", DEVICE, *options]
        code, _ = run(command, min(seconds, left()))
        if code:
            failed.append(f"benchmarks/{name}.py" + ("" if code > 0 else " (stopped, out of time)"))
    counts = {verdict: sum(line.startswith(verdict) for line in lines) for verdict in ("pass", "FAIL", "skip")}
    print(f"\n{machine()}\nafter {time.monotonic() - began:.0f} s:")
    for line in lines:
        if not line.startswith("pass"):
            print(line)
    print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
    if failed:
        print(f"did not end well: {', '.join(failed)}")
    return 1 if failed or counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(check_group(sys.argv[1]) if len(sys.argv) > 1 else main())
