"""Answers the calls of a module, and stays out of the way of whatever reads, copies, exports or compiles it.

The one file of this wing with private names of torch, which has no public way to answer a module's calls, to see
versions of tensors, or to ask who is tracing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import FunctionType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["TreeSpec", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

Run: TypeAlias = Callable[..., Any]
T = TypeVar("T", bound=torch.Tensor)

_PLACES = ("_compiled_call_impl", "_call_impl")

version_of = attrgetter("_version")  # counts writes; tensors made in inference mode have none
OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
BatchNormBase, InstanceNormBase = nn.modules.batchnorm._NormBase, nn.modules.instancenorm._InstanceNorm


def parts_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the dictionaries of a module's parameters, buffers and children, which are read at every call."""
    return module._parameters, module._buffers, module._modules


def forward_hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
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
        or getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()  # torch 2.6 has one flag for both
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )


class Interceptor:
    """Takes the calls of a module until it is removed: ``module(x)``, not ``module.forward(x)``.

    It is where ``module.compile()`` puts a compiled call. PyTorch leaves that out of copies and pickles, and what
    exports or compiles the module reads its ``forward``, which is as it was. Hooks run as without it.

    Args:
        module: Any module.
        call: Takes what would have run, ``args`` and ``kwargs``. What would have run is the module's ``forward`` as
            it is then, or its compiled call.
        compiled_around: Whether the module runs in something that is compiled; see :func:`is_compiled_around`. A
            compiler passes over the usual place, so another one is taken. Deep copies and pickles then have an
            attribute that has no effect; a shallow copy is answered like the module.

    Raises:
        ValueError: If the module's calls are intercepted already.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> interceptor = Interceptor(net, lambda run, args, kwargs: "an answer")
        >>> net(torch.zeros(1, 2)), "forward" in vars(net)
        ('an answer', False)
        >>> interceptor.remove()
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[Run, tuple[Any, ...], dict[str, Any]], Any],
        *,
        compiled_around: bool = False,
    ) -> None:
        if is_intercepted(module):
            raise ValueError(f"The calls of this {type(module).__name__} are intercepted already.")
        self.module, self._call = module, call
        self._compiled: Run | None = module._compiled_call_impl
        # Of an fx.GraphModule a compiler reads no place but its class.
        elsewhere = compiled_around and self._compiled is None and not isinstance(module, fx.GraphModule)
        self._attribute = _PLACES[elsewhere]
        self._before = {key: value for key, value in vars(module).items() if key == self._attribute}
        self._untraced = torch.compiler.disable(self._answer)  # type: ignore[no-untyped-call]
        vars(module)[self._attribute] = self

    @property
    def plain(self) -> Run:
        """What runs without it, now: a module may be given another function at any time, as torch.fx does."""
        return self.module.forward if self._compiled is None else self._compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer, or run the module."""
        if torch.compiler.is_compiling():
            if _is_one_graph():
                return type(self.module)._call_impl(self.module, *args, **kwargs)  # type: ignore[no-untyped-call]
            return self._untraced(*args, **kwargs)
        return self._answer(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there, unless somebody else has."""
        if vars(self.module).get(self._attribute) is self:
            del vars(self.module)[self._attribute]
            vars(self.module).update(self._before)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is not None or not _is_more_than_forward(self.module):
            return self._call(self.plain, args, kwargs)
        # The answer takes the place of forward until that is called, so that hooks run around it.
        attributes = vars(self.module)
        before = {key: value for key, value in attributes.items() if key == "forward"}

        def forward(*args: Any, **kwargs: Any) -> Any:
            put_back()
            return self._call(self.plain, args, kwargs)

        def put_back() -> None:
            if attributes.get("forward") is forward:
                del attributes["forward"]
                attributes.update(before)

        attributes["forward"] = forward
        try:
            return type(self.module)._call_impl(self.module, *args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            put_back()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # torch.jit.script fails on whatever is in this place, unless it is a function, which it passes over.
        asking = sys._getframe(1).f_back  # of inspect.isfunction
        is_script = asking is not None and asking.f_globals.get("__name__") == "torch.jit._recursive"
        return FunctionType if is_script else Interceptor

    def __reduce__(self) -> tuple[Any, ...]:
        if self._attribute == "_call_impl":
            return getattr, (self.module, "_call_impl")
        return type(None), ()


def is_intercepted(module: nn.Module) -> bool:
    """Whether a module's calls are intercepted."""
    return any(isinstance(vars(module).get(place), Interceptor) for place in _PLACES)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` has put a compiled call before a module, also where that is intercepted."""
    call = getattr(module, "_compiled_call_impl", None)
    return call._compiled is not None if isinstance(call, Interceptor) else call is not None


def is_compiled_around(model: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether modules run in code of a model that is compiled: a module around them, or a method of one.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(2, 2)
        ...         self.step = torch.compile(lambda x: self.inner(x))
        >>> net = Net()
        >>> is_compiled_around(net, [net.inner])
        True
    """
    inner = set(modules)
    around = (layer for layer in model.modules() if layer not in inner and not inner.isdisjoint(layer.modules()))
    return any(is_compiled(layer) or _has_compiled_method(layer) for layer in around)


def _has_compiled_method(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made a method of a module, which may be its forward."""
    values = (value for holder in (module, *type(module).__mro__) for value in vars(holder).values())
    return any(callable(value) and hasattr(value, "_torchdynamo_orig_callable") for value in values)


def _is_more_than_forward(module: nn.Module) -> bool:
    """Whether a call of a module does more than to run ``forward``: hooks, or scopes for a trace."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or torch._C._get_tracing_state() is not None
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_one_graph() -> bool:
    """Whether what is compiled now must be one graph, which only the module itself can be in."""
    from torch._dynamo.symbolic_convert import tls

    tracer = getattr(tls, "current_tx", None)  # there is none in an export that runs Python
    return tracer is None or tracer.one_graph or getattr(tracer, "error_on_graph_break", False)
