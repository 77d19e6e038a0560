"""A build of torch without ``torch.distributed``, as there are for Windows and Jetson."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Hides what this torch has: its C functions, and the modules that were imported with them.
HIDE = """
import sys, torch
for name in [name for name in vars(torch._C) if name.startswith(("_c10d_init", "_rpc_init", "_dist_autograd_init"))]:
    delattr(torch._C, name)
for name in [name for name in sys.modules if name.startswith(("torch.distributed", "torch.nn.parallel"))]:
    del sys.modules[name]
sys.modules["torch._C._distributed_c10d"] = None
import torch.distributed.rpc
assert not torch.distributed.is_available()
"""
FIT = """
from pathlib import Path
from tests.main_job import Jobs
jobs = Jobs("lightning.pytorch", Path("."))
jobs.what_unfreezes_trains()
jobs.the_audit_finds_nothing_where_nothing_is()
jobs.norms_are_logged()
print("trained")
"""


def test_a_torch_without_distributed_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{HIDE}{FIT}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=tmp_path, check=False)
    assert done.stdout.endswith("trained\n"), done.stderr
