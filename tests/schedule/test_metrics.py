"""What the schedule logs, and what it looks at: callback metrics, scaled rates, the plateau's metric."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Plateau
from tests.nets import Net, Probe, adamw, loader, same, sgd, trainer

PHASES = [
    Phase("head", epochs=1),
    Phase(["head", "neck"], steps=3, lr_scale={"backbone": 0.1, "neck": 0.5}),
    Phase("*", lr_scale={"backbone": 0.1, "neck": 0.5}),
]


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_callback_metrics_have_the_phase_and_what_trains(batchnorm: bool, validates: bool) -> None:
    """In every batch and every hook after it, also without a logger."""
    schedule = FreezeSchedule(PHASES, verbose=False)
    seen: list[tuple[float, float]] = []

    def check(run: Any, module: Any) -> None:
        metrics = run.callback_metrics
        seen.append((float(metrics["freeze/phase"]), float(metrics["freeze/trainable_parameters"])))
        assert seen[-1][0] == schedule.phase_index
        assert seen[-1][1] == sum(p.numel() for p in module.parameters() if p.requires_grad)

    class Checks(Net):
        def on_validation_epoch_end(self) -> None:
            check(self.trainer, self)

        def on_train_epoch_end(self) -> None:
            check(self.trainer, self)

    callbacks = [schedule, Probe(check, check), *([FreezeBatchNorm()] if batchnorm else [])]
    run = trainer(callbacks=callbacks, max_epochs=3)
    run.fit(Checks(sgd), loader(), *([loader()] if validates else []))
    assert len(seen) == 3 * (12 + 1 + validates)
    assert {phase for phase, _ in seen} == {0.0, 1.0, 2.0}
    assert float(run.callback_metrics["freeze/phase"]) == 2.0


def test_checkpoints_are_named_by_them(tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path,
        filename="{step}-{freeze/phase:.0f}-{freeze/trainable_parameters:.0f}",
        auto_insert_metric_name=False,
        save_top_k=-1,
        save_on_train_epoch_end=True,
    )
    run = trainer(tmp_path, callbacks=[FreezeSchedule(PHASES), saver], max_epochs=3, enable_checkpointing=True)
    run.fit(Net(), loader(), loader())
    names = [path.stem for path in tmp_path.glob("*.ckpt")]
    assert sorted(names) == ["12-2-275", "18-2-275", "6-0-15"]


def rows_of(folder: Path, net: Net, phases: list[Phase], **options: Any) -> list[dict[str, str]]:
    logger = CSVLogger(folder, flush_logs_every_n_steps=1)
    options = {"max_epochs": 3, "log_every_n_steps": 1, **options}
    callbacks = [FreezeSchedule(phases, verbose=False), LearningRateMonitor(log_momentum=True, log_weight_decay=True)]
    trainer(folder, callbacks=callbacks, logger=logger, **options).fit(net, loader())
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_phases_and_scaled_rates_are_logged_at_their_steps(tmp_path: Path) -> None:
    """Rates by selector, that of the very step; absent where it is frozen or not scaled."""
    net = Net(sgd, lambda o: lrs.LambdaLR(o, lambda step: 0.9**step), interval="step")
    rows = rows_of(tmp_path, net, PHASES)
    phases = [(int(row["step"]), float(row["freeze/phase"])) for row in rows if row["freeze/phase"]]
    assert phases == [(0, 0.0), (6, 1.0), (9, 2.0), (12, 2.0)]
    logged = {
        name: {int(row["step"]): float(row[f"freeze/lr/{name}"]) for row in rows if row.get(f"freeze/lr/{name}")}
        for name in ("backbone", "neck")
    }
    assert {name for row in rows for name in row if name.startswith("freeze/lr/")} == {
        "freeze/lr/backbone",
        "freeze/lr/neck",
    }
    assert sorted(logged["neck"]) == list(range(6, 18))
    assert sorted(logged["backbone"]) == list(range(9, 18))
    for name, factor in (("backbone", 0.1), ("neck", 0.5)):
        for step, rate in logged[name].items():
            assert rate == pytest.approx(0.01 * 0.9**step * factor)


def test_no_rates_without_scales_and_none_where_nothing_is_logged(tmp_path: Path) -> None:
    for phases, every in (([Phase("head", epochs=1), Phase("*")], 1), ([Phase("*", lr_scale={"neck": 0.5})], 0)):
        rows = rows_of(tmp_path, Net(), phases, log_every_n_steps=every)
        assert not [name for row in rows for name in row if name.startswith("freeze/lr/")]
    rows = rows_of(tmp_path, Net(), [Phase("*", lr_scale={("neck", "head"): 0.5})], log_every_n_steps=5)
    assert [int(row["step"]) for row in rows if row.get("freeze/lr/neck, head")] == [4, 9, 14]


class Late(Net):
    """Logs a metric of training in a hook of the module, which comes after every callback's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.default_generator.manual_seed(self.trainer.fit_loop.total_batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("late", [1.0, 0.5, 0.7, 0.6, 0.8, 0.9, 0.1, 0.2][self.current_epoch])


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_value_that_no_look_has_taken_in_is_in_the_checkpoint(tmp_path: Path, patience: int) -> None:
    """A metric logged by the module as an epoch ends is looked at when the next one begins, after a resume too."""

    def run(epochs: int, resume: Path | None = None, saver: Any = None) -> tuple[Any, FreezeSchedule]:
        torch.manual_seed(0)
        net = Late(adamw)
        phases = [Phase("*", until=Plateau("late", patience=patience)), Phase("head")]
        schedule = FreezeSchedule(phases, verbose=False)
        callbacks = [schedule, *([saver] if saver else [])]
        fit = trainer(tmp_path, callbacks=callbacks, max_epochs=epochs, enable_checkpointing=saver is not None)
        fit.fit(net, loader(), ckpt_path=resume, weights_only=True)
        return net.state_dict(), schedule

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, schedule = run(7, saver=saver)
    values = [1.0, 0.5, 0.7, 0.6, 0.8]
    assert schedule.history == [(0, 0, 0), (2 + patience, 6 * (2 + patience), 1)]
    for epoch in range(6):
        path = tmp_path / f"epoch={epoch}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["FreezeSchedule"]
        wanted = pytest.approx(values[epoch]) if epoch < 2 + patience else None
        assert state["unlooked"] == wanted
        weights, resumed = run(7, path)
        assert same(weights, whole)
        assert resumed.state_dict() | {"optimizers": []} == schedule.state_dict() | {"optimizers": []}
