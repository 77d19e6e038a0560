from __future__ import annotations

import copy
import math
import pickle
import random
from collections import Counter
from operator import add
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze import (
    Phase,
    chain_thaw,
    gradual_unfreezing,
    layerwise_sampling,
    linear_probe_then_finetune,
    select_parameters,
)
from lightning_freeze.schedule.preset import Preset

layer_lists = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


@given(layer_lists, st.integers(1, 3), st.sampled_from([1.0, 2.6, 0.5]))
def test_gradual_unfreezing_adds_one_layer_a_phase(layers: list[str], epochs: int, decay: float) -> None:
    phases = gradual_unfreezing(layers, epochs_per_phase=epochs, lr_decay=decay)
    assert [phase.train for phase in phases] == [layers[start:] for start in reversed(range(len(layers)))]
    assert [phase.epochs for phase in phases] == [epochs] * (len(layers) - 1) + [None]
    for phase in phases:
        rates = [phase.scales.get(layer, 1.0) for layer in phase.train]
        assert rates == pytest.approx([decay**-depth for depth in reversed(range(len(rates)))])


@given(layer_lists, st.integers(1, 3))
def test_chain_thaw_trains_each_layer_alone_then_all(layers: list[str], epochs: int) -> None:
    phases = chain_thaw(layers, epochs_per_phase=epochs)
    assert [phase.train for phase in phases] == [layers[-1], *layers[:-1], "*"]
    assert [phase.epochs for phase in phases] == [epochs] * len(layers) + [None]


@settings(deadline=None)
@given(layer_lists, st.integers(1, 200), st.integers(1, 30), st.integers(0, 9), st.data())
def test_layerwise_sampling_draws_the_same_layers_for_one_seed(
    layers: list[str], total: int, every: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(layers)))

    def phases() -> list[Phase]:
        return layerwise_sampling(layers, ["z"], total_steps=total, count=count, every_n_steps=every, seed=seed)

    state = random.getstate()
    drawn = phases()
    assert random.getstate() == state  # the global generator is the user's
    assert drawn == phases()
    assert (len(drawn) - 1) * every < total <= len(drawn) * every
    assert [phase.steps for phase in drawn] == [every] * (len(drawn) - 1) + [None]
    for phase in drawn:
        always, *chosen = phase.train
        assert always == "z"
        assert len(set(chosen)) == count
        assert chosen == [layer for layer in layers if layer in chosen]


