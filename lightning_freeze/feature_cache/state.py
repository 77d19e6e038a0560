"""What a frozen module's outputs depend on beside its arguments: why they may not be reused, and a key of the rest."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import torch
import xxhash
from torch import Tensor, fx, nn

from lightning_freeze.feature_cache.attributes import Attributes, text_of_class
from lightning_freeze.feature_cache.hashing import Hash
from lightning_freeze.feature_cache.interceptor import (
    BatchNormBase,
    InstanceNormBase,
    hooks_of,
    parts_of,
    version_of,
)
from lightning_freeze.feature_cache.keys import is_half, why_no_key

_training, _code, _trains = attrgetter("training"), attrgetter("code"), attrgetter("requires_grad")

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
        why: Why outputs may not be reused, None if they may.
        key: Of everything, the same in every run, if they may.
        parts: What it is of.
    """

    def __init__(self, name: str, module: nn.Module, hashing: Hash) -> None:
        self.why: str | None = ""
        self.key = b""
        self.parts = _Parts(module)
        self._named, self._hash = (name, module), hashing
        self._is_new = True  # has not run
        self._digests: dict[int, tuple[Any, bytes]] = {}  # of tensors; none are read anew
        self._marks: tuple[Any, Any] = (None, None)
        self._text = self._program = b""

    def recheck(self, written: Iterable[Tensor] | None = None) -> None:
        """Read all tensors at the next call if one of those ``written`` is among them, or if none is named."""
        if written is None or any(id(tensor) in self._digests for tensor in written):
            self._digests.clear()

    def read(self) -> State:
        """Bring the attributes up to date."""
        if is_new := not self.parts.hold(whole=not self._digests):
            before, self.parts = self.parts, _Parts(self._named[1])  # so that no other tensor has the id of one before
            self._digests = {id(t): self._digests[id(t)] for t in self.parts.tensors if id(t) in self._digests}
            if not _are_same(self.parts.attributes.others, before.attributes.others):
                self._program = secrets.token_bytes(16)  # functions have no text that says all that they do
        old_form, old_writes = self._marks
        form, writes = self._marks = self.parts.marks()
        if has_changed := is_new or form != old_form:
            self.why = why_not_reusable(*self._named)
            kinds = [text_of_class(type(layer)) for layer in self.parts.layers]  # type: ignore[arg-type]
            self._text = (
                f"{torch.__version__}{self._named[1]!r}{kinds}{form[:2]}{self.parts.attributes.text}".encode()
                + self._program
            )
        if self.why is None and (has_changed or writes != old_writes or not self._digests):
            self.key = xxhash.xxh3_128_digest(self._text + self._contents(self.parts.tensors))
        return self

    def note_run(self) -> None:
        """Leave out of the key what the module has put into attributes in the run that has just ended."""
        if not self.parts.hold(whole=True):
            self.parts.attributes.note_run(is_first=self._is_new)
        self._is_new = False

    def _contents(self, tensors: list[Tensor]) -> bytes:
        """Return a hash of each tensor, computed anew where something was written to it."""
        versions = [None if t.is_inference() else version_of(t) for t in tensors]
        places = [(t.data_ptr(), t.shape, t.stride(), t.device) for t in tensors]
        marks = dict(zip(map(id, tensors), zip(versions, places, strict=True), strict=True))
        moved = [t for t in tensors if self._digests.get(id(t), (None,))[0] != marks[id(t)]]
        for tensor, digest in zip(moved, self._hash.tensors(moved), strict=True):
            self._digests[id(tensor)] = marks[id(tensor)], f"{tensor.stride()}{tensor.device}".encode() + digest
        return b"".join(self._digests[id(tensor)][1] for tensor in tensors)


class _Parts:
    """The layers and tensors of a module, and cheap marks of what can move about them."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = list(module.modules())
        # What TorchScript keeps are no dictionaries.
        plain = [layer for layer in self.layers if not isinstance(layer, torch.jit.ScriptModule)]
        kinds = [type(layer) for layer in plain if not isinstance(layer, fx.GraphModule)]
        classes = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base not in nn.Module.__mro__)
        self.attributes = Attributes([*plain, *classes])
        self._graphs = [layer for layer in plain if isinstance(layer, fx.GraphModule)]
        self.tensors: list[Tensor] = [
            *dict.fromkeys(chain(module.parameters(), module.buffers(), self.attributes.tensors))
        ]
        self.has_half = any(map(is_half, self.tensors))
        self._counted = [t for t in self.tensors if not t.is_inference() and why_no_key(t) is None]
        self._views = [part.values() for layer in plain for part in parts_of(layer)] + self.attributes.views
        self._hooks = [hooks for layer in plain for hooks in hooks_of(layer)]
        self._dicts = list(map(vars, plain))
        self._objects = self._look(), list(chain(*self.attributes.of_torch))

    def hold(self, *, whole: bool) -> bool:
        """Whether every layer, parameter, buffer and attribute is the object it was; of torch's layers if ``whole``."""
        own, torchs = self._objects
        return _are_same(self._look(), own) and (not whole or _are_same(list(chain(*self.attributes.of_torch)), torchs))

    def _look(self) -> list[Any]:
        forwards = map(dict.get, self._dicts, repeat("forward"))
        return [*forwards, *map(type, self.layers), *chain(*self._views)]

    def marks(self) -> tuple[Any, Any]:
        """Return modes, code and flags; marks of writes but those through ``.data``."""
        form = (
            list(map(_training, self.layers)),
            list(map(_code, self._graphs)),
            any(self._hooks),
            any(map(_trains, self.tensors)),
        )
        writes = list(map(version_of, self._counted)), list(map(Tensor.data_ptr, self._counted))
        return form, writes


def _are_same(objects: list[Any], others: list[Any]) -> bool:
    return len(objects) == len(others) and all(map(is_, objects, others))
