"""Which source files are the user's own, and which belong to a library."""

from __future__ import annotations

import inspect
import os
import site
import sys
import sysconfig
from functools import cache
from pathlib import Path

import torch

from lightning_freeze._lightning import LIGHTNING_FILES

_LIBRARIES = tuple(
    os.path.join(os.path.abspath(folder), "")
    for folder in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
        # pip --target, PYTHONPATH, containers: where something was installed, libraries are
        *(folder for folder in sys.path if folder and any(Path(folder).glob("*.dist-info"))),
    }
)
# Their frames are around every operation and say nothing, not even where no line is the user's own.
_MACHINERY = tuple(
    os.path.join(os.path.dirname(os.path.abspath(file)), "")
    for file in (torch.__file__, *LIGHTNING_FILES, os.path.dirname(__file__))
)


@cache
def is_users(file: str | None) -> bool:
    """Whether a source file is the user's own: not of a library, of this package, or made up such as ``<string>``."""
    return file is not None and not file.startswith(("<", *_LIBRARIES, *_MACHINERY))


def place() -> str:
    """Return the innermost line that is the user's own, such as ``models/net.py:31``; else that of a library."""
    frame, fallback = inspect.currentframe(), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if is_users(file) or not (fallback or file.startswith(_MACHINERY)):
            fallback = f"{os.sep.join(file.split(os.sep)[-2:])}:{frame.f_lineno}"
        frame = None if is_users(file) else frame.f_back
    return fallback or "an unknown place"
