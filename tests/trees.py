"""Random trees of modules, tied parameters and shared modules among them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import nn

LEAVES: dict[str, Any] = {
    "linear": lambda: nn.Linear(2, 2),
    "bare": lambda: nn.Linear(2, 2, bias=False),
    "norm": lambda: nn.BatchNorm1d(2),
    "plain norm": lambda: nn.BatchNorm1d(2, affine=False),
    "layer norm": lambda: nn.LayerNorm(2),
    "dropout": lambda: nn.Dropout(),
}


@st.composite
def trees(draw: Any, depth: int = 3) -> nn.Module:
    """Return a module with at least one parameter."""
    root = draw(_branches(depth))
    if not list(root.parameters()):
        root.add_module("last", nn.Linear(2, 2))
    modules = [module for module in root.modules() if isinstance(module, nn.Linear)]
    for _ in range(draw(st.integers(0, 2))):  # tie weights
        if len(modules) > 1:
            one, other = draw(st.sampled_from(modules)), draw(st.sampled_from(modules))
            other.weight = one.weight
    if modules and draw(st.booleans()):  # one module under two names
        root.add_module("again", draw(st.sampled_from(modules)))
    for parameter in root.parameters():
        parameter.requires_grad = draw(st.booleans())
    return root


@st.composite
def _branches(draw: Any, depth: int) -> nn.Module:
    module = nn.Module()
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)):
        deeper = depth > 1 and draw(st.booleans())
        child = draw(_branches(depth - 1)) if deeper else LEAVES[draw(st.sampled_from(sorted(LEAVES)))]()
        module.add_module(name, child)
    return module


@st.composite
def subsets(draw: Any, module: nn.Module) -> set[str]:
    """Return names of some parameters, each under its first name."""
    return {name for name, _ in module.named_parameters() if draw(st.booleans())}
