"""Whether modules are frozen and give each sample the same output every time, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
import xxhash
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_freeze.feature_cache.features import byte_digest, byte_rows
from lightning_freeze.feature_cache.interceptor import is_compiled

_version = attrgetter("_version")
_requires_grad = attrgetter("requires_grad")
_training = attrgetter("training")
_code = attrgetter("code")

# Where classes that are random in train mode keep the probability, by the names torch, torchvision and timm use.
_PROBABILITIES = ("p", "drop_prob", "dropout")
_LARGE = 1 << 20  # bytes: less is read faster than another thread is asked to
# What every module keeps itself.
_OWN = frozenset(vars(nn.Module()))
_RANDOM_NAMES = ("Dropout", "DropPath", "StochasticDepth", "DropBlock")


def why_not_reusable(name: str, module: nn.Module) -> str | None:
    """Say why a module's outputs must not be reused, or None if nothing that can be seen speaks against it.

    Args:
        name: How the module is called in the sentence.
        module: Any module. Its own forward hooks do not matter unless they are compiled with it; those of modules below
            it do.

    Example:
        >>> why_not_reusable("net", nn.Sequential(nn.Linear(2, 2), nn.Dropout()).requires_grad_(False))
        'net.1 (Dropout, p=0.5) is in train mode: its output is random'
    """
    for below, parameter in module.named_parameters(name):
        if isinstance(parameter, DTensor):
            return f"{below} is sharded over ranks (FSDP2 or tensor parallelism)"
        if parameter.requires_grad:
            return f"{below} trains"
    for below, layer in module.named_modules(prefix=name):
        if isinstance(layer, torch.jit.ScriptModule):
            return f"{below} is TorchScript, whose code cannot be looked into"
        if isinstance(layer, FSDPModule):
            return f"{below} is sharded over ranks (FSDP2)"
        if (layer is not module or is_compiled(layer)) and (layer._forward_hooks or layer._forward_pre_hooks):
            return f"{below} has forward hooks, which would not be called"
        if reason := _why_mode_matters(below, layer):
            return reason
    if any(tensor.is_inference() or tensor.is_meta for tensor in _tensors(module)):
        return f"{name} has tensors whose changes cannot be seen (made in inference mode, or without data)"
    return None


def _why_mode_matters(name: str, layer: nn.Module) -> str | None:
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        per_sample = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        if layer.running_mean is None and not per_sample:
            return f"{name} ({type(layer).__name__}) has no running statistics: its output depends on the batch"
        if layer.running_mean is not None and layer.training:
            return f"{name} ({type(layer).__name__}) is in train mode: its running statistics move"
    if not layer.training:
        return None
    kind = type(layer).__name__
    if isinstance(layer, nn.RReLU):
        return f"{name} ({kind}) is in train mode: its output is random"
    if isinstance(layer, nn.MultiheadAttention | nn.RNNBase) or any(part in kind for part in _RANDOM_NAMES):
        for attribute in _PROBABILITIES:
            p = getattr(layer, attribute, None)
            if isinstance(p, float | int) and p > 0:
                return f"{name} ({kind}, {attribute}={p:g}) is in train mode: its output is random"
    return None


class Conditions:
    """Reads cheaply what decides whether outputs may be reused: what trains and runs, train modes, forward hooks.

    What runs are functions, which can be replaced. The modules torch.fx makes are given a new one all the time, mostly
    the same, so these are told apart by their code.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        # What TorchScript keeps are no dicts.
        layers = [layer for layer in _layers(modules) if not isinstance(layer, torch.jit.ScriptModule)]
        self._dicts: list[dict[str, Any]] = [
            d for layer in layers for d in (layer._parameters, layer._buffers, layer._modules)
        ]
        self._empty = [d for d in self._dicts if not d]
        self._dicts = [d for d in self._dicts if d]
        self._objects = self._gather()
        self._hooks = [d for layer in layers for d in (layer._forward_hooks, layer._forward_pre_hooks)]
        self._layers = layers
        self._parameters = [list(module.parameters()) for module in modules]
        self._graphs = [layer for layer in layers if isinstance(layer, fx.GraphModule)]
        self._outer = _readable(layer for layer in layers if layer in modules)
        self._inner = _readable(layer for layer in layers if layer not in modules)
        self._outer_functions, self._inner_functions = map(_functions, (self._outer, self._inner))

    def hold(self) -> bool:
        """Whether every parameter, buffer and module is the object it was, and so are the modules' functions."""
        objects = self._gather()
        same = len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
        return same and not any(self._empty) and _functions(self._outer) == self._outer_functions

    def rewritten(self) -> bool:
        """Whether the function of a module below is not the object it was."""
        return _functions(self._inner) != self._inner_functions

    def trains(self) -> tuple[bool, ...]:
        """Give for each module whether one of its parameters requires grad."""
        return tuple(any(map(_requires_grad, parameters)) for parameters in self._parameters)

    def modes(self) -> tuple[bool | str, ...]:
        """Give the train mode of each module, since any code can read it, which have forward hooks, and fx code."""
        return (*map(_training, self._layers), *map(bool, self._hooks), *map(_code, self._graphs))

    def program(self) -> str:
        """Give text that is the same only if the code of modules that torch.fx made is; empty without such modules."""
        codes = [*map(_code, self._graphs)]
        return xxhash.xxh3_128_hexdigest(repr(codes).encode()) if codes else ""

    def _gather(self) -> tuple[Any, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._dicts)))


