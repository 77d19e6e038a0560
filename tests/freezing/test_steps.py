from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim.optimizer import Optimizer

from lightning_freeze.freezing.steps import Steps


class Super(torch.optim.SGD):
    """Torch calls the hooks of a class that calls super().step() twice, one within the other."""

    fails = False

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.fails:
            raise ArithmeticError
        return super().step(closure)


class Outer(Optimizer):
    def __init__(self, base: Optimizer) -> None:
        super().__init__([torch.zeros(1)], {})
        self.base = base

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@pytest.fixture
def noted() -> Iterator[tuple[Steps, list[str]]]:
    steps, notes = Steps(), list[str]()
    steps.before.append(lambda optimizer: notes.append(f"before {type(optimizer).__name__}"))
    steps.after.append(lambda optimizer: notes.append(f"after {type(optimizer).__name__}"))
    steps.counted.append(lambda optimizer: notes.append(f"counted {type(optimizer).__name__}"))
    yield steps, notes
    steps.close()


def super_sgd() -> Super:
    return Super([torch.zeros(1, requires_grad=True)], lr=0.1)


def test_step_that_calls_super_counts_once(noted: Any) -> None:
    _, notes = noted
    super_sgd().step()
    assert notes == ["before Super", "after Super", "counted Super"]


@pytest.mark.parametrize("by_keyword", [False, True])
def test_while_a_closure_runs_no_step_is_on(noted: Any, by_keyword: bool) -> None:
    _, notes = noted

    def closure() -> float:
        notes.append("closure")
        return 1.0

    optimizer = Outer(super_sgd())
    loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert loss == 1.0
    after = ["before Outer", "before Super", "after Super", "after Outer", "counted Outer"]
    assert notes == ["closure", *after]


def test_closure_called_twice_or_never_is_one_step(noted: Any) -> None:
    _, notes = noted

    class Calls(torch.optim.SGD):
        times = 0

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            for _ in range(self.times):
                closure()

    optimizer = Calls([torch.zeros(1)], lr=0.1)
    optimizer.step(lambda: notes.append("closure"))
    assert notes == ["counted Calls"]
    optimizer.times = 2
    optimizer.step(lambda: notes.append("closure"))
    once = ["closure", "before Calls", "after Calls"]
    assert notes == ["counted Calls", *once, *once, "counted Calls"]


def test_step_that_raised_is_over_after_a_reset(noted: Any) -> None:
    steps, notes = noted
    optimizer = super_sgd()
    optimizer.fails = True
    with pytest.raises(ArithmeticError):
        Outer(optimizer).step()
    steps.reset()
    assert notes == ["before Outer", "before Super", "after Super", "after Outer"]
    notes.clear()
    optimizer.fails = False
    optimizer.step()
    assert notes == ["before Super", "after Super", "counted Super"]


def test_closure_that_raises_leaves_no_step_on(noted: Any) -> None:
    _, notes = noted

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        super_sgd().step(closure)
    assert notes == []


def test_paused_steps_call_nothing(noted: Any) -> None:
    steps, notes = noted
    failing = super_sgd()
    failing.fails = True
    with pytest.raises(ArithmeticError), steps.paused():
        failing.step()
    with steps.paused():
        super_sgd().step()
    assert notes == []
    super_sgd().step()
    assert notes[-1] == "counted Super"


def test_no_function_is_called_after_close(noted: Any) -> None:
    steps, notes = noted
    steps.close()
    super_sgd().step()
    assert notes == []
