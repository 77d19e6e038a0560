"""The tables in the gallery are those that the package prints, and each page has its picture."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"


def pages() -> list[Any]:
    specification = importlib.util.spec_from_file_location("gallery", GALLERY / "make.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["gallery"] = module  # its dataclass looks there
    specification.loader.exec_module(module)
    return list(module.PAGES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_of_the_gallery_shows_what_the_package_prints(page: Any) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    text = (GALLERY / "index.md").read_text(encoding="utf-8")
    table, _ = page.run(picture=False)
    assert f"## {page.title}\n\n{page.text}\n\n```python\n{page.code}\n```\n\n```text\n{table}\n```\n" in text
    assert (GALLERY / f"{page.name}.png").stat().st_size <= 60_000
