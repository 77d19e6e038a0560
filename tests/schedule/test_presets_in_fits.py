"""Presets at work: in fits, resumed, from YAML, in previews."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_freeze import (
    FreezeSchedule,
    TargetNetwork,
    chain_thaw,
    gradual_unfreezing,
    layerwise_sampling,
    linear_probe_then_finetune,
)
from lightning_freeze.schedule.preset import Preset
from tests.nets import Net, adamw, loader, same, snapshot, trainer

LAYERS = ["backbone.0", "backbone.4", "neck", "head"]


@pytest.mark.parametrize(
    ("phases", "last"),
    [
        (linear_probe_then_finetune(backbone_scale=0.1), 1),
        (linear_probe_then_finetune(["head", "!head.bias"], backbone_scale=0.1), 1),
        (gradual_unfreezing(LAYERS, lr_decay=2.6), 4),
        (chain_thaw(LAYERS), 4),
        (gradual_unfreezing("backbone"), 2),
        (chain_thaw("backbone"), 3),
        (layerwise_sampling(LAYERS[:3], ["head"], total_steps=36, every_n_steps=5), 7),
        (layerwise_sampling(LAYERS[:3], every_n_steps=5), 7),
        (layerwise_sampling("backbone", count=1, every_n_steps=4), 8),
    ],
)
def test_preset_reaches_its_last_phase_in_a_fit(phases: Preset, last: int) -> None:
    schedule = FreezeSchedule(phases, verbose=False, optimizer_state="drop")
    trainer(callbacks=[schedule], max_epochs=6).fit(Net(), loader(), loader())
    assert schedule.phase_index == last
    assert schedule.history[-1][2] == last
    before = [phase.label for phase in schedule.phases]
    again = pickle.loads(pickle.dumps(schedule))
    assert [phase.label for phase in again.phases] == before


class Deep(Net):
    """Has a stem, more blocks than Net, and a teacher that came frozen."""

    def __init__(self, blocks: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.stem = nn.Conv2d(2, 2, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(blocks))
        self.last = nn.LayerNorm(4)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.neck(self.backbone(self.stem(x)).mean((2, 3))))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.last(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.default_generator.manual_seed(self.trainer.fit_loop.total_batch_idx)
        return super().training_step(batch, batch_idx)


def test_one_schedule_fits_models_of_different_depth() -> None:
    schedule = FreezeSchedule(gradual_unfreezing("blocks", lr_decay=2.0), verbose=False)
    for blocks in (3, 1, 4):
        net = Deep(blocks)
        before = snapshot(net)
        trainer(callbacks=[copy.deepcopy(schedule) if blocks == 3 else schedule], max_epochs=blocks + 2).fit(
            net, loader()
        )
        after = snapshot(net)
        stay = {name for name in before if torch.equal(before[name], after[name])}
        assert stay == {"teacher.weight", "teacher.bias"}
        if blocks != 3:
            assert [phase.label for phase in schedule.phases] == [
                "from last",
                *(f"from blocks.{number}" for number in reversed(range(blocks))),
                "from backbone, neck, head and 1 more",
            ]


def test_checkpoint_can_be_saved_before_a_fit_has_told_the_phases(tmp_path: Path) -> None:
    schedule = FreezeSchedule(gradual_unfreezing("blocks"), verbose=False)
    run = trainer(callbacks=[schedule], max_epochs=4)
    run.validate(Deep(), loader(), verbose=False)
    run.save_checkpoint(tmp_path / "early.ckpt")
    run.fit(Deep(), loader(), ckpt_path=tmp_path / "early.ckpt", weights_only=True)
    assert len(schedule.history) == 4


def test_fit_says_what_no_layer_names(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        schedule = FreezeSchedule(chain_thaw(["blocks", "head"]))
        trainer(callbacks=[schedule, TargetNetwork("neck", "blocks.0.0", tau=0.5)], max_epochs=1).fit(Deep(), loader())
    said = [record.getMessage() for record in caplog.records if "no layer names" in record.getMessage()]
    assert said == ["chain_thaw: no layer names backbone, neck, stem, last; they train in the last phase."]


@pytest.mark.parametrize("stop", [3, 8, 10, 17])
@pytest.mark.parametrize("longer", [False, True], ids=["as long", "for longer"])
def test_layerwise_sampling_resumes_exactly(stop: int, longer: bool, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> tuple[Any, FreezeSchedule]:
        torch.manual_seed(0)
        net = Deep(optimizer=adamw)
        preset = layerwise_sampling("blocks", count=1, every_n_steps=2, seed=3)
        schedule = FreezeSchedule(preset, verbose=False, optimizer_state="drop")
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename=f"{epochs}-{{step}}")
        run = trainer(tmp_path, callbacks=[schedule, keep], max_epochs=epochs, enable_checkpointing=True)
        run.fit(net, loader(stateful=True), **options)
        return (snapshot(net), run.optimizers[0].state_dict()), schedule

    whole, first = fit(4)
    if longer:
        fit(3)
    resumed, second = fit(4, ckpt_path=tmp_path / f"{3 if longer else 4}-step={stop}.ckpt")
    assert same(whole, resumed)
    assert first.history == second.history
    assert len({phase.label for phase in second.phases}) == 12


def test_draws_last_through_a_fit_with_two_optimizers() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(part.parameters(), 0.1)
                for part in (self.backbone, nn.ModuleList([self.neck, self.head]))
            ]

    schedule = FreezeSchedule(layerwise_sampling(LAYERS, (), every_n_steps=4), verbose=False)
    trainer(callbacks=[schedule], max_epochs=2).fit(Manual(), loader())
    assert [begin[1] for begin in schedule.history] == [0, 4, 8, 12, 16, 20]
    assert len(schedule.phases) == 6


def test_preview_and_plot_show_the_phases_of_a_preset() -> None:
    net = Deep()
    rows = FreezeSchedule(gradual_unfreezing("blocks")).preview(net, 9).rows
    assert [row[:2] for row in rows][:2] == [("1 from last", "last"), ("2 from blocks.2", "blocks.2, last")]
    assert len(rows) == 5
    sampled = FreezeSchedule(layerwise_sampling("blocks", count=1, every_n_steps=5))
    assert len(sampled.preview(net, 3, steps_per_epoch=10).rows) == 6
    with pytest.raises(ValueError, match=r"give preview\(\) and plot\(\) steps_per_epoch"):
        sampled.preview(net, 3)
    pytest.importorskip("matplotlib")
    assert sampled.plot(net, 3, steps_per_epoch=10)


CLI = """
seed_everything: 0
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  max_epochs: 4
  callbacks:
    - class_path: lightning_freeze.FreezeSchedule
      init_args:
        phases:
          class_path: lightning_freeze.PRESET
          init_args: ARGUMENTS
