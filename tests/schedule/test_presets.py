from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze import (
    FreezeSchedule,
    Phase,
    chain_thaw,
    gradual_unfreezing,
    layerwise_sampling,
    linear_probe_then_finetune,
)
from tests.nets import Net, loader, trainer

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
        (lambda: gradual_unfreezing(["a", "b"], epochs_per_phase=0), "epochs is at least 1"),
        (lambda: chain_thaw([""]), "at least one name"),
        (lambda: layerwise_sampling(["a"], total_steps=9, count=2), r"count=2\): between 1 and 1"),
        (lambda: layerwise_sampling(["a"], total_steps=0, count=1), "total_steps=0"),
        (lambda: layerwise_sampling(["a"], total_steps=9, count=1, every_n_steps=0), "every_n_steps=0"),
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


LAYERS = ["backbone.0", "backbone.4", "neck", "head"]


@pytest.mark.parametrize(
    ("phases", "last"),
    [
        (linear_probe_then_finetune(backbone_scale=0.1), 1),
        (linear_probe_then_finetune(["head", "!head.bias"], backbone_scale=0.1), 1),
        (gradual_unfreezing(LAYERS, lr_decay=2.6), 3),
        (chain_thaw(LAYERS), 4),
        (layerwise_sampling(LAYERS[:3], ["head"], total_steps=36, every_n_steps=5), 7),
    ],
)
def test_preset_reaches_its_last_phase_in_a_fit(phases: list[Phase], last: int) -> None:
    schedule = FreezeSchedule(phases, verbose=False, optimizer_state="drop")
    trainer(callbacks=[schedule], max_epochs=6).fit(Net(), loader(), loader())
    assert schedule.phase_index == last
