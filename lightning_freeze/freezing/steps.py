"""What is done around each step of an optimizer while a fit runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        after: Called after a step, and before a closure runs once more.
        counted: Called once a step with its optimizer, of steps within steps for the outermost only.

    Example:
        >>> import torch
        >>> steps, seen = Steps(), []
        >>> steps.counted.append(lambda optimizer: seen.append(type(optimizer).__name__))
        >>> torch.optim.SGD([torch.zeros(1)]).step()
        >>> steps.close()
        >>> seen
        ['SGD']
    """

    def __init__(self) -> None:
        self.before: list[Around] = []
        self.after: list[Around] = []
        self.counted: list[Around] = []
        self._running: list[Optimizer] = []
        self._paused = False
        self._handles = [
            register_optimizer_step_pre_hook(self._begin),
            register_optimizer_step_post_hook(self._end),
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let steps pass unseen for the time of the context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def reset(self) -> None:
        """End the steps that are still on: one that raised has called no hook."""
        while self._running:
            self._call(self.after, self._running.pop())

    def close(self) -> None:
        """Forget everything."""
        self.reset()
        for handle in self._handles:
            handle.remove()

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._paused:
            return None
        self._running.append(optimizer)
        # torch passes the optimizer as the first argument.
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._outside(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._outside(args[1]), *args[2:]), kwargs
        self._call(self.before, optimizer)
        return None

    def _outside(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return a closure that runs as if no step was on: it is the user's code, and may save or end the fit."""

        def run(*args: Any, **kwargs: Any) -> Any:
            running = list(self._running)
            self.reset()
            result = closure(*args, **kwargs)
            for optimizer in running:
                self._running.append(optimizer)
                self._call(self.before, optimizer)
            return result

        return run

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._running:  # it began while paused, or was reset meanwhile
            return
        self._call(self.after, self._running.pop())
        if not self._running:
            self._call(self.counted, optimizer)

    @staticmethod
    def _call(functions: list[Around], optimizer: Optimizer) -> None:
        for function in functions:
            function(optimizer)
