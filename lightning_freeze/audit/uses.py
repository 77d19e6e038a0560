"""What becomes of parameters in a forward: where they are used, and where their way to the loss ends."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_freeze.audit.libraries import place

#: For each name that was watched the first place of each kind, such as ``models/net.py:31``: ``"linked"``, where an
#: operation used it with a result that has a graph; ``"unlinked"``, where no graph was recorded; ``"cut"``, where it,
#: or something computed from it, was taken out of the graph, and by what.
Uses: TypeAlias = dict[str, dict[str, str]]

_CUTS = {
    **{name: f".{name}()" for name in ("detach", "detach_", "item", "tolist", "numpy")},
    **{"data": ".data", "__float__": "float()"},
}
_NODES = 200_000


@contextmanager
def watching(module: nn.Module, method: str, parameters: Mapping[str, nn.Parameter], uses: Uses) -> Iterator[None]:
    """Note in ``uses`` what becomes of parameters in calls of a method inside of the block; results do not change."""
    original, own = getattr(module, method), vars(module).get(method)
    uses.update({name: uses.get(name, {}) for name in parameters})

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Watch({id(parameter): uses[name] for name, parameter in parameters.items()}):
            return original(*args, **kwargs)

    # Lightning looks through one decorator for the names of the arguments, so this one shall not count.
    watched.__wrapped__ = getattr(original, "__wrapped__", original)
    vars(module)[method] = watched
    try:
        yield
    finally:
        vars(module).pop(method, None)
        vars(module).update({method: own} if own is not None else {})


def runs_in_python(module: nn.Module) -> bool:
    """Whether Python sees all operations of a module: no part of it is compiled or scripted."""
    # Left by ``torch.compile(module)``, by ``module.compile()``, and by Lightning where it unpacks a compiled module.
    marks = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
    children = list(module.modules())
    compiled = any(getattr(child, mark, None) is not None for child in children for mark in marks)
    return not compiled and not any(isinstance(child, torch.jit.ScriptModule) for child in children)


class _Watch(TorchFunctionMode):
    """Sees every operation that Python calls, passes it on unchanged, and notes uses by the parameter's identity."""

    def __init__(self, uses: Mapping[int, dict[str, str]]) -> None:
        super().__init__()
        self._uses, self._budget = uses, _NODES

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler traces this function, and the rest of it cannot be traced
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        cut = _CUTS.get(getattr(func.__self__, "__name__", "") if name == "__get__" else name)
        if cut and args and isinstance(args[0], Tensor):
            for tensor in (args[0], *self._behind(args[0].grad_fn)):
                self._note(tensor, "cut", f"{cut} at ")
        result = func(*args, **kwargs)
        if cut or name in ("__get__", "__set__"):
            return result
        results = [t for t in _tensors(result) if id(t) not in self._uses and t.dtype.to_real().is_floating_point]
        linked = any(tensor.requires_grad for tensor in results)
        if linked or (results and not torch.is_grad_enabled()):
            for tensor in _tensors((args, kwargs)):
                self._note(tensor, "linked" if linked else "unlinked")
        return result

    def _note(self, tensor: Tensor, kind: str, prefix: str = "") -> None:
        if kind not in self._uses.get(id(tensor), (kind,)):
            self._uses[id(tensor)][kind] = prefix + place()

    def _behind(self, node: Any) -> Iterator[Tensor]:
        """Yield the leaves of a graph."""
        seen, ahead = {node}, [node] if node is not None else []
        while ahead and self._budget > 0:
            self._budget -= 1
            node = ahead.pop()
            if hasattr(node, "variable"):
                yield node.variable
            below = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= below
            ahead.extend(below)


def _tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, list | tuple | dict):
        for one in nest.values() if isinstance(nest, dict) else nest:
            yield from _tensors(one)
