"""The repeated blocks of a model, and learning rates that fall from the last to the first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_freeze.schedule.arguments import as_layers, number
from lightning_freeze.selectors import Selector, clean_name, select_parameters, unwrapped

_LISTS = (nn.Sequential, nn.ModuleList)


def layers_of(module: nn.Module, select: Selector = "*") -> list[str]:
    """Return the names of a model's repeated blocks, from input to output.

    Blocks are modules of one class in one list that are alike, which is to have half of their weights by shape in
    common: the layers of a transformer, the residual blocks of a ResNet; where they are nested, the outermost. What is
    between two of them and made of modules, such as the downsampling of a ConvNeXt, is a layer too; embeddings, stem
    and head are not. A model without any has as its blocks three or more siblings of one class, else what its lists
    hold, else its layers with a weight matrix. For the stages of a ResNet, name them: ``["layer1", …, "layer4"]``.

    Args:
        module: Any module; the order is that in which it has defined its parts.
        select: Where to look, see :func:`select_parameters`: ``"encoder"`` leaves out the blocks of a decoder.

    Returns:
        Names for selectors, none inside of another.

    Raises:
        ValueError: If ``select`` matches nothing, or nothing with a weight matrix.

    Example:
        >>> layers_of(nn.Transformer(8, 2, num_encoder_layers=2, num_decoder_layers=2, batch_first=True))
        ['encoder.layers.0', 'encoder.layers.1', 'decoder.layers.0', 'decoder.layers.1']
    """
    chosen = set(map(id, select_parameters(module, select).values()))
    modules = {clean_name(name): child for name, child in unwrapped(module).named_modules()}
    top = select if isinstance(select, str) and select in modules else ""
    root = _tree(top, modules[top], chosen)
    blocks = _blocks(root)
    if not blocks:
        raise ValueError(f"layers_of(select={select!r}) finds no layer with a weight matrix. Name the layers yourself.")
    units = list(_highest(root, lambda node: node in blocks or not any(_highest(node, blocks.__contains__))))
    places = [place for place, unit in enumerate(units) if unit in blocks]
    between = units[places[0] : places[-1] + 1]
    return [unit.name for unit in between if unit in blocks or unit.children]


def layerwise_lr_decay(layers: Sequence[str | Sequence[str]], decay: float, *, head: float = 1.0) -> dict[str, float]:
    """Return a learning rate scale for each layer, ``decay`` times that of the layer after it.

    For ``Phase(lr_scale=…)``. The last layer gets ``head * decay``, as in BEiT (Bao et al., ICLR 2022), after ELECTRA
    (Clark et al., ICLR 2020). ULMFiT's ratio is ``decay=1 / 2.6``.

    What no layer names gets ``head``: the head and the norm before it, but also embeddings or a stem. Name these first:
    ``layerwise_lr_decay([["cls_token", "pos_embed", "patch_embed"], *layers_of(model)], 0.75)``.

    Args:
        layers: The layers from the first, next to the input, to the last before the head; a list of names is one layer.
        decay: From one layer to the one before it, above 0 and usually below 1.
        head: The scale of what no layer names.

    Raises:
        ValueError: If a number is not above 0.

    Example:
        >>> layerwise_lr_decay(["embed", "block"], 0.5)
        {'embed': 0.25, 'block': 0.5}
        >>> layerwise_lr_decay(["embed", "block"], 0.5, head=10.0)
        {'*': 10.0, 'embed': 2.5, 'block': 5.0}
    """
    for name, value in (("decay", decay), ("head", head)):
        shown = f"layerwise_lr_decay({name}={value!r}): a factor"
        if not 0 < number(shown, value) < math.inf:
            raise ValueError(f"{shown} is above 0 and finite.")
    groups = as_layers("layers", layers)
    # A "*" that later names leave nothing is an error, and 1.0 is what holds without it.
    rates = {} if head == 1.0 else {"*": head}
    for place, names in enumerate(groups):
        rates |= dict.fromkeys(names, head * decay ** (len(groups) - place))
    return rates


@dataclass(eq=False)
class _Node:
    """A module with what is chosen of it: each parameter once, modules without any left out."""

    name: str
    module: nn.Module
    children: list[_Node] = field(default_factory=list)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)

    @property
    def has_class(self) -> bool:
        """Whether it is made of modules in a way that its class knows."""
        return bool(self.children) and not isinstance(self.module, (*_LISTS, nn.ModuleDict))


def _weights(shapes: Counter[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) * count for shape, count in shapes.items())


def _tree(name: str, module: nn.Module, chosen: set[int]) -> _Node:
    node = _Node(clean_name(name), module)
    for parameter in module.parameters(recurse=False):
        if id(parameter) in chosen:
            chosen.remove(id(parameter))  # a tied one counts once
            node.shapes[() if is_lazy(parameter) else tuple(parameter.shape)] += 1
    for key, child in module.named_children():
        below = _tree(f"{name}.{key}" if name else key, child, chosen)
        if below.name == node.name:  # a wrapper's inside
            node.module, node.children, below.children = below.module, below.children, []
        elif below.shapes:
            node.children.append(below)
        node.shapes += below.shapes
    return node


def _blocks(root: _Node) -> set[_Node]:
    """Return the blocks, by the first rule that finds a quarter of what another one finds."""
    rules: list[Callable[[_Node], list[_Node]]] = [
        lambda node: _alike(node.children) if isinstance(node.module, _LISTS) else [],
        lambda node: _three(_alike(node.children)),
        lambda node: _three([child for child in node.children if child.has_class]),
        lambda node: [child for child in node.children if isinstance(node.module, _LISTS) and child.children],
    ]
    found = [_of_their_class(root, _search(root, rule)) for rule in rules]
    sizes = [sum(_weights(block.shapes) for block in blocks) for blocks in found]
    best = next((blocks for blocks, size in zip(found, sizes, strict=True) if 4 * size >= max(sizes)), set())
    return best or set(_highest(root, lambda node: bool(node.name) and _is_around_matrices(node)))


def _search(node: _Node, rule: Callable[[_Node], list[_Node]]) -> list[_Node]:
    """Return what a rule finds among a module's children, or below them."""
    return rule(node) or [block for child in node.children for block in _search(child, rule)]


