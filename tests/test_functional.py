from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze import freeze, frozen, trainable_summary, unfreeze
from lightning_freeze.functional import can_train, scalars
from tests.trees import subsets, trees


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in module.named_parameters()}


def interrupted(module: nn.Module, select: list[str]) -> None:
    """Leave the block by an exception, a flag set inside; it does not stay either."""
    with contextlib.suppress(KeyboardInterrupt), frozen(module, select):
        dict(module.named_parameters())[select[0]].requires_grad = True
        raise KeyboardInterrupt


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_freeze_and_unfreeze_restore_every_flag(data: st.DataObject) -> None:
    module = data.draw(trees())
    chosen = data.draw(subsets(module)) or {next(module.named_parameters())[0]}
    before = flags(module)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)

    with frozen(module, sorted(chosen)):
        assert flags(module) == {name: flag and name not in chosen for name, flag in before.items()}
        assert all(p.grad is not None for p in module.parameters())
    assert flags(module) == before
    interrupted(module, sorted(chosen))
    assert flags(module) == before

    changed = freeze(module, sorted(chosen))
    assert set(changed) == {name for name in chosen if before[name]}
    named = dict(module.named_parameters())
    assert all(named[name] is p and p.grad is None for name, p in changed.items())
    assert all(p.grad is not None for name, p in named.items() if name not in changed)
    assert freeze(module, sorted(chosen)) == {}
    undone = unfreeze(module, sorted(changed)) if changed else {}
    assert undone.keys() == changed.keys()
    assert flags(module) == before
    assert set(unfreeze(module)) == {name for name, flag in before.items() if not flag}
    assert all(flags(module).values())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_summary_counts_every_scalar_once(data: st.DataObject) -> None:
    module = data.draw(trees())
    summary = trainable_summary(module)
    parameters = list(module.parameters())
    assert summary.total == sum(p.numel() for p in parameters)
    assert summary.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert summary.fraction == summary.trainable / summary.total
    names = {name for name, _ in module.named_modules(remove_duplicate=False)} | dict(module.named_parameters()).keys()
    assert {row.name for row in summary.rows} <= names
    assert {row.total for row in trainable_summary(module, 99).rows} <= {
        sum(p.numel() for p in owner.parameters(False)) for owner in module.modules()
    } | {p.numel() for p in parameters}
    lines = str(summary).splitlines()
    assert len(lines) == len(summary.rows) + 3
    assert lines[-1].split()[0] == "total"


def test_summary_of_a_bare_layer_and_of_no_parameters() -> None:
    assert [row.kind for row in trainable_summary(nn.Linear(2, 1)).rows] == ["Parameter", "Parameter"]
    empty = trainable_summary(nn.ReLU())
    assert (empty.trainable, empty.total, empty.fraction) == (0, 0, 0.0)
    assert "0.0 %" in str(empty)


def rows(module: nn.Module, depth: int) -> list[str]:
    return [row.name for row in trainable_summary(module, depth).rows]


def test_depth_of_a_summary_counts_below_a_wrapper_of_one_module() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(1))
            self.blocks = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1))
            self.head = nn.Linear(1, 1)

    net = nn.ModuleDict({"loss": nn.CrossEntropyLoss(), "model": Body()})
    assert rows(net, 1) == ["model.token", "model.blocks", "model.head"]
    assert rows(net, 2) == ["model.token", "model.blocks.0", "model.blocks.1", "model.head"]
    assert rows(net, 3) == rows(net, 9) == ["model.token", "model.blocks.0.0", "model.blocks.1", "model.head"]
    assert rows(nn.ModuleDict({"around": torch.compile(net, backend="eager")}), 1) == [
        f"around.{name}" for name in rows(net, 1)
    ]
    assert rows(nn.ModuleDict({"model": nn.Linear(1, 1)}), 1) == ["model"]
    net["extra"] = nn.Linear(1, 1)
    assert rows(net, 1) == ["model", "extra"]
    with pytest.raises(ValueError, match=r"trainable_summary\(depth=0\): depth is at least 1"):
        trainable_summary(net, depth=0)


def test_freeze_of_an_unknown_name_is_an_error() -> None:
    for act in (freeze, unfreeze):
        with pytest.raises(ValueError, match="matches no parameter"):
            act(nn.Linear(2, 1), "wait")
    with pytest.raises(ValueError, match="matches no parameter"), frozen(nn.Linear(2, 1), "wait"):
        pass


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_unfreeze_passes_over_dtypes_without_gradients(dtype: torch.dtype) -> None:
    net = nn.Linear(2, 1).requires_grad_(False)
    net.table = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    assert not can_train(net.table)
    assert list(unfreeze(net)) == ["weight", "bias"]


def test_lazy_parameters_freeze_and_count_nothing() -> None:
    net = nn.LazyLinear(3)
    assert list(freeze(net)) == ["weight", "bias"]
    assert scalars(net.weight) == 0
    with frozen(net):
        pass
    net(torch.ones(1, 2))
    assert not any(p.requires_grad for p in net.parameters())
    assert trainable_summary(net).total == 9


@pytest.mark.parametrize("index", [0, 1, 3])
def test_frozen_restores_all_flags_if_one_cannot_be_restored(index: int) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    converted = list(net.parameters())[index]
    with pytest.raises(RuntimeError, match="floating point"), frozen(net):
        converted.data = converted.data.to(torch.int8)
    assert [p.requires_grad for p in net.parameters()] == [place != index for place in range(4)]


def test_summary_is_the_same_through_wrappers() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    expected = trainable_summary(net)
    parallel = nn.DataParallel(net)
    for wrapped in (parallel, *(torch.compile(module, backend="eager") for module in (net, parallel))):
        assert trainable_summary(wrapped) == expected


def test_summary_in_a_notebook_has_the_rows_of_the_printed_one() -> None:
    html = trainable_summary(nn.ModuleDict({"a<b": nn.Linear(2, 1)}))._repr_html_()
    assert "a&lt;b" in html
    assert html.count("<tr>") == 3
    assert "100.0 %" in html
