"""Tests import ``lightning.pytorch``; where ``NAMESPACE=pytorch_lightning`` is set, they get that package instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


class _Other(MetaPathFinder, Loader):
    """Finds the modules of the other package under the names of ``lightning``, which may not be installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "lightning" or name.startswith(tuple(_NAMES)) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name == "lightning":
            package = ModuleType(spec.name)
            package.__path__ = []
            return package
        *_, theirs = (theirs + spec.name[len(ours) :] for ours, theirs in _NAMES.items() if spec.name.startswith(ours))
        module = import_module(theirs)
        spec.loader_state = module.__spec__  # which the import system is about to replace
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state or module.__spec__


if os.environ.get("NAMESPACE") == "pytorch_lightning":
    import_module("lightning_freeze")  # knows both packages, so before one gets the other's name
    for _name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        del sys.modules[_name]
    sys.meta_path.insert(0, _Other())
