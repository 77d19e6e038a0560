from __future__ import annotations

import torch
from torch import nn

from lightning_freeze.audit.optimizers import places_of
from tests.nets import Net, adamw, sgd


def test_parameters_in_two_places_are_found_in_one_and_in_two_optimizers() -> None:
    net = Net()
    optimizer, other = sgd(net.parameters()), adamw(net.head.parameters())
    parameters = dict(net.named_parameters())
    assert all(len(places) == 1 for places in places_of([optimizer], parameters).values())
    assert {name for name, places in places_of([optimizer, other], parameters).items() if len(places) > 1} == {
        "head.weight",
        "head.bias",
    }
    assert all(len(places) == 1 for places in places_of([optimizer, optimizer], parameters).values())
    optimizer.param_groups[0]["params"].append(net.neck.bias)
    assert places_of([optimizer], parameters)["neck.bias"] == ["SGD 0, group 0", "SGD 0, group 0"]


def test_equal_values_are_not_one_parameter() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert places_of([sgd([a]), adamw([b])], {"a": a, "b": b}) == {"a": ["SGD 0, group 0"], "b": ["AdamW 1, group 0"]}
    assert places_of([sgd([a])], {"b": b}) == {"b": []}
