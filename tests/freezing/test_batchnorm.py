from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from lightning_freeze import freeze_batchnorm, unfreeze, unfreeze_batchnorm
from lightning_freeze.freezing.batchnorm import (
    affine_frozen_by_hand,
    has_running_statistics,
)
from lightning_freeze.freezing.eval_mode import hold, is_held, release, wholly_frozen
from lightning_freeze.schedule.meaning import eval_modules
from tests.nets import moved, snapshot
from tests.trees import subsets, trees

LAYERS: dict[str, Any] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "no affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
    "lazy": (lambda: nn.LazyBatchNorm2d(), (4, 3, 2, 2)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (4, 3, 2, 2)),
    "timm": (lambda: timm.layers.BatchNormAct2d(3), (4, 3, 2, 2)),
}


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: child.training for name, child in module.named_modules()}


@pytest.mark.parametrize("train_affine", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_batchnorm_keeps_statistics_after_train(kind: str, train_affine: bool) -> None:
    make, shape = LAYERS[kind]
    net = nn.Sequential(nn.Identity(), make(), nn.Dropout())
    net(torch.randn(shape))
    assert list(freeze_batchnorm(net, train_affine=train_affine)) == ["1"]
    before = snapshot(net)
    for act in (net.train, net[1].train, lambda: net.train(False).train(True), lambda: net.requires_grad_(True)):
        act()
        net(torch.randn(shape))
        assert not moved(before, snapshot(net))
        assert net.training
        assert net[2].training
        assert not net[1].training
    net.requires_grad_(True)
    unfreeze_batchnorm(net)
    net(torch.randn(shape))
    assert {name.split(".")[1] for name in moved(before, snapshot(net))} >= {"running_mean", "running_var"}
    assert "train" not in net[1].__dict__


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flags_and_modes_return_in_whatever_order_holders_release(data: st.DataObject) -> None:
    """Whoever holds and releases, in any order: in the end flags and modes are those at the start."""
    module = data.draw(trees())
    module.train(data.draw(st.booleans()))
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.BatchNorm1d)}
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    before, train_affine = modes(module), data.draw(st.booleans())
    holds: dict[str, Any] = {
        "hand": lambda: freeze_batchnorm(module, train_affine=train_affine),
        "fit": lambda: [hold(layer) for layer in layers.values()],
    }
    releases: dict[str, Any] = {
        "hand": lambda: unfreeze_batchnorm(module),
        "fit": lambda: [release(layer, training=module.training) for layer in layers.values()],
    }
    for holder in data.draw(st.permutations(list(holds))):
        holds[holder]()
    assert freeze_batchnorm(module, train_affine=train_affine) == {}
    frozen = {id(p) for layer in layers.values() for p in layer.parameters()}
    assert set(affine_frozen_by_hand(module.modules())) == (set() if train_affine else frozen)
    for number, holder in enumerate(data.draw(st.permutations(list(holds))), 1):
        assert all(is_held(layer) and not layer.training for layer in layers.values())
        releases[holder]()
        assert all(is_held(layer) == (number < 2) for layer in layers.values())
    assert modes(module) == before
    assert flags == {name: p.requires_grad for name, p in module.named_parameters()}
    assert not any("train" in child.__dict__ for child in module.modules())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_wholly_frozen_modules_are_those_without_a_trainable_parameter(data: st.DataObject) -> None:
    """Against the words: all of a module's parameters are frozen, or it is inside such a module and nowhere else."""
    module = data.draw(trees())
    if data.draw(st.booleans()):  # a layer without parameters that several use
        shared = nn.Dropout()
        for child in list(module.modules()):
            if not list(child.parameters(recurse=False)) and data.draw(st.booleans()):
                child.add_module("shared", shared)
    chosen = data.draw(subsets(module))
    trains = {id(p) for name, p in module.named_parameters() if name in chosen}

    def frozen(child: nn.Module) -> bool:
        parameters = [id(p) for p in child.parameters()]
        return bool(parameters) and not trains & set(parameters)

    def above(name: str) -> list[nn.Module]:
        parts = name.split(".")
        return [module.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]

    named = list(module.named_modules(remove_duplicate=False))
    expected = {child for _, child in named} - {
        child for name, child in named if not any(frozen(parent) for parent in above(name))
    }
    found = wholly_frozen(module, trains)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_module_that_learns_in_buffers_only_freezes_with_its_siblings() -> None:
    """A codebook that follows what it is shown, as in VQ-VAE, has no parameter that could freeze."""
    net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), nn.Module()), "head": nn.Linear(2, 1)})
    net["encoder"][1].register_buffer("codes", torch.zeros(2, 2))
    head = {id(p) for p in net["head"].parameters()}
    assert eval_modules(net, head, "batchnorm") == [net["encoder"][1]]
    assert eval_modules(net, set(map(id, net.parameters())), "batchnorm") == []