def test_linear_probe_trains_the_head_then_all() -> None:
    probe, rest = linear_probe_then_finetune(["head", "neck"], probe_epochs=3, backbone_scale=0.1)
    assert (probe.train, probe.epochs, rest.train, rest.has_end) == (["head", "neck"], 3, "*", False)
    assert rest.scales == {"*": 0.1, ("head", "neck"): 1.0}
    assert linear_probe_then_finetune("head", backbone_scale=0.1)[1].scales == {"*": 0.1, "head": 1.0}
    assert layerwise_sampling(["a"], "head", total_steps=1, count=1)[0].train == ["head", "a"]
    assert linear_probe_then_finetune()[1].scales == {}


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: gradual_unfreezing([]), "at least one name"),
        (lambda: gradual_unfreezing(["a"], lr_decay=0.0), "lr_decay=0.0"),
        (lambda: gradual_unfreezing(["a", "b"], epochs_per_phase=0), "epochs_per_phase is at least 1"),
        (lambda: chain_thaw([""]), "at least one name"),
        (lambda: layerwise_sampling(["a"], total_steps=9, count=2), r"count=2\): between 1 and 1"),
        (lambda: layerwise_sampling(["a"], total_steps=0, count=1), "total_steps=0"),
        (lambda: layerwise_sampling(["a"], total_steps=9, count=1, every_n_steps=0), "every_n_steps=0"),
        (lambda: layerwise_sampling(["a", "b"], count=1, weights=[1.0]), "give each of the 2 layers a finite weight"),
        (lambda: layerwise_sampling(["a", "b"], count=1, weights=[1.0, -1.0]), "a finite weight, 0 or more"),
        (lambda: layerwise_sampling(["a", "b"], count=2, weights=[1.0, 0.0]), r"count=2\): between 1 and 1"),
        (lambda: layerwise_sampling(["a"], count=1, weights=[1], order="ascending"), "are for order='random'"),
        (lambda: layerwise_sampling(["a"], count=1, order="up"), "order is one of 'random', 'ascending'"),
        (lambda: gradual_unfreezing([["a"], []]), "at least one name"),
        (lambda: linear_probe_then_finetune([]), "at least one name"),
        (lambda: linear_probe_then_finetune(backbone_scale=0.0), "above 0"),
    ],
)
def test_presets_refuse_values_out_of_range(build: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: gradual_unfreezing(None), "layers=None: give names"),
        (lambda: gradual_unfreezing(nn.Sequential(nn.Linear(1, 1))), "give names, for example"),
        (lambda: gradual_unfreezing(["a"], lr_decay="2.6"), "lr_decay is a number"),
        (lambda: layerwise_sampling(["a"], total_steps=1e3, count=1), r"total_steps=1000.0\): total_steps is a whole"),
        (
            lambda: layerwise_sampling(["a"], total_steps=9, count=1, every_n_steps=2.5),
            "every_n_steps is a whole number",
        ),
        (lambda: layerwise_sampling(["a"], total_steps=9, count=1.0), "count is a whole number"),
    ],
)
def test_presets_refuse_other_types(build: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        build()


# Layers of a module


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    return nn.ModuleDict({"model": model})


def trained(module: nn.Module, phase: Phase) -> set[str]:
    return set(select_parameters(module, phase.train))


RESNET = ["model.layer1", "model.layer2", "model.layer3", "model.layer4", "model.fc"]


@pytest.mark.parametrize("preset", [gradual_unfreezing(RESNET), chain_thaw(RESNET)], ids=["gradual", "chain"])
def test_last_phase_trains_the_stem_of_a_resnet_that_no_layer_names(preset: Preset) -> None:
    net = on_meta("resnet18")
    resolved = preset.resolve(net)
    everything = {name for name, _ in net.named_parameters()}
    stem = {name for name in everything if name.startswith(("model.conv1", "model.bn1"))}
    assert stem
    assert trained(net, resolved[-1]) == everything
    assert not any(trained(net, phase) & stem for phase in resolved[:-1])
    assert [phase.has_end for phase in resolved] == [True] * (len(resolved) - 1) + [False]
    assert "no layer names model.conv1, model.bn1; they" in resolved.said
    assert gradual_unfreezing([["model.conv1", "model.bn1"], *RESNET]).resolve(net).said == ""


def test_rest_of_a_vit_joins_last_at_the_lowest_rate() -> None:
    net = on_meta("vit_b_32")
    names = ["model.encoder.layers[:6]", "model.encoder.layers[6:]", "model.heads"]
    resolved = gradual_unfreezing(names, lr_decay=2.0, epochs_per_phase=3).resolve(net)
    rest = ("model.class_token", "model.conv_proj", "model.encoder.pos_embedding", "model.encoder.ln")
    assert [phase.epochs for phase in resolved] == [3, 3, 3, None]
    assert trained(net, resolved[-1]) == {name for name, _ in net.named_parameters()}
    assert resolved[-1].scales == {rest: 0.125, names[0]: 0.25, names[1]: 0.5}
    assert resolved[-2].scales == {names[0]: 0.25, names[1]: 0.5}


def test_module_name_unfreezes_its_blocks_between_head_and_embeddings() -> None:
    net = on_meta("vit_b_32")
    resolved = gradual_unfreezing("model.encoder.layers", lr_decay=2.0).resolve(net)
    everything, blocks = {name for name, _ in net.named_parameters()}, "model.encoder.layers.encoder_layer_"
    head = {name for name in everything if name.startswith(("model.heads", "model.encoder.ln"))}
    before = {name for name in everything if not name.startswith((blocks, "model.heads", "model.encoder.ln"))}
    assert len(resolved) == 14
    assert trained(net, resolved[0]) == head
    for number in range(12):
        new = trained(net, resolved[number + 1]) - trained(net, resolved[number])
        assert new == {name for name in everything if name.startswith(f"{blocks}{11 - number}.")}
    assert trained(net, resolved[-1]) - trained(net, resolved[-2]) == before
    assert before == {
        "model.class_token",
        "model.conv_proj.weight",
        "model.conv_proj.bias",
        "model.encoder.pos_embedding",
    }
    assert resolved[-1].scales[f"{blocks}11"] == 0.5
    assert resolved.said == (
        f"gradual_unfreezing('model.encoder.layers'): 12 layers, {blocks}0 to {blocks}11; before them "
        "model.class_token, model.conv_proj, model.encoder.pos_embedding; after them model.encoder.ln, model.heads."
    )
    assert [phase.label for phase in chain_thaw("model.encoder.layers").resolve(net)][1:3] == [
        "model.class_token, model.conv_proj, model.encoder.pos_embedding",
        f"{blocks}0",
    ]


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_t", "densenet121", "vgg11_bn"])
def test_module_name_leaves_out_nothing_and_joins_each_parameter_once(name: str) -> None:
    net = on_meta(name)
    phases = gradual_unfreezing("model").resolve(net)
    before = set[str]()
    for phase in phases:
        assert trained(net, phase) > before
        before = trained(net, phase)
    assert before == {name for name, _ in net.named_parameters()}
    chained = [trained(net, phase) for phase in chain_thaw("model").resolve(net)]
    assert Counter(name for trains in chained[:-1] for name in trains) == Counter(chained[-1])


def test_groups_are_one_layer_each() -> None:
    layers = [["embed", "norm"], "body", ["pooler", "classifier"]]
    phases = gradual_unfreezing(layers, lr_decay=2.0)
    assert [phase.label for phase in phases] == ["from pooler, classifier", "from body", "from embed, norm"]
    assert phases[-1].train == ["embed", "norm", "body", "pooler", "classifier"]
    assert phases[-1].scales == {("embed", "norm"): 0.25, "body": 0.5}
    assert [phase.train for phase in chain_thaw(layers)] == [("pooler", "classifier"), ("embed", "norm"), "body", "*"]
    drawn = layerwise_sampling(layers, (), total_steps=60, count=1, order="ascending")
    assert [phase.train for phase in drawn] == [["embed", "norm"], ["body"], ["pooler", "classifier"]]


def test_what_came_frozen_is_no_rest() -> None:
    net = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("stem", "body", "head", "teacher")})
    idle = set(map(id, net["teacher"].parameters()))
    assert [p.label for p in gradual_unfreezing(["body", "head"]).resolve(net, idle=idle)][-1] == "from stem"
    assert [p.train for p in gradual_unfreezing("body").resolve(net, idle=idle)] == [["head"], ["body", "head"], "*"]
    assert gradual_unfreezing(["stem", "body", "head"]).resolve(net, idle=idle).said == ""


