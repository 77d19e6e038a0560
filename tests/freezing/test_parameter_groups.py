from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from lightning_freeze import parameter_groups, select_parameters
from lightning_freeze.selectors import overlay
from tests.nets import Net, loader, trainer
from tests.trees import trees


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_groups_are_disjoint_and_cover(data: st.DataObject) -> None:
    module = data.draw(trees())
    names = [name for name, _ in module.named_parameters()]
    tops = sorted({name.rpartition(".")[0] for name in names} - {""})
    selects = data.draw(st.lists(st.sampled_from([*tops, *names]), unique=True, max_size=3)) if tops else []
    options = {select: {"lr": 0.5**number, "weight_decay": 0.3} for number, select in enumerate(selects, 1)}
    chosen = {select: select_parameters(module, select) for select in selects}
    owner = {name: next((s for s in reversed(selects) if name in chosen[s]), None) for name in names}
    if set(selects) - set(owner.values()):
        with pytest.raises(ValueError, match=r"is left with no parameter|names the same parameters"):
            parameter_groups(module, options)
        return
    groups = parameter_groups(module, options)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in module.parameters()}
    assert all(group["params"] for group in groups)
    norms = {id(p) for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.LayerNorm) for p in m.parameters()}
    for name, parameter in module.named_parameters():
        (group,) = [group for group in groups if any(p is parameter for p in group["params"])]
        select = owner[name]
        assert group.get("lr") == (options[select]["lr"] if select else None)
        bias = name.endswith("bias") or id(parameter) in norms
        assert group.get("weight_decay") == (0.0 if bias else 0.3 if select else None)
    assert len({group["name"] for group in groups}) == len(groups)
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.7)
    assert len(optimizer.param_groups) == len(groups)


def test_tuple_as_a_key_is_a_list_of_selectors() -> None:
    net = Net()
    assert set(overlay(net, ["*", "head"]).values()) == {"*", "head"}
    groups = parameter_groups(net, {("head", "neck"): {"lr": 0.1}, "backbone": {"lr": 0.2}}, no_decay=())
    assert [(group["name"], len(group["params"])) for group in groups] == [("head, neck", 4), ("backbone", 8)]
    with pytest.raises(ValueError, match=r'parameter_groups\(\{"hed": …\}\) matches .* Did you mean "head"'):
        parameter_groups(net, {"hed": {}})


@pytest.mark.parametrize(
    ("no_decay", "expected"),
    [
        ("*.bias", {"neck.bias", "head.bias"}),
        (["*.bias"], {"neck.bias", "head.bias"}),
        (["*.bias", "!head"], {"neck.bias"}),
        (["type:LayerNorm", "!head", "neck.bias"], {"neck.bias"}),
        (["!head.bias", "*"][::-1], {"neck.weight", "neck.bias", "head.weight"}),
        (lambda name, parameter: parameter.ndim < 2, {"neck.bias", "head.bias"}),
        (["*.biass", "!hed"], set()),
        ((), set()),
    ],
)
def test_no_decay_selects_what_gets_no_weight_decay(no_decay: Any, expected: set[str]) -> None:
    net = nn.ModuleDict({"neck": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    groups = parameter_groups(net, {}, no_decay=no_decay)
    still = {id(p) for group in groups for p in group["params"] if group.get("weight_decay") == 0.0}
    assert {name for name, p in net.named_parameters() if id(p) in still} == expected


class Shaped(nn.Module):
    """As norms and scales of many libraries, also ConvNeXt V2's; its name says nothing."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(
    ("layer", "decays"),
    [
        *((Shaped(*shape), False) for shape in ((1, 4, 1, 1), (1, 1, 1, 4), (4, 1, 1), (1, 1, 1), (4,), ())),
        (nn.LayerNorm([2, 2]), False),
        *((Shaped(*shape), True) for shape in ((2, 4), (1, 2, 4))),
        *((layer, True) for layer in (nn.Linear(4, 1), nn.Embedding(1, 4), nn.Conv2d(4, 1, 1), nn.Conv1d(1, 4, 1))),
    ],
)
def test_vectors_do_not_decay_whatever_their_shape(layer: nn.Module, decays: bool) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(nn.Sequential(layer), {}), weight_decay=0.1)
    (group,) = [g for g in optimizer.param_groups if any(p is layer.weight for p in g["params"])]
    assert group["weight_decay"] == (0.1 if decays else 0.0)


def test_group_names_are_unique_and_tensor_options_not_shared(tmp_path: Path) -> None:
    net = nn.ModuleDict({"rest": nn.Linear(2, 2), "head": nn.Linear(2, 1), "tail": nn.Linear(1, 1)})
    options = {
        "rest": {"lr": torch.tensor(0.1)},
        "head.weight": {"name": "H"},
        "head.bias": {"name": "H", "lr": 1.0},
    }
    groups = parameter_groups(net, options)
    assert [group["name"] for group in groups] == [
        "rest",
        "rest/no_decay",
        "H",
        "H/no_decay",
        "rest-2",
        "rest/no_decay-2",
    ]
    groups[0]["lr"].mul_(0.5)
    assert groups[1]["lr"] == torch.tensor(0.1) == options["rest"]["lr"]
    assert all(group["params"] for group in groups)
    optimizer = torch.optim.AdamW(parameter_groups(net, {**options, "rest": {"lr": 0.1}}))

    class Fits(Net):
        def configure_optimizers(self) -> Any:
            return [optimizer], [ExponentialLR(optimizer, 0.9)]

    fits = Fits()
    fits.mine = net
    logger = CSVLogger(tmp_path)
    trainer(callbacks=[LearningRateMonitor()], logger=logger, max_epochs=1, log_every_n_steps=1).fit(fits, loader())


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        (
            {"wte": {"lr": 1.0}, "lm_head": {}},
            {},
            ValueError,
            "'wte': …}) names the same parameters as 'lm_head': wte.",
        ),
        ({"h": {}, "*": {}}, {}, ValueError, "'h': …}) is left with no parameter: later selectors"),
        ({"h": {"params": []}}, {}, ValueError, "what a group holds follows from its selector. Leave params out."),
        ({"h": 0.1}, {}, TypeError, "parameter_groups({'h': 0.1}): the options of a group are a dict"),
        ([{"h": {}}], {}, TypeError, "options are a dict of selectors"),
        ({}, {"no_decay": "re:("}, ValueError, 'parameter_groups(no_decay="re:(") is no regular expression'),
        ({}, {"no_decay": ["!h"]}, ValueError, "takes away from nothing: it comes first"),
        ({}, {"no_decay": None}, TypeError, "A selector is a string"),
    ],
)
def test_impossible_groups_are_refused_in_plain_words(
    options: Any, settings: Any, error: type[Exception], message: str
) -> None:
    net = nn.ModuleDict({"wte": nn.Embedding(3, 2), "h": nn.Linear(2, 2), "lm_head": nn.Linear(2, 3, bias=False)})
    net["lm_head"].weight = net["wte"].weight
    with pytest.raises(error, match=re.escape(message)):
        parameter_groups(net, options, **settings)
