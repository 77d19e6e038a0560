"""The links of a chain: one module each, with what it depends on and what is remembered of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_freeze.feature_cache.interceptor import forward_hooks_of, is_compiled
from lightning_freeze.feature_cache.memory import Memory
from lightning_freeze.feature_cache.state import State


@dataclass
class Link:
    """One module, and whether the next one gets what it gives (None: not known yet)."""

    name: str
    module: nn.Module
    state: State
    memory: Memory
    follows: bool | None = None

    def reason(self) -> str | None:
        """Return why it is not remembered, now."""
        return self.state.read().why or self.memory.broken


@dataclass(frozen=True)
class Look:
    """What is remembered now: a whole or so many links, and why not more."""

    whole: bool
    depth: int
    why: str | None
    covers: tuple[str, ...]


def sequential_links(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that run in an ``nn.Sequential`` one after the other, also in those inside it; else nothing.

    Example:
        >>> list(sequential_links("net", nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU()))))
        ['net.0', 'net.1.0', 'net.1.1']
    """
    links: dict[str, nn.Module] = {}
    for child_name, child in module.named_children() if _is_sequential(module) else ():
        below = f"{name}.{child_name}"
        links |= (not any(forward_hooks_of(child)) and sequential_links(below, child)) or {below: child}
    return links if len(set(links.values())) == len(links) else {}


def _is_sequential(module: nn.Module) -> bool:
    own = getattr(type(module), "forward", None) is nn.Sequential.forward and "forward" not in vars(module)
    return own and 0 < len(list(module.children())) == len(module) and not is_compiled(module)  # type: ignore[arg-type]
