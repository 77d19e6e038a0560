"""Ramps and schedulers of phases in a config file, through the real LightningCLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeSchedule, Phase, Ramp
from lightning_freeze.schedule.phases import describe
from tests.nets import Net
from tests.schedule.test_callback import TRAINER, Loads

RATES = f"""
{TRAINER}
  max_epochs: 6
  callbacks:
    - class_path: lightning_freeze.FreezeSchedule
      init_args:
        phases:
          - train: "*"
            steps: 5
            lr_scale: {{start: 0.1, steps: 4}}
            lr_scheduler: {{class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {{max_lr: 0.1}}}}
          - train: "*"
            steps: 7
            lr_scale: {{head: {{start: 0.5, shape: cosine}}, neck: 0.5}}
            lr_scheduler: {{class_path: torch.optim.lr_scheduler.LinearLR}}
          - train: "*"
            epochs: 1
            lr_scheduler:
              class_path: torch.optim.lr_scheduler.ReduceLROnPlateau
              init_args: {{patience: 1}}
              monitor: val_loss
          - train: "*"
            epochs: 1
            lr_scheduler: {{class_path: {__name__}.halving, interval: epoch}}
          - {{train: head, epochs: 1, lr_scheduler: restart}}
          - {{train: head, lr_scheduler: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 2}}}}}}
"""


def halving(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    assert steps == 6
    return lrs.ExponentialLR(optimizer, 0.5)


class Notes(Net):
    """Notes each scheduler that drives it."""

    seen: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        super().__init__(scheduler=lambda optimizer: lrs.CosineAnnealingLR(optimizer, 50))

    def on_train_batch_start(self, *_: Any) -> None:
        (config,) = self.trainer.lr_scheduler_configs
        state = config.scheduler.state_dict()
        numbers = {key: state[key] for key in ("total_steps", "total_iters", "patience", "step_size") if key in state}
        if (noted := (type(config.scheduler).__name__, numbers, config.interval)) not in self.seen:
            self.seen.append(noted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_steps_are_filled_in_and_the_config_that_lightning_saves_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli_module = pytest.importorskip("lightning.pytorch.cli")
    (tmp_path / "first.yaml").write_text(RATES)
    found = []
    for config, folder in (("first.yaml", "one"), ("one/config.yaml", "two")):
        Notes.seen.clear()
        root = f"--trainer.default_root_dir={tmp_path / folder}"
        monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(tmp_path / config), root])
        cli = cli_module.LightningCLI(Notes, Loads)
        (schedule,) = [one for one in cli.trainer.callbacks if isinstance(one, FreezeSchedule)]
        found.append(describe(schedule.phases))
        assert schedule.phases[0].scales == {"*": Ramp(0.1, steps=4)}
        assert schedule.phases[1].lr_scale == {"head": Ramp(0.5, shape="cosine"), "neck": 0.5}
        assert Notes.seen == [
            ("OneCycleLR", {"total_steps": 5}, "step"),
            ("LinearLR", {"total_iters": 7}, "step"),
            ("ReduceLROnPlateau", {"patience": 1}, "epoch"),
            ("ExponentialLR", {}, "epoch"),
            ("CosineAnnealingLR", {}, "epoch"),
            ("StepLR", {"step_size": 2}, "step"),
        ]
    assert found[0] == found[1]


def test_a_mapping_in_python_is_the_one_in_yaml() -> None:
    own = {"class_path": "torch.optim.lr_scheduler.LinearLR"}
    assert FreezeSchedule([{"train": "*", "lr_scheduler": own}]).phases == [Phase("*", lr_scheduler=own)]
