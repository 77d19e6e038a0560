"""Runs the matrix and writes docs/compatibility.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.compatibility.render import render
from tests.compatibility.tasks import run_all

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "compatibility.jsonl", help="goes on with it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="rows that contain this, such as 'optimizer|timm'")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = run_all(options.results, options.jobs, options.only)
    if not options.only:
        (ROOT / "docs" / "compatibility.md").write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