def test_preset_of_a_module_name_has_no_phases_of_its_own() -> None:
    for preset in (
        gradual_unfreezing("body"),
        layerwise_sampling("body", total_steps=9),
        layerwise_sampling(["a"], count=1),
    ):
        for use in (
            list,
            lambda one: [Phase("head", epochs=1), *one],
            lambda one: add(one, []),
            lambda one: add([], one),
        ):
            with pytest.raises(ValueError, match="its phases are known only with the module and the fit"):
                use(preset)
    assert repr(gradual_unfreezing("body")) == "gradual_unfreezing('body')"
    net = nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    for preset in (gradual_unfreezing("body"), chain_thaw(["body", "head"]), layerwise_sampling("body", count=1)):
        for again in (copy.deepcopy(preset), pickle.loads(pickle.dumps(preset))):
            assert again.resolve(net, steps=60) == preset.resolve(net, steps=60)
            assert again.resolve(net, steps=60).resolve(net, steps=30) == preset.resolve(net, steps=30)


def test_presets_of_names_are_lists() -> None:
    phases = gradual_unfreezing(["body", "head"])
    assert isinstance(phases, list)
    assert add(phases, [Phase("*")]) == [*phases, Phase("*")]
    assert add([Phase("*", epochs=1)], phases) == [Phase("*", epochs=1), *phases]
    assert phases == [Phase(["head"], name="from head", epochs=1), Phase(["body", "head"], name="from body")]


