"""Which parameters get a gradient, and where the way from those that do not to the loss ends."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_freeze.feature_cache.interceptor import is_compiled
from lightning_freeze.norms.core import stored_values

# What takes a tensor's values out of its graph.
_CUTS: dict[Any, str] = {
    Tensor.detach: ".detach()",
    Tensor.detach_: ".detach_()",
    torch.detach: "torch.detach()",
    torch.detach_: "torch.detach_()",
    Tensor.data.__get__: ".data",  # type: ignore[attr-defined]
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.__float__: "float()",
}
_NODES = 200_000


class Received:
    """Notes which parameters a backward reaches.

    A gradient that is left over from an earlier step does not count: hooks tell of each one that is accumulated, also
    where it is taken and cleared at once. Where somebody sets ``.grad`` by hand, :meth:`take_in` sees it. Neither what
    ``torch.autograd.grad`` gives counts, nor a backward that comes to a parameter with no gradient for it, as that of a
    ``torch.autograd.Function`` that returns None.

    Args:
        parameters: Name to parameter. Those that do not require grad now, or are lazy and have no value yet, are passed
            over.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> received = Received(dict(net.named_parameters()))
        >>> (net.weight.sum() + net.bias.detach()).backward()
        >>> received.close()
        >>> received.names
        {'weight'}
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names: set[str] = set()
        self._parameters = dict(parameters)
        self._handles: dict[str, tuple[RemovableHandle, RemovableHandle]] = {}
        self._coming: set[str] = set()
        self._before = {name: gradient_mark(parameter) for name, parameter in parameters.items()}
        self.follow()

    def follow(self) -> None:
        """Follow also what requires grad, or has a value, only now."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and name not in self._handles and not is_lazy(parameter):
                self._handles[name] = (
                    parameter.register_hook(functools.partial(self._note_coming, name)),  # type: ignore[no-untyped-call]
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._note, name)),  # type: ignore[no-untyped-call]
                )

    def take_in(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count gradients that are not those from the beginning, such as one set by hand; zeroed ones do not count."""
        given = {id(parameter) for parameter in parameters}
        for name, parameter in self._parameters.items():
            gradient, mark = parameter.grad, gradient_mark(parameter)
            if name in self.names or id(parameter) not in given or gradient is None or mark is None:
                continue
            if mark != self._before[name] and stored_values(gradient).any():
                self.names.add(name)

    def close(self) -> None:
        """Remove the hooks."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles = {}

    def _note_coming(self, name: str, gradient: Tensor | None) -> None:
        if gradient is None:
            self._coming.discard(name)
        else:
            self._coming.add(name)

    def _note(self, name: str, _: Tensor) -> None:
        # Torch calls this also where there is no gradient; ``.grad`` does not tell, it may be cleared, or an old one.
        if name in self._coming:
            self.names.add(name)


def gradient_mark(parameter: nn.Parameter) -> tuple[int, ...] | None:
    """Give what changes whenever a gradient is set or written to."""
    gradient = parameter.grad
    if gradient is None or gradient.is_inference():
        return None
    # FSDP2 adds to what is inside a DTensor, whose own version does not tell of that.
    inside = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
    return id(gradient), gradient._version, inside._version


@dataclass
class Use:
    """What became of one parameter in a watched step: the first place of each kind, such as ``models/net.py:31``.

    Args:
        linked: Where an operation used it and gave a result that has a graph.
        unlinked: Where an operation used it while no graph was recorded.
        cut: Where it, or something computed from it, was taken out of the graph, and by what.
    """

    linked: str | None = None
    unlinked: str | None = None
    cut: str | None = None


@dataclass
class Uses:
    """What became of each parameter that was watched.

    Attributes:
        of: Name to use; a name that is watched and not in it was never used by any operation.
        watched: The names that were watched at least once.
    """

    of: dict[str, Use] = field(default_factory=dict)
    watched: set[str] = field(default_factory=set)


class _Watch(TorchFunctionMode):
    """Sees every operation that Python calls, and passes it on unchanged."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], uses: Uses) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._uses = uses
        self._budget = _NODES

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler traces this function, and the rest of it cannot be traced
            return func(*args, **kwargs)
        try:
            cut = _CUTS.get(func)
        except TypeError:  # not hashable
            cut = None
        if cut is not None and args:
            self._note_cut(args[0], cut)
        result = func(*args, **kwargs)
        if cut is None and getattr(func, "__name__", "") not in ("__get__", "__set__"):
            self._note_use(args, kwargs, result)
        return result

    def _note_use(self, args: Any, kwargs: Any, result: Any) -> None:
        names = [self._names[id(tensor)] for tensor in _tensors((args, kwargs)) if id(tensor) in self._names]
        if not names:
            return
        results = [
            t for t in _tensors(result) if id(t) not in self._names and (t.is_floating_point() or t.is_complex())
        ]
        if any(tensor.requires_grad for tensor in results):
            kind = "linked"
        elif results and not torch.is_grad_enabled():
            kind = "unlinked"
        else:
            return
        for name in names:
            self._note(name, kind, "")

    def _note_cut(self, tensor: Any, how: str) -> None:
        if not isinstance(tensor, Tensor):
            return
        if id(tensor) in self._names:
            self._note(self._names[id(tensor)], "cut", f"{how} at ")
        elif tensor.grad_fn is not None and self._budget > 0:
            for parameter in self._behind(tensor.grad_fn):
                if id(parameter) in self._names:
                    self._note(self._names[id(parameter)], "cut", f"{how} at ")

    def _behind(self, node: Any) -> Iterator[Tensor]:
        """Give the leaves of a graph."""
        seen, todo = {node}, [node]
        while todo and self._budget > 0:
            self._budget -= 1
            node = todo.pop()
            variable = getattr(node, "variable", None)
            if variable is not None:
                yield variable
            for below, _ in node.next_functions:
                if below is not None and below not in seen:
                    seen.add(below)
                    todo.append(below)

    def _note(self, name: str, kind: str, prefix: str) -> None:
        use = self._uses.of.setdefault(name, Use())
        if getattr(use, kind) is None:
            setattr(use, kind, prefix + place())


