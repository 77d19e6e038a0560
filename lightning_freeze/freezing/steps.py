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
    """Calls functions before and after every step of one optimizer, or of any, until :meth:`close`.

    For any, the hooks are torch's global ones: the optimizer that SAM or Lookahead steps inside of itself is seen, and
    so is one that takes another's place in mid-fit. A closure is the user's code: while it runs, no step is on.
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self.before: list[Around] = []  # called when a step begins or, with a closure, when that has returned
        self.after: list[Around] = []  # called after a step, and before a closure runs
        self.counted: list[Around] = []  # called once a step, of steps within steps for the outermost only
        self.begun: list[Optimizer] = []  # outermost first, and twice if its class calls super().step()
        self._on: list[Optimizer] = []
        self._paused = False
        before = optimizer.register_step_pre_hook if optimizer is not None else register_optimizer_step_pre_hook
        after = optimizer.register_step_post_hook if optimizer is not None else register_optimizer_step_post_hook
        self._handles = [before(self._begin), after(self._end)]

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
        self.suspend()
        self.begun.clear()

    def close(self) -> None:
        """Forget everything."""
        self.reset()
        for handle in self._handles:
            handle.remove()

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._paused:
            return None
        self.begun.append(optimizer)
        # torch passes the optimizer as the first argument.
        if callable(closure := kwargs.get("closure")):
            return args, {**kwargs, "closure": partial(self._run, closure)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], partial(self._run, args[1]), *args[2:]), kwargs
        self._resume()
        return None

    def _run(self, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a closure as if no step was on: it is the user's code, and may save or end the fit."""
        if self._on:
            self.suspend()
        result = closure(*args, **kwargs)
        self._resume()
        return result

    def _resume(self) -> None:
        for optimizer in self.begun:
            if optimizer not in self._on:
                for function in self.before:
                    function(optimizer)
                self._on.append(optimizer)

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer not in self.begun:  # it was paused, or is over by a reset
            return
        while self.begun.pop() is not optimizer:  # steps inside of it that raised
            pass
        if optimizer in self._on and optimizer not in self.begun:
            self._on.remove(optimizer)
            for function in self.after:
                function(optimizer)
        for function in self.counted if not self.begun else ():
            function(optimizer)