# Draws


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.integers(1, 400), st.integers(1, 400))
def test_longer_fit_draws_the_same_and_goes_on(count: int, seed: int, one: int, other: int) -> None:
    net = nn.ModuleDict({f"l{number}": nn.Linear(1, 1, bias=False) for number in range(6)})
    preset = layerwise_sampling(list(net), count=count, every_n_steps=7, seed=seed)
    short, long = (preset.resolve(net, steps=steps) for steps in sorted((one, other)))
    assert [phase.train for phase in short] == [phase.train for phase in long][: len(short)]
    assert len(long) == -(-max(one, other) // 7)


def test_draws_follow_weights_and_seeds() -> None:
    layers = [f"l{number}" for number in range(4)]
    drawn = layerwise_sampling(layers, (), total_steps=40_000, count=1, weights=[1, 3, 0, 4])
    found = Counter(phase.train[0] for phase in drawn)
    assert found.keys() == {"l0", "l1", "l3"}
    assert [found[name] / 2000 for name in ("l0", "l1", "l3")] == pytest.approx([1 / 8, 3 / 8, 1 / 2], abs=0.04)
    even = Counter(name for phase in layerwise_sampling(layers, (), total_steps=40_000) for name in phase.train)
    assert [even[name] / 4000 for name in layers] == pytest.approx([0.25] * 4, abs=0.03)
    trains = [[p.train for p in layerwise_sampling(layers, (), total_steps=400, seed=seed)] for seed in (0, 0, 1)]
    assert trains[0] == trains[1] != trains[2]


def test_draws_in_order_go_around() -> None:
    layers = ["a", "b", "c", "d", "e"]
    up = layerwise_sampling(layers, "z", total_steps=80, count=2, order="ascending")
    assert [phase.train[1:] for phase in up] == [["a", "b"], ["c", "d"], ["a", "e"], ["b", "c"]]
    down = layerwise_sampling(layers, "z", total_steps=60, count=2, order="descending")
    assert [phase.train[1:] for phase in down] == [["d", "e"], ["b", "c"], ["a", "e"]]


@pytest.mark.parametrize(
    ("always", "stays"),
    [(None, ["embed", "head"]), ("head", ["head"]), ((), [])],
)
def test_layerwise_sampling_trains_all_the_time_what_no_layer_names(always: Any, stays: list[str]) -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(1, 1)) for _ in range(3))
    net = nn.ModuleDict({"embed": nn.Linear(1, 1), "blocks": blocks, "head": nn.Linear(1, 1)})
    for layers in ("blocks", [f"blocks[{number}]" for number in range(3)]):
        drawn = layerwise_sampling(layers, always, total_steps=60, count=1, order="ascending").resolve(net)
        assert [set(phase.train[:-1]) for phase in drawn] == [set(stays)] * 3
        for number, phase in enumerate(drawn):
            assert trained(net, Phase(phase.train[-1])) == {f"blocks.{number}.0.weight", f"blocks.{number}.0.bias"}
        assert ("they train all the time" in drawn.said) == (always is None)


def test_draws_of_a_fit_without_end_ask_for_total_steps() -> None:
    net = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"cannot know how many optimizer steps.* or say total_steps=…"):
        layerwise_sampling(["a", "b"]).resolve(net, steps=math.inf)
    with pytest.raises(ValueError, match=r"count=4\): between 1 and 1, the number of layers"):
        layerwise_sampling("a", count=4).resolve(net, steps=9)