def _alike(siblings: Sequence[_Node]) -> list[_Node]:
    """Return those that have half of their weights, by shape, in common with another of their class."""

    def common(one: _Node, other: _Node) -> bool:
        both, either = _weights(one.shapes & other.shapes), _weights(one.shapes | other.shapes)
        return type(one.module) is type(other.module) and 2 * both >= either

    known = [one for one in siblings if one.has_class]
    return [one for one in known if any(common(one, other) for other in known if other is not one)]


def _three(siblings: Sequence[_Node]) -> list[_Node]:
    """Return those of whose class there are three or more: two can be an encoder and a decoder, or two heads."""
    kinds = Counter(type(one.module) for one in siblings)
    return [one for one in siblings if kinds[type(one.module)] > 2]


def _of_their_class(node: _Node, found: Sequence[_Node]) -> set[_Node]:
    """Return blocks, and modules of the same class elsewhere: a stage can have a single block."""
    kinds = {type(block.module) for block in found if block.has_class}
    tops = (_highest(child, lambda one: one in found or type(one.module) in kinds) for child in node.children)
    return set(chain.from_iterable(tops))


def _is_around_matrices(node: _Node) -> bool:
    """Return whether a module has one weight matrix, or several itself, as an LSTM."""
    matrices = sum(count for shape, count in node.shapes.items() if len(shape) > 1)
    return matrices == 1 or (matrices > 0 and not node.children)


def _highest(node: _Node, is_wanted: Callable[[_Node], bool]) -> Iterator[_Node]:
    """Yield the highest modules of a kind, in order."""
    if is_wanted(node):
        yield node
    else:
        for child in node.children:
            yield from _highest(child, is_wanted)
