from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze import Phase
from lightning_freeze.freezing.eval_mode import wholly_frozen
from lightning_freeze.schedule.meaning import eval_modules, phase_trains, resolve_phases
from tests.nets import Net
from tests.trees import subsets, trees


def scales_of(module: nn.Module, lr_scale: Any) -> list[Any]:
    phases = [Phase("*", lr_scale=lr_scale)]
    return resolve_phases(module, phases, came_frozen=set(), held={}, mode="batchnorm").scales


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_later_selector_of_lr_scale_counts(data: st.DataObject) -> None:
    module = data.draw(trees())
    names = [name for name, _ in module.named_parameters()]
    some = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1))
    factors = {name: data.draw(st.sampled_from([0.1, 2.0])) for name in some}
    (scales,) = scales_of(module, {"*": 0.5, **factors})
    assert scales == {id(p): factors.get(name, 0.5) for name, p in module.named_parameters()}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_frozen_mode_decides_which_modules_are_in_eval_mode(data: st.DataObject) -> None:
    module = data.draw(trees())
    chosen = data.draw(subsets(module))
    trains = {id(p) for name, p in module.named_parameters() if name in chosen}
    frozen = wholly_frozen(module, trains)
    assert eval_modules(module, trains, "train") == []
    assert eval_modules(module, trains, "eval") == frozen
    assert eval_modules(module, trains, "batchnorm") == [m for m in frozen if isinstance(m, nn.BatchNorm1d)]


def test_phase_trains_no_dtype_without_gradients() -> None:
    net = nn.Linear(2, 1)
    net.table = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    assert list(phase_trains(net, Phase("*"))) == ["weight", "bias"]
    with pytest.raises(ValueError, match="'table' trains nothing: all it selects has a dtype without gradients"):
        phase_trains(net, Phase("table"))


def test_errors_show_the_argument_of_the_phase() -> None:
    with pytest.raises(ValueError, match=r'Phase\(train="hed"\) matches no parameter\. Did you mean "head"\?'):
        phase_trains(Net(), Phase("hed"))
    with pytest.raises(ValueError, match=r'Phase\(lr_scale=\{"hed": …\}\) matches no parameter'):
        scales_of(Net(), {"hed": 0.1})
    with pytest.raises(ValueError, match="is left with no parameter: later selectors name all of them"):
        scales_of(Net(), {"head": 0.1, "*": 0.2})