def _tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, list | tuple):
        for one in nest:
            yield from _tensors(one)
    elif isinstance(nest, dict):
        for one in nest.values():
            yield from _tensors(one)


@contextmanager
def watching(parameters: Mapping[str, nn.Parameter], uses: Uses) -> Iterator[None]:
    """Note in ``uses`` what becomes of parameters inside a ``with`` block. It changes no result.

    Args:
        parameters: Name to parameter, for what is watched.
        uses: What is known already; it grows.

    Example:
        >>> net, uses = nn.Linear(2, 2), Uses()
        >>> with watching(dict(net.named_parameters()), uses):
        ...     with torch.no_grad():
        ...         _ = net.weight @ net.weight
        >>> uses.of["weight"].unlinked is not None, "bias" in uses.of, sorted(uses.watched)
        (True, False, ['bias', 'weight'])
    """
    uses.watched |= set(parameters)
    with _Watch(parameters, uses):
        yield


def watch_next_call(module: nn.Module, method: str, parameters: Mapping[str, nn.Parameter], uses: Uses) -> None:
    """Watch parameters during the next call of a method, and not after it.

    Args:
        module: The module whose method it is. The method is put back when it is called, or by :func:`stop_watching`.
        method: The method's name.
        parameters: Name to parameter, for what is watched.
        uses: What is known already; it grows.
    """
    original: Callable[..., Any] = getattr(module, method)
    own = module.__dict__.get(method)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        stop_watching(module, method)
        with watching(parameters, uses):
            return original(*args, **kwargs)

    # Lightning looks through one decorator for the names of the arguments, so this one shall not count.
    watched.__wrapped__ = getattr(original, "__wrapped__", original)
    watched._replaced = own  # type: ignore[attr-defined]
    module.__dict__[method] = watched


def stop_watching(module: nn.Module, method: str) -> None:
    """Undo :func:`watch_next_call`, if the call has not come."""
    current = module.__dict__.get(method)
    if current is not None and hasattr(current, "_replaced"):
        if current._replaced is None:
            del module.__dict__[method]
        else:
            module.__dict__[method] = current._replaced


def can_be_watched(module: nn.Module) -> bool:
    """Whether Python sees a module's operations; if a part of it is compiled or scripted it does not."""
    return not any(
        isinstance(child, torch._dynamo.OptimizedModule | torch.jit.ScriptModule)
        or is_compiled(child)
        or getattr(child, "_compiler_ctx", None) is not None
        for child in module.modules()
    )


_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})
_MACHINERY = tuple(
    os.path.dirname(os.path.abspath(str(file))) + os.sep for file in (torch.__file__, lightning.__file__, __file__)
)


def place() -> str:
    """Give the innermost line that is the user's own, such as ``models/net.py:31``; else the innermost of a library."""
    frame: FrameType | None = sys._getframe(1)
    fallback = None
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_MACHINERY):
            if not file.startswith((*_LIBRARIES, "<")):
                return _line(frame)
            fallback = fallback or _line(frame)
        frame = frame.f_back
    return fallback or "an unknown place"


def _line(frame: FrameType) -> str:
    return f"{os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])}:{frame.f_lineno}"
