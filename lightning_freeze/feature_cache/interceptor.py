"""Answers the calls of a module. The one file of this wing with private names of torch.

torch has no public way to answer a module's calls, to see versions of tensors, or to ask who is tracing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import FunctionType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["TreeSpec", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

Run: TypeAlias = Callable[..., Any]
T = TypeVar("T", bound=torch.Tensor)

_PLACE = "_compiled_call_impl"

version_of = attrgetter("_version")  # counts writes; tensors made in inference mode have none
OWN_ATTRIBUTES = frozenset([*vars(nn.Module()), _PLACE])
BatchNormBase, InstanceNormBase = nn.modules.batchnorm._NormBase, nn.modules.instancenorm._InstanceNorm


def parts_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the dictionaries of a module's parameters, buffers and children, which are read at every call."""
    return module._parameters, module._buffers, module._modules


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the dictionaries of a module's hooks around ``forward``."""
    return module._forward_hooks, module._forward_pre_hooks


def empty_of(kind: type[T]) -> T:
    """Return an empty tensor of a class of one's own."""
    made: T = kind._make_subclass(kind, torch.empty(0, device="meta"))
    return made


def is_observed() -> bool:
    """Whether somebody traces, exports, counts or transforms what runs: then everything has to run."""
    return bool(
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )


class Interceptor:
    """Takes the calls of a module until it is removed: ``module(x)``, not ``module.forward(x)``.

    It is where ``module.compile()`` puts a compiled call. PyTorch leaves that out of copies and pickles, and what
    exports or compiles the module reads its ``forward``, which is as it was.
    """

    def __init__(self, module: nn.Module, call: Callable[[Run, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        if is_intercepted(module):
            raise ValueError(f"The calls of this {type(module).__name__} are intercepted already.")
        self.module, self._call = module, call
        self._before = {key: value for key, value in vars(module).items() if key == _PLACE}
        self._run = module._compiled_call_impl or partial(type(module)._call_impl, module)
        vars(module)[_PLACE] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer, or run the module where it is compiled or exported with what is around it."""
        if torch.compiler.is_compiling():
            return self._run(*args, **kwargs)
        return self._call(self._run, args, kwargs)

    def remove(self) -> None:
        """Put back what was there, unless somebody else has."""
        if vars(self.module).get(_PLACE) is self:
            del vars(self.module)[_PLACE]
            vars(self.module).update(self._before)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # torch.jit.script fails on whatever is in this place, unless it is a function, which it passes over.
        asking = sys._getframe(1).f_back  # of inspect.isfunction
        is_script = asking is not None and asking.f_globals.get("__name__") == "torch.jit._recursive"
        return FunctionType if is_script else Interceptor

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # for copies of modules that leave nothing out


def is_intercepted(module: nn.Module) -> bool:
    """Whether a module's calls are intercepted."""
    return isinstance(vars(module).get(_PLACE), Interceptor)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` has put a compiled call before a module that is not intercepted."""
    return getattr(module, _PLACE, None) is not None and not is_intercepted(module)
