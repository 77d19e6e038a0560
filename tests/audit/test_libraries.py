from __future__ import annotations

import os
import runpy
import site
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_freeze.audit import libraries
from lightning_freeze.audit.libraries import is_users, place

FOLDERS = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib")]


def place_seen_from(file: str) -> str:
    """Give the place that a function in that file sees when this one calls it."""
    names: dict[str, Any] = {"place": place}
    exec(compile("def see():\n    return place()", file, "exec"), names)
    return str(names["see"]())


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_line_of_the_user_and_not_that_of_a_library_is_named(folder: str) -> None:
    assert not is_users(os.path.join(folder, "lib", "net.py"))
    assert place_seen_from(os.path.join(folder, "lib", "net.py")).startswith("audit/test_libraries.py:")


def test_a_folder_whose_name_begins_like_that_of_a_library_is_the_users() -> None:
    file = f"{site.getusersitepackages()}-mine/net.py"
    assert is_users(file)
    assert place_seen_from(file) == "site-packages-mine/net.py:2"


def test_torch_is_a_library_wherever_it_lies() -> None:
    assert not is_users(torch.nn.functional.__file__)


def test_what_is_installed_in_a_folder_on_the_path_is_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers, ``pip --target`` and the outer environment have it there."""
    (tmp_path / "lib" / "torchvision-0.29.1.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.syspath_prepend(tmp_path)  # the user's: nothing is installed there
    read = runpy.run_path(libraries.__file__)["is_users"]
    assert not read(str(tmp_path / "lib" / "torchvision" / "models" / "resnet.py"))
    assert read(str(tmp_path / "net.py"))
