"""What is done around each step of an optimizer while a fit runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Around = Callable[[Optimizer], None]


class Steps:
    """Calls functions before and after every step of any optimizer, until :meth:`close`.

    The hooks are torch's global ones. So the optimizer that SAM or Lookahead steps inside of itself is seen, and so is
    one that takes another's place in mid-fit. A closure is the user's code: while it runs, no step is on.

    Attributes:
        before: Called before the optimizer does its work: when its step begins or, with a closure, when that has
            returned.
        after: Called after a step, and before a closure runs.
        counted: Called once a step with its optimizer, of steps within steps for the outermost only.
    """

    def __init__(self) -> None:
        self.before: list[Around] = []
        self.after: list[Around] = []
        self.counted: list[Around] = []
        # The steps that have begun, outermost first. One is there twice if its class calls super().step().
        self._begun: list[Optimizer] = []
        self._on: list[Optimizer] = []
        self._paused = False
        self._handles = [register_optimizer_step_pre_hook(self._begin), register_optimizer_step_post_hook(self._end)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let steps pass unseen for the time of the context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def suspend(self) -> None:
        """Call ``after`` for what is on; what has begun goes on when its closure has returned."""
        while self._on:
            optimizer = self._on.pop()
            for function in self.after:
                function(optimizer)

    def reset(self) -> None:
        """End the steps that are still on: one that raised has called no hook."""
        if self._begun:
            self.suspend()
            self._begun.clear()

    def close(self) -> None:
        """Forget everything."""
        self.reset()
        for handle in self._handles:
            handle.remove()

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._paused:
            return None
        self._begun.append(optimizer)
        # torch passes the optimizer as the first argument.
        if callable(closure := kwargs.get("closure")):
            return args, {**kwargs, "closure": partial(self._run, closure)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], partial(self._run, args[1]), *args[2:]), kwargs
        self._resume()
        return None

    def _run(self, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a closure as if no step was on: it is the user's code, and may save or end the fit."""
        self.suspend()
        result = closure(*args, **kwargs)
        self._resume()
        return result

    def _resume(self) -> None:
        for optimizer in self._begun:
            if optimizer not in self._on:
                for function in self.before:
                    function(optimizer)
                self._on.append(optimizer)

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer not in self._begun:  # it was paused, or is over by a reset
            return
        while self._begun.pop() is not optimizer:  # steps inside of it that raised
            pass
        if optimizer in self._on and optimizer not in self._begun:
            self._on.remove(optimizer)
            for function in self.after:
                function(optimizer)
        for function in self.counted if not self._begun else ():
            function(optimizer)
