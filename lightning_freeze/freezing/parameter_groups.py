"""Optimizer groups from selectors, with weight decay left out where it does harm."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

from torch import Tensor, nn

from lightning_freeze.selectors import Selector, named_unique_parameters, overlay, resolve, selector_text


def is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter has at most one dimension, as biases and the weights of norms have: timm's rule."""
    return parameter.ndim <= 1


def is_shaped_vector(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a vector in the shape of what it is applied to, such as ``(1, channels, 1, 1)``."""
    return parameter.ndim > 2 and parameter.numel() == max(parameter.shape)


_VECTORS = (is_shaped_vector, "!type:_ConvNd", is_vector, "type:LayerNorm", "type:RMSNorm")


def parameter_groups(
    module: nn.Module,
    options: Mapping[Any, Mapping[str, Any]],  # of selectors; a Mapping of them would refuse a dict[str, …]
    *,
    no_decay: Selector = _VECTORS,
) -> list[dict[str, Any]]:
    """Return optimizer groups from selectors: disjoint, and together all parameters of a module.

    Args:
        module: Any module. Frozen parameters are in the groups too: they may train later.
        options: Selector to the options of its group, for example ``{"backbone": {"lr": 1e-5}}``. Where selectors
            overlap the later one holds. What none selects is in a group without options of its own. A tuple is a list
            of selectors: ``{("*", "!head"): {"lr": 1e-5}}``.
        no_decay: What gets ``weight_decay=0.0``, in a group beside: if not given, every parameter of at most one
            dimension, also as ``(1, channels, 1, 1)`` where that is no convolution, so all biases and the weights of
            all norms. A pattern that matches nothing is passed over.

    Returns:
        Groups for any ``torch.optim`` optimizer, each with ``params``, a ``name`` of its own and its options; no empty
        ones. A tensor among the options, a learning rate say, is copied for each group.

    Raises:
        TypeError: If the options of a selector are no dict.
        ValueError: If a selector matches nothing, if later ones leave it nothing, or if options have ``params``.

    Example:
        >>> net = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> groups = parameter_groups(net, {"backbone": {"lr": 1e-4, "weight_decay": 0.1}})
        >>> [(group["name"], group.get("lr"), group.get("weight_decay"), len(group["params"])) for group in groups]
        [('backbone', 0.0001, 0.1, 1), ('backbone/no_decay', 0.0001, 0.0, 1), ('rest', None, None, 1), \
('rest/no_decay', None, 0.0, 1)]
    """
    _check_options(options)
    everything = named_unique_parameters(module)
    owner = overlay(module, list(options), given="parameter_groups({{{}: …}})")
    undecayed = resolve(module, no_decay, given="parameter_groups(no_decay={})", partial=True)
    sections = [(values.get("name", selector_text(select)), values, select) for select, values in options.items()]
    groups: dict[str, dict[str, Any]] = {}
    for title, values, select in [*sections, ("rest", {}, None)]:
        members = [name for name in everything if owner.get(name) == select]
        for suffix, extra in (("", {}), ("/no_decay", {"weight_decay": 0.0})):
            if names := [name for name in members if (name in undecayed) == bool(extra)]:
                own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
                name = _unlike(f"{title}{suffix}", groups)
                groups[name] = {"params": [everything[name] for name in names], **own, **extra, "name": name}
    return list(groups.values())


def _check_options(options: Mapping[Any, Any]) -> None:
    if not isinstance(options, Mapping):
        raise TypeError(
            f'parameter_groups: options are a dict of selectors, for example {{"head": {{"lr": 1e-3}}}}, '
            f"not {options!r}."
        )
    for select, values in options.items():
        shown = f"parameter_groups({{{selector_text(select)!r}: {values!r}}})"
        if not isinstance(values, Mapping):
            raise TypeError(f'{shown}: the options of a group are a dict, for example {{"lr": 1e-3}}.')
        if "params" in values:
            raise ValueError(f"{shown}: what a group holds follows from its selector. Leave params out.")


def _unlike(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: LearningRateMonitor refuses two groups of one name."""
    numbered = (f"{name}-{number}" for number in count(2))
    return name if name not in taken else next(one for one in numbered if one not in taken)
