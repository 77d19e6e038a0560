"""What a frozen module's outputs depend on beside its arguments: why they may not be reused, and a key of the rest."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import torch
import xxhash
from torch import Tensor, fx, nn

from lightning_freeze.feature_cache.attributes import Attributes, are_same, text_of_class, views_of
from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import (
    BatchNormBase,
    InstanceNormBase,
    hooks_of,
    parts_of,
    version_of,
)
from lightning_freeze.feature_cache.keys import why_no_key

_END = object()
_training, _trains = attrgetter("training"), attrgetter("requires_grad")

# Where classes that are random in train mode keep how much, by the names torch, torchvision and timm use.
_PROBABILITIES = ("p", "drop_prob", "dropout", "upper")
_RANDOM_NAMES = ("Dropout", "DropPath", "StochasticDepth", "DropBlock", "RReLU")


def why_not_reusable(name: str, module: nn.Module) -> str | None:
    """Return why a module's outputs must not be reused, or None if nothing that can be seen speaks against it."""
    for below, parameter in module.named_parameters(name):
        if parameter.requires_grad:
            return f"{below} trains"
    for below, layer in module.named_modules(prefix=name):
        if reason := _why_not_layer(below, layer):
            return reason
    for below, tensor in chain(module.named_parameters(name), module.named_buffers(name)):
        if tensor.is_inference():
            return f"{below} was made in inference mode, where changes cannot be seen"
        if reason := why_no_key(tensor):
            return f"{below} is {reason}"
    return None


def _why_not_layer(name: str, layer: nn.Module) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return f"{name} is TorchScript, whose code cannot be looked into"
    if any(isinstance(value, torch.ScriptObject) for value in vars(layer).values()):
        return f"{name} ({type(layer).__name__}) keeps weights that cannot be looked into"
    if any(hooks_of(layer)):
        return f"{name} has forward hooks, which would not be called"
    kind = type(layer).__name__
    if isinstance(layer, BatchNormBase):
        if layer.running_mean is None and not isinstance(layer, InstanceNormBase):
            return f"{name} ({kind}) has no running statistics: its output depends on the batch"
        if layer.running_mean is not None and layer.training:
            return f"{name} ({kind}) is in train mode: its running statistics move"
    is_random = isinstance(layer, nn.MultiheadAttention | nn.RNNBase) or any(part in kind for part in _RANDOM_NAMES)
    for attribute in _PROBABILITIES if layer.training and is_random else ():
        p = getattr(layer, attribute, None)
        if isinstance(p, float | int) and p > 0:
            return f"{name} ({kind}, {attribute}={p:g}) is in train mode: its output is random"
    return None


class State:
    """All that a module's outputs depend on beside arguments, read anew only where something has moved.

    The content of a tensor is read where PyTorch's version counter or the address moved. A write through
    ``tensor.data`` moves neither and is seen after :meth:`recheck`; so are attributes of torch's own layers.

    Attributes:
        parts: What it is of.
        why: Why outputs may not be reused, None if they may.
        key: Of everything, the same in every run, if they may.
    """

    def __init__(self, name: str, module: nn.Module, hashing: Hash) -> None:
        self.name, self.module, self.hashing = name, module, hashing
        self.parts, self.why = _Parts(module), why_not_reusable(name, module)
        self.key = self._program = self._contents = b""
        self._is_new = True  # has not run
        self._writes: list[int] = []

    def recheck(self, written: Iterable[Tensor] | None = None) -> None:
        """Read all tensors at the next call if one of those ``written`` is among them, or if none is named."""
        if written is None or any(tensor in self.parts.tensors for tensor in written):
            self._contents = b""

    def read(self) -> State:
        """Bring the attributes up to date."""
        if has_moved := not self.parts.hold(whole=not self._contents):
            before, self.parts = self.parts, _Parts(self.module)
            self.why = why_not_reusable(self.name, self.module)
            if not are_same(self.parts.attributes.others, before.attributes.others):
                self._program = secrets.token_bytes(16)  # functions have no text that says all that they do
            if not are_same([*self.parts.tensors], [*before.tensors]):
                self._contents = b""
        if self.why is not None:
            return self
        writes = self.parts.writes()
        if not self._contents or writes != self._writes:
            self._writes, has_moved = writes, True
            layout = [(tensor.stride(), tensor.device) for tensor in self.parts.tensors]
            self._contents = f"{layout}".encode() + b"".join(self.hashing.tensors([*self.parts.tensors]))
        if has_moved:
            self.key = xxhash.xxh3_128_digest(self.parts.text + self._program + self._contents)
        return self

    def note_run(self) -> None:
        """Leave out of the key what the module has put into attributes in the run that has just ended."""
        if not self.parts.hold(whole=True):
            self.parts.attributes.note_run(is_first=self._is_new)
        self._is_new = False


class _Parts:
    """The layers, attributes and tensors of a module at one time, and whether it is still made of them.

    Attributes:
        text: Of modes, code and attributes.
        tensors: Parameters, buffers, and tensors in attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = list(module.modules())
        # What TorchScript keeps are no dictionaries.
        plain = [layer for layer in self._layers if not isinstance(layer, torch.jit.ScriptModule)]
        kinds = [type(layer) for layer in plain if not isinstance(layer, fx.GraphModule)]
        classes = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base not in nn.Module.__mro__)
        own, torchs = list[Any](), list[Any]()  # torch's own are many and seldom changed
        for one in (*plain, *classes):
            kind = one if isinstance(one, type) else type(one)
            (torchs if kind.__module__.startswith("torch.nn.") else own).append(one)
        self.attributes = Attributes([*own, *torchs])
        self.text = (
            f"{torch.__version__}{module!r}{list(map(text_of_class, map(type, self._layers)))}"
            f"{list(map(_training, self._layers))}{self.attributes.text}".encode()
        )
        self.tensors = dict.fromkeys(chain(module.parameters(), module.buffers(), self.attributes.tensors))
        self._counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._hooks = [hooks for layer in plain for hooks in hooks_of(layer)]
        self._dicts = [vars(layer) for layer in torchs if isinstance(layer, nn.Module)]
        self._views = [part.values() for layer in plain for part in parts_of(layer)] + views_of(own)
        self._views_of_torch = views_of(torchs)
        self._objects = list(self._look()), list(chain(*self._views_of_torch))

    def hold(self, *, whole: bool) -> bool:
        """Whether every layer, parameter, buffer, mode and attribute is what it was; of torch's layers if ``whole``."""
        own, torchs = self._objects
        is_same = all(map(is_, self._look(), own))
        return is_same and (not whole or are_same(list(chain(*self._views_of_torch)), torchs))

    def writes(self) -> list[int]:
        """Return what is other once a tensor has been written to, but through ``.data``."""
        return [*map(version_of, self._counted), *map(Tensor.data_ptr, self._counted)]

    def _look(self) -> Iterator[Any]:
        flags = any(self._hooks), any(map(_trains, self.tensors))
        modes = map(dict.get, self._dicts, repeat("training"))
        forwards = map(dict.get, self._dicts, repeat("forward"))
        return chain(flags, modes, forwards, map(type, self._layers), *self._views, [_END])
