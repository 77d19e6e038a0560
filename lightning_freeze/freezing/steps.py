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
        after: Called after a step, and before a closure runs.
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
        self._waiting: list[Optimizer] = []  # for their closure
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
        self._waiting = []
        self._stop()

    def close(self) -> None:
        """Forget everything."""
        self.reset()
        for handle in self._handles:
            handle.remove()

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._paused:
            return None
        # torch passes the optimizer as the first argument.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._push(optimizer)
            return None
        self._waiting.append(optimizer)
        outside = self._outside(optimizer, closure)
        return (
            (args, {**kwargs, "closure": outside}) if "closure" in kwargs else ((args[0], outside, *args[2:]), kwargs)
        )

    def _outside(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return a closure that runs as if no step was on: it is the user's code, and may save or end the fit."""

        def run(*args: Any, **kwargs: Any) -> Any:
            running = list(self._running)
            self._stop()
            result = closure(*args, **kwargs)
            if any(waiting is optimizer for waiting in self._waiting):
                self._waiting.remove(optimizer)
                running.append(optimizer)
            for one in running:
                self._push(one)
            return result

        return run

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        if self._paused or not (self._running or self._waiting):  # it was reset meanwhile
            return
        if any(waiting is optimizer for waiting in self._waiting):  # it has not called its closure
            self._waiting.remove(optimizer)
        else:
            self._pop()
        if not (self._running or self._waiting):
            self._call(self.counted, optimizer)

    # A class that calls super().step() has torch call the hooks twice, one within the other.

    def _push(self, optimizer: Optimizer) -> None:
        if not any(running is optimizer for running in self._running):
            self._call(self.before, optimizer)
        self._running.append(optimizer)

    def _pop(self) -> None:
        optimizer = self._running.pop()
        if not any(running is optimizer for running in self._running):
            self._call(self.after, optimizer)

    def _stop(self) -> None:
        while self._running:
            self._pop()

    @staticmethod
    def _call(functions: list[Around], optimizer: Optimizer) -> None:
        for function in functions:
            function(optimizer)
