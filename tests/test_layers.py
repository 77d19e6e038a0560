"""The house: which part may import which, and how long files, classes and functions may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_freeze

PACKAGE = Path(lightning_freeze.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
WINGS = sorted({name.partition("/")[0] for name in FILES if "/" in name})
SHARED = "freezing"  # the wing that the others stand on

FILE, CLASS, FUNCTION, ATTRIBUTES = 300, 250, 40, 10


def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Yield the modules that a file imports, anywhere in it, in full."""
    inside = ["lightning_freeze", *name.split("/")[:-1]]
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from lightning_freeze import audit` names a wing too.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wing_of(module: str) -> str | None:
    """Return the wing that a module of the package is in, None for a root file or another package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "lightning_freeze" and len(parts) > 1 and parts[1] in WINGS else None


def wings_imported(name: str) -> set[str]:
    return {wing for module in imports(name) if (wing := wing_of(module)) is not None}


def test_there_is_a_house() -> None:
    assert {"audit", "freezing", "metrics", "norms", "schedule", "target"} <= set(WINGS)
    assert wings_imported("schedule/callback.py") == {"schedule", "freezing"}
    assert wing_of("lightning_freeze.words") is None


@pytest.mark.parametrize("name", [name for name in FILES if "/" in name])
def test_a_wing_imports_the_root_files_freezing_and_itself(name: str) -> None:
    assert wings_imported(name) - {name.partition("/")[0], SHARED} == set()


@pytest.mark.parametrize("name", [name for name in FILES if "/" not in name and name != "__init__.py"])
def test_root_files_import_no_wing(name: str) -> None:
    assert wings_imported(name) == set()


def test_root_files_are_no_circle() -> None:
    """They are imported in some order, none by way of itself."""
    roots = {name.removesuffix(".py"): set[str]() for name in FILES if "/" not in name and name != "__init__.py"}
    for name, needs in roots.items():
        for module in imports(f"{name}.py"):
            package, _, rest = module.partition(".")
            needs |= {rest.partition(".")[0]} & roots.keys() if package == "lightning_freeze" else set()
    while roots:
        free = [name for name, needs in roots.items() if not needs & roots.keys()]
        assert free, f"a circle among {sorted(roots)}"
        for name in free:
            del roots[name]


@pytest.mark.parametrize("name", [name for name in FILES if name != "_lightning.py"])
def test_lightning_has_one_door(name: str) -> None:
    packages = {module.partition(".")[0] for module in imports(name)}
    assert not packages & {"lightning", "pytorch_lightning", "lightning_fabric"}


def lengths(name: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield what is measured in a file: its name, its kind, how much it is, and how much it may be."""
    text = FILES[name].read_text(encoding="utf-8")
    yield name, "file", len(text.splitlines()), FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            yield f"{name}:{node.name}", "class", (node.end_lineno or 0) - node.lineno + 1, CLASS
            yield f"{name}:{node.name}", "attributes", len(set(attributes(node))), ATTRIBUTES
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield f"{name}:{node.name}", "function", (node.end_lineno or 0) - body[0].lineno + 1, FUNCTION


def attributes(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and isinstance(inner.value, ast.Name):
            yield from [inner.attr] if inner.value.id == "self" else []


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_too_long(name: str) -> None:
    over = {what: (kind, size) for what, kind, size, most in lengths(name) if size > most}
    assert over == {}
