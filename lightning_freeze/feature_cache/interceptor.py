"""Answers the calls of a module, and gets out of the way of whatever reads, copies, exports or compiles it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module

Run: TypeAlias = Callable[..., Any]

_PLACES = ("_compiled_call_impl", "_call_impl")


class StandIn:
    """Takes the calls of a module until it is removed: ``module(x)``, not ``module.forward(x)``.

    It stands where ``module.compile()`` puts a compiled call. PyTorch leaves that out of copies and pickles, and what
    exports or compiles the module reads its ``forward``, which is as it was. Hooks run as without it.

    Args:
        module: Any module.
        call: Is given what would have run, ``args`` and ``kwargs``. What would have run is the module's ``forward`` as
            it is then, or its compiled call.
        compiled_around: Whether the module runs in something that is compiled; see :func:`is_compiled_around`. A
            compiler passes over the usual place, so it stands in another one. Deep copies and pickles then have an
            attribute that has no effect; a shallow copy is answered like the module.

    Raises:
        ValueError: If something stands in for the module already.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> stand_in = StandIn(net, lambda run, args, kwargs: "an answer")
        >>> net(torch.zeros(1, 2)), "forward" in vars(net)
        ('an answer', False)
        >>> stand_in.remove()
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[Run, tuple[Any, ...], dict[str, Any]], Any],
        *,
        compiled_around: bool = False,
    ) -> None:
        if has_stand_in(module):
            raise ValueError(f"Something stands in for this {type(module).__name__} already.")
        self.module, self._call = module, call
        self._compiled: Run | None = module._compiled_call_impl
        # Of an fx.GraphModule a compiler reads no place but its class.
        elsewhere = compiled_around and self._compiled is None and not isinstance(module, fx.GraphModule)
        self._attribute = _PLACES[elsewhere]
        self._before = {key: value for key, value in vars(module).items() if key == self._attribute}
        # Not for a compiler to trace.
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
        # The answer takes the place of forward, until that is called.
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
        return FunctionType if is_script else StandIn

    def __reduce__(self) -> tuple[Any, ...]:
        if self._attribute == "_call_impl":
            return getattr, (self.module, "_call_impl")
        return type(None), ()


def has_stand_in(module: nn.Module) -> bool:
    """Whether something stands in for a module."""
    return any(isinstance(vars(module).get(place), StandIn) for place in _PLACES)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` has put a compiled call before a module, also where something stands before that."""
    call = getattr(module, "_compiled_call_impl", None)
    return call._compiled is not None if isinstance(call, StandIn) else call is not None


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
        or nn_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or torch._C._get_tracing_state() is not None
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_one_graph() -> bool:
    """Whether what is compiled now must be one graph, which only the module itself can be in."""
    from torch._dynamo.symbolic_convert import tls

    tracer = getattr(tls, "current_tx", None)  # there is none in an export that runs Python
    return tracer is None or tracer.one_graph or getattr(tracer, "error_on_graph_break", False)