class Weights:
    """Sees cheaply whether parameters and buffers still have the content they had.

    Content is compared where PyTorch's version counter or the address moved: DDP writes buffers anew in every step,
    mostly the same. A write through ``tensor.data`` moves neither and is seen by :meth:`content_changed` alone.

    Args:
        modules: The modules.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> weights = Weights([net])
        >>> net.load_state_dict(net.state_dict()), weights.changed()
        (<All keys matched successfully>, False)
        >>> _ = nn.init.zeros_(net.bias)
        >>> weights.changed()
        True
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._layers = _layers(modules)
        self._tensors = list(dict.fromkeys(chain.from_iterable(map(_tensors, self._layers))))
        self.take()

    def take(self) -> None:
        """Take the content that there is now for what it was."""
        self._marks = self._read_marks()
        self._contents = _contents(self._tensors)

    def changed(self) -> bool:
        """Whether a tensor has been written to and has other content now."""
        before, self._marks = self._marks, self._read_marks()
        if before == self._marks:
            return False
        pairs = zip(zip(*before, strict=True), zip(*self._marks, strict=True), strict=True)
        moved = [i for i, (old, new) in enumerate(pairs) if old != new]
        return any(_content(self._tensors[i]) != self._contents[i] for i in moved)

    def content_changed(self) -> bool:
        """Whether a tensor has other content, however it was written. Reads all of it."""
        return _contents(self._tensors) != self._contents

    def fingerprint(self) -> bytes:
        """Give 16 bytes for all that the tensors hold, the same in every run."""
        return xxhash.xxh3_128_digest(repr(self._contents).encode())

    def aside(self) -> dict[str, list[Tensor]]:
        """Give the tensors that layers keep in attributes which are neither parameters nor buffers."""
        return {
            f"{type(layer).__name__}.{name}": tensors
            for layer in self._layers
            for name, value in vars(layer).items()
            if name not in _OWN and (tensors := [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)])
        }

    def _read_marks(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self._tensors)), list(map(Tensor.data_ptr, self._tensors))


def structure_text(modules: Iterable[nn.Module]) -> str:
    """Give text that tells apart modules of other classes or settings, the same in every run."""
    modules = list(modules)
    kinds = [f"{type(layer).__module__}.{type(layer).__qualname__}" for module in modules for layer in module.modules()]
    return f"{modules!r}{kinds}"


def _layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(layer for module in modules for layer in module.modules()))


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())


def _contents(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Give the content of each tensor. Large ones are read by several threads: hashing lets others run."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Those on a device are copied to be read: one at a time.
        found = [pool.submit(_content, t) if t.is_cpu and t.nbytes >= _LARGE else _content(t) for t in tensors]
    return [content.result() if isinstance(content, Future) else content for content in found]


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Give form and hash of a tensor; those of equal ones have equal text, in every run."""
    digest = byte_digest(byte_rows(tensor.detach().unsqueeze(0)))
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, digest


def _functions(modules: Iterable[nn.Module]) -> list[tuple[Any, Any]]:
    """Give what a call of each module runs: the forward of its own, and that of its class if it is no fx graph's."""
    return [
        (vars(module).get("forward"), None if isinstance(module, fx.GraphModule) else type(module).forward)
        for module in modules
    ]


def _readable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Give those that give the same functions whenever they are read, which a descriptor need not do."""
    return [module for module in modules if _functions([module]) == _functions([module])]
