"""The arguments of a FeatureCache: what they may be, and the modules that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_freeze.feature_cache.interceptor import hooks_of, is_compiled
from lightning_freeze.names import module_named
from lightning_freeze.words import one_of, whole_number

_DTYPES = ("float16", "bfloat16", "float32")


def modules_by_name(model: nn.Module, names: str | list[str]) -> dict[str, nn.Module]:
    """Return modules by name; raise if a name is that of no module, of one that is never called, or of one twice."""
    wanted = [names] if isinstance(names, str) else names
    found: dict[str, nn.Module] = {}
    for name in wanted:
        found |= _called(name, module_named(model, name, f'FeatureCache(module="{name}")'))
    if len(set(found.values())) < len(found):
        raise ValueError(f"FeatureCache(module={wanted!r}): two of these names are the same module. Name each once.")
    return found


def _called(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return a module, or those in an ``nn.ModuleList``, which is not called itself."""
    if isinstance(module, nn.ModuleList) and len(module):
        return {below: m for i, child in enumerate(module) for below, m in _called(f"{name}.{i}", child).items()}
    # TorchScript's classes raise AttributeError.
    if getattr(type(module), "forward", None) is nn.Module.forward and "forward" not in vars(module):
        raise ValueError(
            f'FeatureCache(module="{name}") names a {type(module).__name__}, which is never called. Name the modules '
            "in it, in the order in which they run."
        )
    return {name: module}


def sequential_links(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that run one after the other in an ``nn.Sequential`` and those inside it; else nothing."""
    links: dict[str, nn.Module] = {}
    for child_name, child in module.named_children() if _is_sequential(module) else ():
        below = f"{name}.{child_name}"
        links |= (not any(hooks_of(child)) and sequential_links(below, child)) or {below: child}
    return links if len(set(links.values())) == len(links) else {}


def _is_sequential(module: nn.Module) -> bool:
    own = getattr(type(module), "forward", None) is nn.Sequential.forward and "forward" not in vars(module)
    return own and 0 < len(list(module.children())) == len(module) and not is_compiled(module)  # type: ignore[arg-type]


def check_module(module: Any) -> str | list[str]:
    """Return the name of a module, or a list of several."""
    if isinstance(module, str):
        return module
    if not isinstance(module, Sequence) or not all(isinstance(name, str) for name in module):
        raise TypeError(f'FeatureCache(module={module!r}): it is a dotted name such as "backbone", or a list of them.')
    if not module:
        raise ValueError('FeatureCache(module=[]) names nothing. Name a module, such as "backbone".')
    for i, name in enumerate(module):
        if outer := [other for other in (*module[:i], *module[i + 1 :]) if f"{name}.".startswith(f"{other}.")]:
            where = f'FeatureCache(module={module!r}): "{name}" is "{outer[0]}" or inside it.'
            raise ValueError(f"{where} Name modules that run one after the other.")
    return list(module)


def check_max_bytes(max_bytes: Any) -> int | None:
    """Return a number of bytes."""
    if isinstance(max_bytes, float) and max_bytes.is_integer():  # 4e9
        max_bytes = int(max_bytes)
    return None if max_bytes is None else whole_number("FeatureCache", "max_bytes", max_bytes)


def check_storage(storage: Any) -> str | Path:
    """Return a folder as a path that stays the same wherever the user goes."""
    if not isinstance(storage, str | Path):
        raise TypeError(f'FeatureCache(storage={storage!r}): it is "memory" or the path of a folder.')
    if storage == "":
        raise ValueError('FeatureCache(storage=""): it is "memory" or the path of a folder, such as "features".')
    return storage if storage == "memory" else Path(storage).expanduser().absolute()


def check_dtype(dtype: Any) -> torch.dtype | None:
    """Return a dtype, also if it is named."""
    if not isinstance(dtype, torch.dtype | str | None):
        raise TypeError(f"FeatureCache(dtype={dtype!r}): it is a dtype, such as torch.float16.")
    name = str(dtype).removeprefix("torch.")
    return None if dtype is None else getattr(torch, one_of("FeatureCache", "dtype", name, _DTYPES))
