from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_freeze import freeze_batchnorm
from lightning_freeze.freezing.ledger import Hold, Ledger
from tests.trees import trees

STRATEGY = SingleDeviceStrategy(device="cpu")


def state(module: nn.Module) -> Any:
    return (
        {name: p.requires_grad for name, p in module.named_parameters()},
        {name: (child.training, "train" in vars(child)) for name, child in module.named_modules()},
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_parameter_trains_iff_nobody_holds_it(data: st.DataObject) -> None:
    """Whoever asks for what, in any order, and whatever other code switches; in the end all is as it came."""
    module = data.draw(trees())
    parameters = {id(p): p for p in module.parameters()}
    keys = list(parameters)
    layers = list(module.modules())
    if data.draw(st.booleans()) and any(isinstance(m, nn.BatchNorm1d) for m in layers):
        freeze_batchnorm(module)
    came = state(module)
    flags = {key: p.requires_grad for key, p in parameters.items()}
    by_hand = {id(p) for m in layers if "train" in vars(m) for p in m.parameters(recurse=False)}
    holds: dict[str, Hold] = {}
    with closing(Ledger(STRATEGY, module)) as ledger:
        places = st.sets(st.integers(0, len(keys) - 1))
        some = places.map(lambda chosen: {keys[place] for place in chosen})
        for _ in range(data.draw(st.integers(1, 5))):
            who = data.draw(st.sampled_from("abc"))
            frozen, trains = data.draw(some), data.draw(some)
            inside = data.draw(st.lists(st.sampled_from(range(1, len(layers))), unique=True)) if len(layers) > 1 else []
            holds[who] = Hold(frozenset(frozen), tuple(layers[i] for i in inside), frozenset(trains))
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            before = ledger.trains
            ledger.hold(who, holds[who])
            ledger.settle()
            held = by_hand.union(*(hold.frozen for hold in holds.values()))
            wanted = set().union(*(hold.trains for hold in holds.values()))
            expected = {key for key in parameters if key not in held and (key in wanted or flags[key])}
            assert ledger.trains == expected
            assert {key for key, p in parameters.items() if p.requires_grad} == expected
            assert all(parameters[key].grad is None for key in held | (expected - before))
            in_eval = {child for hold in holds.values() for child in hold.eval_mode}
            module.train()
            assert all(not child.training for child in in_eval)
            for key in (
                key for key in keys if key in held | (wanted & expected)
            ):  # as for a GAN or an online evaluation
                parameters[key].requires_grad = data.draw(st.booleans())
                parameters[key].grad = torch.ones_like(parameters[key]) if parameters[key].requires_grad else None
            ledger.gradients.drop()
            assert all(parameters[key].grad is None for key in held)
            ledger.settle()
            assert {key for key, p in parameters.items() if p.requires_grad} == expected
    ledger.close()
    assert state(module)[0] == came[0]
    assert {name: has for name, (_, has) in state(module)[1].items()} == {n: has for n, (_, has) in came[1].items()}


def test_flags_that_no_holder_asks_for_stay_as_the_user_sets_them() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    ledger = Ledger(STRATEGY, net)
    ledger.hold("me", Hold(frozenset(map(id, net[0].parameters()))))
    ledger.settle()
    net[1].requires_grad_(False)
    ledger.settle()
    ledger.close()
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, False]


def test_flags_switched_by_others_are_warned_of_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    ledger = Ledger(STRATEGY, net)
    ledger.hold("me", Hold(frozenset(map(id, net[0].parameters()))))
    ledger.settle()
    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        for _ in range(2):
            net.requires_grad_(True)
            net(torch.ones(1, 1)).sum().backward()
            ledger.gradients.drop()
            ledger.settle()
    ledger.close()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "other code has switched on requires_grad of 2 frozen parameter(s): 0.weight, 0.bias. They stay frozen"
    )


def test_parameters_that_come_in_mid_fit_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    ledger = Ledger(STRATEGY, net)
    ledger.settle()
    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        ledger.look_again()
        assert caplog.records == []
        net[1] = nn.Linear(1, 1)
        for _ in range(2):
            ledger.look_again()
    ledger.close()
    (record,) = caplog.records
    assert record.getMessage().startswith("2 parameter(s) are in the module that were not when the fit began: 1.weight")