def test_layer_in_eval_mode_by_hand_is_in_eval_mode_again_after() -> None:
    """A layer put in eval mode by hand before is in eval mode again after, unless train() was called meanwhile."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    net[0].eval()
    freeze_batchnorm(net)
    unfreeze_batchnorm(net)
    assert [layer.training for layer in net] == [False, True]
    freeze_batchnorm(net)
    net.train()
    unfreeze_batchnorm(net)
    assert [layer.training for layer in net] == [True, True]


def test_second_call_overrides_train_affine_of_the_first() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    net[1].bias.requires_grad = False

    def flags() -> list[bool]:
        return [p.requires_grad for p in net.parameters()]

    before = flags()
    assert list(freeze_batchnorm(net, train_affine=True)) == ["0", "1", "2"]
    assert flags() == before
    assert list(freeze_batchnorm(net)) == ["0", "1"]
    assert not any(flags())
    assert freeze_batchnorm(net) == {}
    unfreeze(net, "0.bias")
    assert list(freeze_batchnorm(net)) == ["0"]
    assert not any(flags())
    assert list(freeze_batchnorm(net, "1", train_affine=True)) == ["1"]
    assert flags() == [False, False, *before[2:]]
    assert freeze_batchnorm(net, "1", train_affine=True) == {}
    assert list(freeze_batchnorm(net, train_affine=True)) == ["0"]
    assert flags() == before
    freeze_batchnorm(net)
    unfreeze_batchnorm(net)
    assert flags() == before
    assert modes(net) == {"": True, "0": True, "1": True, "2": True}


class Split(nn.Module):
    """A parametrization with two tensors in the place of one, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.scale * (a + b)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight / 2, weight / 2


@pytest.mark.parametrize(
    ("kind", "when"),
    [*itertools.product([nn.Identity, Split], ["before", "while frozen"]), (nn.Identity, "before, then off")],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_parametrized_affine_parameters_freeze_and_come_back(kind: type[nn.Module], when: str, trainable: bool) -> None:
    """What the affine parameters are made of freezes and comes back as they do, whatever is put on or taken off."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    net[0].weight.requires_grad_(trainable)
    if when.startswith("before"):
        parametrize.register_parametrization(net[0], "weight", kind())
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    assert list(freeze_batchnorm(net)) == ["0"]
    assert not any(p.requires_grad for p in net.parameters())
    assert set(affine_frozen_by_hand(net.modules())) == set(map(id, net.parameters()))
    if when == "while frozen":
        parametrize.register_parametrization(net[0], "weight", kind())
        before |= {name: trainable for name, _ in net.named_parameters() if "original" in name}
    if when.endswith("off"):
        parametrize.remove_parametrizations(net[0], "weight")
        before["0.weight"] = trainable
    assert list(unfreeze_batchnorm(net)) == ["0"]
    assert net[0].training
    after = {name: p.requires_grad for name, p in net.named_parameters()}
    assert after.items() <= (before | {"0.parametrizations.weight.0.scale": True}).items()


def test_copies_of_a_frozen_layer_unfreeze_on_their_own() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2))
    freeze_batchnorm(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin.train()
        assert not twin[0].training
        assert list(unfreeze_batchnorm(twin)) == ["0"]
        assert twin[0].training
        assert twin[0].weight.requires_grad
        assert not net[0].training


def test_children_of_a_held_module_still_change_mode() -> None:
    net = nn.Sequential(nn.Sequential(nn.Dropout()))
    hold(net[0])
    net.eval()
    net.train()
    assert (net.training, net[0].training, net[0][0].training) == (True, False, True)
    release(net[0])
    assert net[0].training


class Switched(nn.Sequential):
    """Does something when its mode changes, as feature extractors of torchvision do, and keeps a child in eval mode."""

    graph = "train"

    def train(self, mode: bool = True, graph: str | None = None) -> nn.Module:
        super().train(mode)
        self.graph = graph or ("train" if mode else "eval")
        self[1].eval()
        return self


def disabled_train(mode: bool = True) -> None:
    """Stands in the place of ``module.train``: what many do to keep an encoder in eval mode."""


@pytest.mark.parametrize("whole", [False, True], ids=["the module alone", "and all below"])
def test_train_methods_of_users_still_run_in_a_held_module(whole: bool) -> None:
    net = nn.Sequential(Switched(Switched(nn.Dropout(), nn.ReLU()), nn.Dropout()), nn.Sequential(nn.Dropout()))
    net[1].eval().train = disabled_train
    net.train()
    before, inside = modes(net), net[0][0]
    assert before == {"": True, "0": True, "0.0": True, "0.0.0": True, "0.0.1": False, "0.1": False, "1": False} | {
        "1.0": False
    }
    held = list(net.modules())[1:] if whole else [net[0]]
    for module in held:
        hold(module)
    for act in (lambda: net, net.train, lambda: net.eval().train()):
        act()
        assert (net[0].training, net[0].graph) == (False, "eval")
        assert (inside.training, inside.graph) == ((False, "eval") if whole else (True, "train"))
        assert inside[0].training == (not whole)
        assert not net[1][0].training
    net[0].train(True, graph="both")
    assert (net[0].training, net[0].graph) == (False, "both")
    for module in held:
        release(module)
    if not whole:
        assert modes(net)["0.1"]  # asked for training mode while its parent was held
        net.train()
    assert modes(net) == before
    assert (net[0].graph, inside.graph) == ("train", "train")
    assert [name for name, child in net.named_modules() if "train" in child.__dict__] == ["1"]


def test_selector_without_running_statistics_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for act in (freeze_batchnorm, unfreeze_batchnorm):
        with pytest.raises(ValueError, match="no layer with running statistics"):
            act(net, "0")
        with pytest.raises(ValueError, match="matches no parameter or buffer"):
            act(net, "2")
    assert freeze_batchnorm(nn.Linear(2, 2)) == {}
    assert freeze_batchnorm(nn.ReLU()) == {}


@pytest.mark.parametrize(
    ("module", "has"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.BatchNorm1d(2, track_running_stats=False), False),
        (nn.InstanceNorm1d(2), False),
        (nn.LayerNorm(2), False),
        (nn.GroupNorm(1, 2), False),
    ],
    ids=str,
)
def test_only_layers_that_track_statistics_count_as_batchnorm(module: nn.Module, has: bool) -> None:
    assert has_running_statistics(module) == has