"""


class Loads(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    val_dataloader = train_dataloader


class Plain(Net):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("preset", "arguments", "expected"),
    [
        ("gradual_unfreezing", "{layers: backbone, lr_decay: 2}", gradual_unfreezing("backbone", lr_decay=2.0)),
        (
            "gradual_unfreezing",
            "{layers: [[backbone.0, backbone.4], neck, head]}",
            gradual_unfreezing([["backbone.0", "backbone.4"], "neck", "head"]),
        ),
        ("chain_thaw", "{layers: [backbone, head]}", chain_thaw(["backbone", "head"])),
        (
            "layerwise_sampling",
            "{layers: backbone, count: 1, every_n_steps: 5, weights: [1, 2], always: head}",
            layerwise_sampling("backbone", "head", count=1, every_n_steps=5, weights=[1, 2]),
        ),
        (
            "linear_probe_then_finetune",
            "{head: [head, neck], backbone_scale: 1e-1}",
            linear_probe_then_finetune(["head", "neck"], backbone_scale=0.1),
        ),
    ],
)
def test_preset_from_yaml_and_from_the_config_that_lightning_saves(
    preset: str, arguments: str, expected: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli_module = pytest.importorskip("lightning.pytorch.cli")
    (tmp_path / "first.yaml").write_text(CLI.replace("PRESET", preset).replace("ARGUMENTS", arguments))
    by_hand = FreezeSchedule(expected, verbose=False)
    trainer(callbacks=[by_hand], max_epochs=4).fit(Plain(), loader())
    for config, folder in (("first.yaml", "one"), ("one/config.yaml", "two")):
        root = f"--trainer.default_root_dir={tmp_path / folder}"
        monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(tmp_path / config), root])
        cli = cli_module.LightningCLI(Plain, Loads)
        (schedule,) = [one for one in cli.trainer.callbacks if isinstance(one, FreezeSchedule)]
        assert schedule.phases == by_hand.phases
        assert schedule.history == by_hand.history
