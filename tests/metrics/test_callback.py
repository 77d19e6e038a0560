"""MetricLogger in real fits: values, names, monitoring, checkpoints, two processes, and a model that knows nothing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics.classification as tm
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import ClasswiseWrapper, MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.functional import accuracy
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, MultitaskWrapper, Running

from lightning_freeze import FreezeSchedule, MetricLogger, Phase, Plateau
from tests.nets import Net, data, loader, snapshot, trainer
from tests.replicas import on_two_processes


class Steps(Net):
    """Returns what MetricLogger reads by default, and keeps it with the number of the dataloader."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {"train": [], "val": [], "test": []}

    def step(self, stage: str, batch: Any, dataloader_idx: int = 0) -> dict[str, Tensor]:
        preds = self(batch[0])
        self.seen[stage].append((dataloader_idx, preds.detach().clone(), batch[1]))
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        torch.default_generator.manual_seed(self.trainer.fit_loop.total_batch_idx)  # for dropout, also after resuming
        return self.step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self.step("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self.step("test", batch, dataloader_idx)

    def expected(self, metric: Metric, stage: str, last: int, dataloader_idx: int | None = None) -> Tensor:
        """The metric of the last batches of a stage, computed at once."""
        batches = [seen for seen in self.seen[stage] if dataloader_idx in (None, seen[0])][-last:]
        metric = metric.clone()
        for _, preds, target in batches:
            metric.update(preds, target)
        return metric.compute()


class Epochs(Callback):
    """Keeps the callback metrics of each epoch, as callbacks that monitor see them."""

    def __init__(self) -> None:
        self.train: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train[trainer.current_epoch] = {k: float(v) for k, v in trainer.callback_metrics.items()}


def fit(net: LightningModule, *callbacks: Callback, val: Any = None, resume: Path | None = None, **options: Any) -> Any:
    """Fit for an epoch if not said otherwise, and return the Trainer; its ``epochs`` are those of :class:`Epochs`."""
    epochs, saves = Epochs(), any(isinstance(callback, Checkpoint) for callback in callbacks)
    run: Any = trainer(callbacks=[*callbacks, epochs], **{"max_epochs": 1, "enable_checkpointing": saves, **options})
    run.epochs = epochs.train
    loaders = loader(stateful=True), loader(8) if val is None else val
    run.fit(net, *loaders, ckpt_path=resume, weights_only=True if resume else None)
    return run


def manual(net: LightningModule) -> LightningModule:
    net.automatic_optimization = False
    return net


def acc() -> Metric:
    return tm.MulticlassAccuracy(3, average="micro")


METRICS = {
    "metric": (lambda: acc(), ["MulticlassAccuracy"]),
    "dict": (lambda: {"acc": acc(), "f1": tm.MulticlassF1Score(3)}, ["acc", "f1"]),
    "collection": (lambda: MetricCollection([acc()], prefix="my_", postfix="_x"), ["my_MulticlassAccuracy_x"]),
    "dict of a collection": (lambda: {"one": MetricCollection({"acc": acc()})}, ["one_acc"]),
    "classwise": (
        lambda: ClasswiseWrapper(tm.MulticlassAccuracy(3, average=None), ["a", "b", "c"]),
        ["multiclassaccuracy_a", "multiclassaccuracy_b", "multiclassaccuracy_c"],
    ),
    "composition": (lambda: {"sum": acc() + acc()}, ["sum"]),
    "running": (lambda: Running(acc(), window=2), ["Running"]),
}


class TestValues:
    @pytest.mark.parametrize("kind", METRICS)
    def test_every_form_of_metrics_logs_its_names(self, kind: str) -> None:
        make, names = METRICS[kind]
        run = fit(Steps(), MetricLogger(make()))
        expected = {f"{stage}/{name}" for stage in ("train", "val") for name in names}
        assert run.callback_metrics.keys() - {"val_loss"} == expected

    @pytest.mark.filterwarnings("ignore:No positive samples in targets")
    def test_each_stage_logs_the_metric_of_its_epoch(self) -> None:
        net, metrics = Steps(), {"acc": acc(), "auroc": tm.MulticlassAUROC(3)}
        run = fit(net, MetricLogger(metrics), val=loader(12), max_epochs=3, num_sanity_val_steps=1)
        for name, metric in metrics.items():
            assert metric.update_count == 0
            for epoch in range(3):
                seen = Steps()
                seen.seen = {
                    "train": net.seen["train"][: 6 * (epoch + 1)],
                    "val": net.seen["val"][: 1 + 3 * (epoch + 1)],
                }
                assert run.epochs[epoch][f"train/{name}"] == float(seen.expected(metric, "train", 6))
                assert run.epochs[epoch][f"val/{name}"] == float(seen.expected(metric, "val", 3))
        (tested,) = run.test(net, loader(16), verbose=False)
        assert tested == {f"test/{name}": float(net.expected(metric, "test", 4)) for name, metric in metrics.items()}
        (validated,) = run.validate(net, loader(8), verbose=False)
        assert validated == {f"val/{name}": float(net.expected(metric, "val", 2)) for name, metric in metrics.items()}

    def test_validation_inside_an_epoch_does_not_reset_training(self) -> None:
        net = Steps()
        run = fit(net, MetricLogger({"acc": acc()}), val=loader(12), val_check_interval=2)
        assert run.callback_metrics["train/acc"] == net.expected(acc(), "train", 6)
        assert run.callback_metrics["val/acc"] == net.expected(acc(), "val", 3)
        assert len(net.seen["val"]) == 9

    def test_values_reach_loggers_at_the_end_of_the_epoch(self, tmp_path: Path) -> None:
        from lightning.pytorch.loggers import CSVLogger

        logger = CSVLogger(tmp_path)
        run = fit(Steps(), MetricLogger({"acc": acc()}), max_epochs=2, logger=logger, log_every_n_steps=1)
        lines = (Path(run.logger.log_dir) / "metrics.csv").read_text().splitlines()
        header = lines[0].split(",")
        for name in ("train/acc", "val/acc"):
            assert sum(bool(line.split(",")[header.index(name)]) for line in lines[1:]) == 2

    def test_only_the_stages_given_are_logged(self) -> None:
        run = fit(OnlyValidation(), MetricLogger({"acc": acc()}, stages=["val"]))
        assert run.callback_metrics.keys() == {"val/acc"}

    def test_prefix_is_put_before_names(self) -> None:
        run = fit(Steps(), MetricLogger({"acc": acc()}, prefix="m_{stage}_"))
        assert run.callback_metrics.keys() == {"m_train_acc", "m_val_acc"}

    def test_two_metric_loggers_do_not_mix(self) -> None:
        callbacks = [MetricLogger({"acc": acc()}), MetricLogger({"acc": acc()}, prefix="b/{stage}/")]
        assert callbacks[0].state_key != callbacks[1].state_key
        run = fit(Steps(), *callbacks)
        assert run.callback_metrics["train/acc"] == run.callback_metrics["b/train/acc"]

    def test_values_are_logged_in_manual_optimization(self) -> None:
        class Manual(Steps):
            def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
                outputs = self.step("train", batch)
                self.manual_backward(outputs["loss"])
                self.optimizers().step()
                return outputs

        net = manual(Manual())
        run = fit(net, MetricLogger({"acc": acc()}))
        assert run.callback_metrics["train/acc"] == net.expected(acc(), "train", 6)

    @pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")
    def test_skipped_training_step_does_not_count(self) -> None:
        class Skips(Steps):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step(batch, batch_idx) if batch_idx % 2 else None

        net = Skips()
        run = fit(net, MetricLogger({"acc": acc()}))
        assert len(net.seen["train"]) == 3
        assert run.callback_metrics["train/acc"] == net.expected(acc(), "train", 3)


class OnlyValidation(Steps):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step("train", batch)["loss"]


class TestInputs:
    def fit(self, net: LightningModule, metric: Any = None, **options: Any) -> Trainer:
        return fit(net, MetricLogger({"acc": metric or acc()}, **options))

    class Loss(Steps):
        """Returns its loss only, as most do."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"logits": super().validation_step(batch, batch_idx)["preds"]}

    @pytest.mark.parametrize(
        "inputs",
        [
            lambda outputs, batch: (outputs["logits"], batch[1]),
            lambda outputs, batch: {"target": batch[1], "preds": outputs["logits"]},
        ],
        ids=["tuple", "by name"],
    )
    def test_inputs_function_feeds_the_metric(self, inputs: Any) -> None:
        net = self.Loss()
        run = self.fit(net, stages=["val"], inputs=inputs)
        assert run.callback_metrics["val/acc"] == net.expected(acc(), "val", 2)

    def test_single_input_feeds_the_metric(self) -> None:
        run = self.fit(Steps(), SumMetric(), inputs=lambda outputs, batch: (torch.ones_like(batch[1]),))
        assert (run.callback_metrics["train/acc"], run.callback_metrics["val/acc"]) == (24, 8)

    def test_missing_inputs_are_an_error_that_says_what_to_do(self) -> None:
        with pytest.raises(MisconfigurationException) as caught:
            self.fit(self.Loss(), stages=["train"])
        assert str(caught.value) == (
            'MetricLogger looks for "preds" and "target" in what training_step returns, and it returned a dict with '
            '\'loss\'. Let it return {"loss": loss, "preds": preds, "target": target}, or say where they are: '
            'MetricLogger(..., inputs=lambda outputs, batch: (outputs["logits"], batch[1])).'
        )

    def test_missing_inputs_of_validation_are_found_before_training(self) -> None:
        net, message = self.Loss(), "validation_step returns, and it returned a dict with 'logits'"
        with pytest.raises(MisconfigurationException, match=message):
            fit(net, MetricLogger(acc()), num_sanity_val_steps=1)
        assert net.seen["train"] == []

    def test_validation_step_that_returns_nothing_is_an_error(self) -> None:
        with pytest.raises(MisconfigurationException, match=r'returned nothing\. Let it return \{"preds"'):
            self.fit(Net(), stages=["val"])

    def test_manual_training_step_that_returns_nothing_is_an_error(self) -> None:
        class Manual(Net):
            def training_step(self, batch: Any, batch_idx: int) -> None: ...

        with pytest.raises(MisconfigurationException, match="a dict with nothing in it"):
            self.fit(manual(Manual()), stages=["train"])

    def test_inputs_of_another_type_are_an_error(self) -> None:
        with pytest.raises(MisconfigurationException, match=r"gave a tensor of shape \(4, 3\); it has to give a tuple"):
            self.fit(Steps(), inputs=lambda outputs, batch: outputs["preds"])


class TestDataloaders:
    @pytest.mark.filterwarnings("ignore:No positive samples in targets")
    def test_several_dataloaders_have_a_suffix_and_a_metric_each(self) -> None:
        net, metrics = Steps(), {"acc": acc(), "auroc": tm.MulticlassAUROC(3)}
        run = fit(net, MetricLogger(metrics), val=[loader(8), loader(20)], max_epochs=2, num_sanity_val_steps=1)
        for name, metric in metrics.items():
            for index, batches in enumerate((2, 5)):
                value = run.callback_metrics[f"val/{name}/dataloader_idx_{index}"]
                assert value == net.expected(metric, "val", batches, index)
        assert "val/acc" not in run.callback_metrics
        results = run.test(net, [loader(12), loader(4)])
        for index, batches in enumerate((3, 1)):
            name = f"test/acc/dataloader_idx_{index}"
            assert results[index][name] == float(net.expected(acc(), "test", batches, index))

    def test_dataloader_names_are_those_of_self_log(self) -> None:
        class Logs(Steps):
            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
                self.log("own/acc", 1.0)
                return super().validation_step(batch, batch_idx, dataloader_idx)

        run = fit(Logs(), MetricLogger({"acc": acc()}), val=[loader(8), loader(8)])
        ours = {name.removeprefix("val/") for name in run.callback_metrics if name.startswith("val/")}
        assert ours == {name.removeprefix("own/") for name in run.callback_metrics if name.startswith("own/")}

    def test_empty_dataloader_has_no_value(self) -> None:
        metrics = {"acc": acc(), "auroc": tm.MulticlassAUROC(3), "least": MinMaxMetric(acc())}
        with pytest.warns(UserWarning, match="across ranks is zero"):
            run = fit(Steps(), MetricLogger(metrics, stages=["val"]), val=[loader(0), loader(8)])
        names = {f"val/{name}/dataloader_idx_1" for name in ("acc", "auroc", "raw", "min", "max")}
        assert run.callback_metrics.keys() == names

    def test_combined_loader_that_mixes_counts_as_one(self) -> None:
        class Mixed(Steps):
            def validation_step(self, batch: Any, batch_idx: int) -> Any:
                return self.step("val", batch[0])

        mixed = CombinedLoader([loader(8), loader(8)], "min_size")
        run = fit(Mixed(), MetricLogger({"acc": acc()}, stages=["val"]), val=mixed)
        assert run.callback_metrics.keys() == {"val/acc"}


class TestMonitoring:
    @pytest.mark.parametrize("monitor", ["train/acc", "val/acc"])
    def test_model_checkpoint_and_early_stopping_see_the_value_of_the_epoch(self, tmp_path: Path, monitor: str) -> None:
        checkpoint = ModelCheckpoint(tmp_path, monitor=monitor, mode="max", save_top_k=-1)
        stopping = EarlyStopping(monitor, mode="max", patience=100)
        metrics = MetricLogger({"acc": acc()})  # wherever it stands in the list
        run = fit(Steps(), checkpoint, stopping, metrics, val=loader(12), max_epochs=4)
        values = [metrics[monitor] for metrics in run.epochs.values()]
        assert [float(v) for v in checkpoint.best_k_models.values()] == values
        assert float(stopping.best_score) == max(values)
        assert float(checkpoint.best_model_score) == max(values)

    def test_scheduler_sees_the_value_of_the_epoch(self) -> None:
        class Plateau(Steps):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/acc"}}

        net = Plateau()
        run = fit(net, MetricLogger({"acc": acc()}), val=loader(12))
        assert run.lr_scheduler_configs[0].scheduler.best == float(net.expected(acc(), "val", 3))

    @pytest.mark.parametrize(
        ("monitor", "options", "step"),
        [
            ("train/v", {}, 36),
            ("train/v", {"val_check_interval": 3}, 36),
            ("val/v", {}, 30),
            ("val/v", {"val_check_interval": 3}, 24),
            ("val/v", {"check_val_every_n_epoch": 2}, 48),
        ],
    )
    @pytest.mark.parametrize("first", ["schedule", "metrics"])
    def test_plateau_takes_each_value_once(
        self, tmp_path: Path, monitor: str, options: dict[str, Any], step: int, first: str
    ) -> None:
        """Wherever the two stand in the list, and whether or not the fit was resumed, the phase ends at one step."""

        def history(resume: Path | None = None) -> list[tuple[int, int, int]]:
            schedule = FreezeSchedule([Phase("head", until=Plateau(monitor, 2, "max")), Phase("*")])
            metrics = MetricLogger({"v": MeanMetric()}, inputs=lambda outputs, batch: (outputs["value"],))
            callbacks = [schedule, metrics] if first == "schedule" else [metrics, schedule]
            saving = [] if resume else [ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")]
            fit(Saturating(), *callbacks, *saving, val=loader(4), resume=resume, max_epochs=9, **options)
            return schedule.history

        whole = history()
        assert whole == [(0, 0, 0), (step // 6, step, 1)]
        assert history(tmp_path / "epoch=3.ckpt") == whole


class Saturating(Steps):
    """Its value grows with the steps taken (in training: before the epoch) and is the same from step 18 on."""

    def step(self, stage: str, batch: Any, dataloader_idx: int = 0) -> dict[str, Tensor]:
        steps = 6 * self.current_epoch if stage == "train" else self.global_step
        return {**super().step(stage, batch, dataloader_idx), "value": torch.tensor(min(steps, 18.0))}


# Resume


RESUMED = {
    "accuracy": lambda: {"acc": acc()},
    "a compute group, which shares tensors": lambda: MetricCollection(
        {"f1": tm.MulticlassF1Score(3), "recall": tm.MulticlassRecall(3), "auroc": tm.MulticlassAUROC(3)}
    ),
    "lists, classwise and sums": lambda: {
        "auroc": tm.MulticlassAUROC(3),
        "each": ClasswiseWrapper(tm.MulticlassRecall(3, average=None)),
        "sum": acc() + tm.MulticlassRecall(3),
    },
    "what has seen how many, and what outlasts an epoch": lambda: {
        "running": Running(acc(), window=2),
        "extremes": MinMaxMetric(tm.MulticlassAccuracy(3)),
    },
    "added in place": lambda: {"a": InPlace(), "b": InPlace()},
}


class InPlace(Metric):
    """Its state is changed in place, as that of some metrics is."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total += preds.float().abs().sum()

    def compute(self) -> Tensor:
        return self.total


def fit_epochs(make: Any, *callbacks: Callback, **options: Any) -> dict[int, dict[str, float]]:
    torch.manual_seed(0)
    return fit(Steps(), MetricLogger(make()), *callbacks, **{"max_epochs": 2, **options}).epochs


def saving(folder: Path, filename: str = "{step}", **often: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, filename=filename, **often)


class TestResume:
    @pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
    def test_resume_from_any_step_gives_the_same_values(self, tmp_path: Path, make: Any) -> None:
        expected = fit_epochs(make, saving(tmp_path, every_n_train_steps=1))
        # Lightning itself loses an epoch on resuming from the step that ends one.
        for step in (1, 5, 8, 11):
            resumed = fit_epochs(make, resume=tmp_path / f"step={step}.ckpt")
            assert resumed == {epoch: values for epoch, values in expected.items() if epoch >= step // 6}

    def test_extremes_are_kept_between_epochs_without_the_sanity_check(self, tmp_path: Path) -> None:
        def values(*saved: Callback, **options: Any) -> dict[int, dict[str, float]]:
            metric = MinMaxMetric(MeanMetric())
            callback = MetricLogger({"mean": metric}, inputs=lambda outputs, _: (outputs["value"],))
            return fit(Saturating(), callback, *saved, max_epochs=3, num_sanity_val_steps=2, **options).epochs

        whole = values(saving(tmp_path, "{epoch}"))
        assert [epoch["val/min"] for epoch in whole.values()] == [6.0] * 3  # 0 in the sanity check
        assert [epoch["val/max"] for epoch in whole.values()] == [6.0, 12.0, 18.0]
        assert [epoch["train/min"] for epoch in whole.values()] == [0.0] * 3
        assert values(resume=tmp_path / "epoch=1.ckpt") == {2: whole[2]}

    @pytest.mark.parametrize("middle", [True, False])
    def test_resume_with_other_processes_keeps_only_what_outlasts_an_epoch(
        self, tmp_path: Path, middle: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        often = {"every_n_train_steps": 3} if middle else {"every_n_epochs": 1, "save_on_train_epoch_end": True}
        expected = fit_epochs(lambda: {"m": MinMaxMetric(InPlace())}, saving(tmp_path, **often))
        path = tmp_path / ("step=9.ckpt" if middle else "step=6.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        (key,) = (key for key in checkpoint["callbacks"] if key.startswith("MetricLogger"))
        checkpoint["callbacks"][key]["ranks"] *= 2
        torch.save(checkpoint, path)
        (last,) = fit_epochs(lambda: {"m": MinMaxMetric(InPlace())}, resume=path).values()
        sentence = "the checkpoint is from 2 processes, and there are 1 now: its metrics of epoch 1 cover only the rest"
        assert (sentence in caplog.text) is middle
        assert (last["train/raw"] < expected[1]["train/raw"]) is middle
        assert [last[f"val/{name}"] for name in ("min", "max")] == [expected[1][f"val/{n}"] for n in ("min", "max")]
        assert last["train/max"] == expected[0]["train/max"] if middle else last == expected[1]

    def test_resume_with_more_processes_takes_the_state_of_the_first(self) -> None:
        first, third = (MetricLogger({"m": MinMaxMetric(InPlace())}, stages=["train"]) for _ in range(2))
        run = fit(Steps(), first)
        checkpoint: dict[str, Any] = {"callbacks": {}}
        first.on_save_checkpoint(run, Steps(), checkpoint)
        third.setup(run, Steps(), "fit")
        of_three = SimpleNamespace(state=SimpleNamespace(fn="fit"), world_size=3, global_rank=2)
        third.on_load_checkpoint(of_three, Steps(), checkpoint)
        (before,), (after,) = (callback._clones["train"].clones for callback in (first, third))
        assert after["m"].max_val == before["m"].max_val > float("-inf")

    @pytest.mark.parametrize("stages", [["train"], ["val"]])
    def test_one_logger_a_stage_resumes_as_one_for_both(self, tmp_path: Path, stages: Any) -> None:
        def values(*saved: Callback, **options: Any) -> dict[int, dict[str, float]]:
            others = [stage for stage in ("train", "val") if stage not in stages]
            loggers = [MetricLogger({"m": MinMaxMetric(InPlace())}, stages=each) for each in (stages, others)]
            torch.manual_seed(0)
            return fit(Steps(), *loggers, *saved, max_epochs=2, **options).epochs

        whole = values(ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="it"))
        assert len(whole[1]) == 6
        assert values(resume=tmp_path / "it.ckpt") == {1: whole[1]}

    def test_resume_after_the_last_validation_gives_the_same_values(self, tmp_path: Path) -> None:
        expected = fit_epochs(RESUMED["accuracy"], saving(tmp_path, "{epoch}", save_on_train_epoch_end=False))
        resumed = fit_epochs(RESUMED["accuracy"], resume=tmp_path / "epoch=0.ckpt")
        assert resumed[0]["train/acc"] == expected[0]["train/acc"]
        assert resumed[1] == expected[1]

    def test_resume_between_epochs_starts_empty(self, tmp_path: Path) -> None:
        expected = fit_epochs(RESUMED["accuracy"], saving(tmp_path, "{epoch}", save_on_train_epoch_end=True))
        assert fit_epochs(RESUMED["accuracy"], resume=tmp_path / "epoch=0.ckpt") == {1: expected[1]}

    def test_resume_with_a_metric_of_another_state_is_refused(self, tmp_path: Path) -> None:
        fit_epochs(lambda: {"acc": tm.MulticlassRecall(3)}, saving(tmp_path, every_n_train_steps=2))
        for other in (tm.MulticlassAUROC(3), tm.MulticlassRecall(5)):
            with pytest.raises(MisconfigurationException, match="'acc' that does not fit"):
                fit_epochs(lambda: {"acc": other}, resume=tmp_path / "step=2.ckpt")  # noqa: B023

    def test_resume_from_an_older_form_of_state_is_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = fit_epochs(RESUMED["accuracy"], saving(tmp_path, every_n_train_steps=2))
        path = tmp_path / "step=2.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        (key,) = (key for key in checkpoint["callbacks"] if key.startswith("MetricLogger"))
        (saved,) = checkpoint["callbacks"][key]["ranks"]
        checkpoint["callbacks"][key] = {"train": saved["train"]}
        torch.save(checkpoint, path)
        resumed = fit_epochs(RESUMED["accuracy"], resume=path)
        assert resumed[1] == expected[1]
        assert "has the state of MetricLogger in the form of another version" in caplog.text

    @pytest.mark.parametrize(
        ("before", "now"),
        [
            ({"acc": acc()}, {"acc": acc(), "more": acc()}),
            ({"acc": acc(), "more": acc()}, {"acc": acc()}),
            (None, {"acc": acc()}),
        ],
        ids=["added", "removed", "all added"],
    )
    @pytest.mark.parametrize("middle", [True, False])
    @pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
    def test_resume_with_other_names_is_warned_of(
        self, tmp_path: Path, before: Any, now: Any, middle: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        often = {"every_n_train_steps": 4} if middle else {"every_n_epochs": 1}
        fit(Steps(), saving(tmp_path, "it", **often), *([MetricLogger(before)] if before else []))
        net = Steps()
        again = fit(net, MetricLogger(now), resume=tmp_path / "it.ckpt", max_epochs=2)
        warned = [record.message for record in caplog.records if "epoch" in record.message]
        sentence = (
            "the checkpoint has no state of MetricLogger(stages=('train', 'val', 'test'), prefix='{stage}/') with the "
            f"metrics {', '.join(now)}: its metrics of epoch 0 cover only the rest of it"
        )
        assert warned == [sentence] * middle
        assert again.callback_metrics["train/acc"] == net.expected(acc(), "train", 6)

    @pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
    def test_resumed_epoch_without_a_batch_left_has_no_value(self, tmp_path: Path) -> None:
        fit(Steps(), saving(tmp_path, "it", save_on_train_epoch_end=False))
        metrics = MetricLogger({"acc": acc(), "auroc": tm.MulticlassAUROC(3)}, stages=["train"])
        epochs = fit(Steps(), metrics, resume=tmp_path / "it.ckpt", max_epochs=2).epochs
        assert [epochs[epoch].keys() - {"val_loss"} for epoch in (0, 1)] == [set(), {"train/acc", "train/auroc"}]

    @pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
    def test_resume_with_training_as_a_new_stage_is_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        metrics = {"m": MinMaxMetric(acc())}
        first = [saving(tmp_path, every_n_train_steps=2), MetricLogger(metrics, stages=["val"])]
        fit(Steps(), *first, val_check_interval=2)
        fit(Steps(), MetricLogger(metrics), resume=tmp_path / "step=4.ckpt", val_check_interval=2)
        assert "its metrics of epoch 0 cover only the rest of it" in caplog.text

    def test_test_of_a_mid_epoch_checkpoint_starts_empty(self, tmp_path: Path) -> None:
        fit_epochs(RESUMED["accuracy"], saving(tmp_path, every_n_train_steps=2))
        net = Steps()
        run = trainer(callbacks=[MetricLogger({"acc": acc()})])
        (values,) = run.test(net, loader(8), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
        assert values == {"test/acc": float(net.expected(acc(), "test", 2))}

    def test_callback_in_a_second_fit_starts_empty(self) -> None:
        callback = MetricLogger({"acc": acc()})
        for _ in range(2):
            net = Steps()
            run = fit(net, callback, limit_train_batches=2)
            assert run.callback_metrics["train/acc"] == net.expected(acc(), "train", 2)

    def test_checkpoint_loads_without_the_callback(self, tmp_path: Path) -> None:
        fit_epochs(RESUMED["accuracy"], saving(tmp_path, every_n_train_steps=2))
        with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
            fit(Steps(), resume=tmp_path / "step=2.ckpt")


class TestTheModelKnowsNothing:
    def test_model_and_checkpoint_have_no_metric_in_them(self) -> None:
        plain, observed = Steps(), Steps()
        fit(plain)
        before = snapshot(observed).keys()
        fit(observed, MetricLogger({"acc": acc()}))
        assert snapshot(observed).keys() == before
        assert [name for name, _ in observed.named_modules()] == [name for name, _ in plain.named_modules()]
        assert vars(observed).keys() == vars(plain).keys()
        pickle.loads(pickle.dumps(observed))
        copy.deepcopy(observed)

    def test_callback_pickles(self) -> None:
        callback = MetricLogger({"acc": acc()})
        fit(Steps(), callback)
        pickle.loads(pickle.dumps(callback))

    def test_metric_that_was_given_is_never_updated(self) -> None:
        metric = acc()
        callback = MetricLogger({"acc": metric})
        fit(Steps(), callback)
        assert metric.update_count == 0
        assert all(m.update_count == 0 for m in callback.metrics.values())

    def test_metrics_keep_no_graph(self) -> None:
        callback = MetricLogger({"auroc": tm.MulticlassAUROC(3), "mean": MeanMetric()}, inputs=inputs_with_graph)
        fit(Steps(), callback)
        states = [
            tensor
            for metric in callback._clones["train"].clones[0].values()
            for state in metric.metric_state.values()
            for tensor in (state if isinstance(state, list) else [state])
        ]
        assert len(states) > 6
        assert not any(state.requires_grad for state in states)


def inputs_with_graph(outputs: Any, batch: Any) -> dict[str, Tensor]:
    return {"preds": outputs["preds"], "target": batch[1], "value": outputs["preds"]}


class Nothing(InPlace):
    def compute(self) -> None:  # type: ignore[override]
        return None


class MultioutputParts(InPlace):
    """Computes a dict, as a metric of one's own may."""

    def compute(self) -> Any:
        return {"min": self.total, "other": self.total}


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"metrics": tm.MulticlassAccuracy}, TypeError, r"the class; give an object of it: MulticlassAccuracy\("),
            ({"metrics": accuracy}, TypeError, r"metrics=accuracy\).* a function"),
            (
                {"metrics": {"acc": MetricTracker(acc())}},
                TypeError,
                r"\['acc'\]=Metric.*give it the metric that is tracked",
            ),
            ({"metrics": nn.Flatten()}, TypeError, r"metrics=Flatten\(.* For example"),
            ({"metrics": [acc()]}, TypeError, r"Write metrics=MetricCollection\(\[\.\.\.\]\)"),
            ({"metrics": {"acc": "accuracy"}}, TypeError, r"metrics\['acc'\]='accuracy'"),
            ({"metrics": {}}, ValueError, "is empty"),
            ({"metrics": {"a.b": acc()}}, ValueError, r"text without dots, as 'a/b' is"),
            ({"metrics": {1: acc()}}, ValueError, r"\{1: …\}\): names are text without dots, as '1' is"),
            (
                {"stages": ("validation",)},
                ValueError,
                r"one of 'train', 'val', 'test'\. Did you mean 'val'\?",
            ),
            ({"stages": ("tran",)}, ValueError, r"Did you mean 'train'\?"),
            ({"stages": "val"}, TypeError, r"stages=\('val',\)"),
            ({"stages": ()}, ValueError, "logs nothing"),
            ({"prefix": "{stge}/"}, ValueError, r'Did you mean "\{stage\}/"\?'),
            ({"prefix": "{}/"}, ValueError, r'Did you mean "\{stage\}/"\?'),
            ({"prefix": "{stage/"}, ValueError, r'Did you mean "\{stage\}/"\?'),
            ({"prefix": "m/"}, ValueError, r'same names\. Did you mean "\{stage\}/m/"\?'),
            ({"prefix": None}, TypeError, "it is a string"),
            ({"inputs": "preds"}, TypeError, "it is a function"),
            ({"prog_bar": "val"}, TypeError, r"prog_bar='val'\): it is True or False"),
        ],
    )
    def test_bad_arguments_are_refused_at_construction(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            MetricLogger(**{"metrics": acc(), **arguments})

    def test_prefix_of_one_stage_needs_no_field(self) -> None:
        assert MetricLogger(acc(), stages=["val"], prefix="").prefix == ""

    @pytest.mark.parametrize(
        ("metric", "message"),
        [
            (tm.MulticlassAccuracy(3, average=None), r"a tensor of shape \(3,\), .*ClasswiseWrapper"),
            (tm.MulticlassConfusionMatrix(3), r"a tensor of shape \(3, 3\), .*a torchmetrics\.Metric of your own"),
            (tm.MulticlassROC(3, thresholds=5), r"a tuple, .*area under a curve"),
            (Nothing(), r"nothing, .*a torchmetrics\.Metric of your own"),
        ],
    )
    def test_metric_without_a_scalar_is_an_error(self, metric: Metric, message: str) -> None:
        with pytest.raises(ValueError, match=f"The metric 'many' computes {message}"):
            fit(Steps(), MetricLogger({"many": metric}), num_sanity_val_steps=2)

    def test_two_loggers_of_one_name_are_refused(self) -> None:
        val = MetricLogger(acc(), stages=["val"], prefix="val/")
        with pytest.raises(MisconfigurationException, match=r"log 'val/MulticlassAccuracy'.* prefix=\"other/"):
            fit(Steps(), MetricLogger(acc()), val)
        others = MetricLogger(acc(), stages=["train", "test"]), MetricLogger(acc(), prefix="other/{stage}/")
        fit(Steps(), val, *others)

    @pytest.mark.parametrize(
        ("first", "second", "name"),
        [
            ({"x": MinMaxMetric(acc())}, {"y": MinMaxMetric(tm.MulticlassF1Score(3))}, "max"),
            ({"raw": acc()}, {"y": MinMaxMetric(acc())}, "raw"),
            (
                {"x": ClasswiseWrapper(tm.MulticlassRecall(3, average=None), prefix="c_")},
                {"y": ClasswiseWrapper(tm.MulticlassF1Score(3, average=None), prefix="c_")},
                "c_0",
            ),
            ({"a": MultioutputParts()}, {"y": MinMaxMetric(acc())}, "min"),
        ],
        ids=["extremes", "a name and an extreme", "classes", "parts"],
    )
    @pytest.mark.parametrize("swap", [False, True])
    @pytest.mark.parametrize("stages", [("val",), ("train",)])
    def test_two_loggers_of_one_name_are_refused_when_values_show_it(
        self, first: Any, second: Any, name: str, swap: bool, stages: Any
    ) -> None:
        net, callbacks = Steps(), [MetricLogger(first, stages=stages), MetricLogger(second)]
        with pytest.raises(MisconfigurationException, match=rf"Two MetricLoggers log '{stages[0]}/{name}'"):
            fit(net, *(callbacks[::-1] if swap else callbacks), num_sanity_val_steps=1)
        if stages == ("val",):
            assert net.seen["train"] == []
        fit(Steps(), callbacks[0], MetricLogger(second, prefix="other/{stage}/"))

    def test_two_loggers_of_one_name_in_different_stages_work(self) -> None:
        callbacks = [MetricLogger(acc(), stages=[stage], prefix="") for stage in ("train", "val")]
        with pytest.raises(MisconfigurationException, match="Two MetricLoggers log 'MulticlassAccuracy'"):
            fit(Steps(), *callbacks)

    @pytest.mark.parametrize("loaders", [1, 2])
    @pytest.mark.parametrize("name", ["acc", "max"])
    def test_name_that_the_model_logs_is_refused(self, name: str, loaders: int) -> None:
        class Logs(Steps):
            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
                self.log(f"val/{name}", 0.5)
                return super().validation_step(batch, batch_idx, dataloader_idx)

        net, metrics = Logs(), {"acc": acc(), "extremes": MinMaxMetric(acc())}
        suffix = "/dataloader_idx_0" if loaders == 2 else ""
        with pytest.raises(MisconfigurationException) as caught:
            fit(net, MetricLogger(metrics), val=[loader(8)] * loaders, num_sanity_val_steps=1)
        assert str(caught.value) == (
            f"MetricLogger logs 'val/{name}{suffix}', and so does self.log in validation_step; only one of the two "
            "values would show. Give one of them another name, such as MetricLogger(..., "
            'prefix="metrics/{stage}/").'
        )
        assert net.seen["train"] == []

    @pytest.mark.parametrize("on_step", [False, True])
    def test_name_that_the_model_logs_in_training_is_refused(self, on_step: bool) -> None:
        class Logs(Steps):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("train/acc", 0.5, on_step=on_step, on_epoch=True)
                return super().training_step(batch, batch_idx)

        with pytest.raises(MisconfigurationException, match=r"'train/acc', and so does self\.log in training_step"):
            fit(Logs(), MetricLogger({"acc": acc()}))

    def test_integer_value_is_logged_as_float(self) -> None:
        class Count(InPlace):
            def compute(self) -> Tensor:
                return torch.tensor([self.update_count + 100_000])  # as tokens are counted

        run = fit(Steps(), MetricLogger({"n": Count()}))
        assert run.callback_metrics["train/n"] == 100_006


class Detection(InPlace):
    """Computes what torchmetrics' MeanAveragePrecision does: scalars, and a vector of the classes that it has seen."""

    def __init__(self, *left_out: str) -> None:
        super().__init__()
        self.left_out = left_out or ("classes",)

    def compute(self) -> Any:
        parts = {"map": self.total, "map_50": self.total / 2}
        return (parts if self.left_out == ("classes",) else {}) | {name: torch.arange(3) for name in self.left_out}


class TestDicts:
    @pytest.mark.parametrize(
        ("metrics", "names", "left_out"),
        [
            (Detection(), {"map", "map_50"}, "classes"),
            (MetricCollection([Detection(), acc()]), {"map", "map_50", "MulticlassAccuracy"}, "classes"),
            (MetricCollection({"d": Detection()}, prefix="p_"), {"p_map", "p_map_50"}, "p_classes"),
            (ClasswiseWrapper(Detection()), {"map", "map_50"}, "classes"),
            (
                {"one": Detection(), "two": Detection()},
                {f"{a}_{b}" for a in ("one", "two") for b in ("map", "map_50")},
                "one_classes, two_classes",
            ),
        ],
        ids=["plain", "in a collection", "with a prefix", "in a ClasswiseWrapper", "twice"],
    )
    def test_scalars_of_a_dict_are_logged_and_the_rest_named_once(
        self, metrics: Any, names: set[str], left_out: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO", "lightning_freeze"):
            run = fit(Steps(), MetricLogger(metrics), max_epochs=2)
        assert run.callback_metrics.keys() == {f"{stage}/{name}" for stage in ("train", "val") for name in names}
        assert [record.message for record in caplog.records if record.name.startswith("lightning_freeze")] == [
            f"MetricLogger logs scalars only, and leaves out what else metrics compute: {left_out}"
        ]

    def test_nested_dicts_are_logged_under_joined_names(self) -> None:
        metric = MultitaskWrapper({"a": Detection(), "b": MeanMetric()})

        def inputs(outputs: Any, batch: Any) -> Any:
            return {"a": outputs["preds"], "b": outputs["preds"].detach()}, {"a": batch[1], "b": torch.ones(4, 3)}

        run = trainer(callbacks=[MetricLogger(metric, stages=["val"], inputs=inputs)])
        (values,) = run.validate(Steps(), loader(8), verbose=False)
        assert values.keys() == {"val/a_map", "val/a_map_50", "val/b"}

    @pytest.mark.parametrize("others", [{}, {"acc": acc()}])
    def test_dict_without_any_scalar_is_an_error(self, others: Any) -> None:
        run = trainer(callbacks=[MetricLogger({"boxes": Detection("ious", "classes"), **others})])
        with pytest.raises(ValueError, match=r"The metric 'boxes' computes a tensor of shape \(3,\), and only scalars"):
            run.validate(Steps(), loader(8), verbose=False)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar_shows_values_with_prog_bar(shown: bool) -> None:
    run = fit(Steps(), MetricLogger({"acc": acc()}, **({"prog_bar": True} if shown else {})))
    assert ({"train/acc", "val/acc"} <= run.progress_bar_metrics.keys()) is shown


class TestAfterAnException:
    class Fails(Steps):
        """Fails in a validation step, if a class of error is set."""

        error: type[BaseException] | None = None

        def step(self, stage: str, batch: Any, dataloader_idx: int = 0) -> dict[str, Tensor]:
            if stage == "val" and self.error and len(self.seen["val"]) % 2:
                raise self.error
            value = torch.tensor(float(self.global_step))
            return {**super().step(stage, batch, dataloader_idx), "value": value}

    def test_failing_sanity_check_keeps_the_resumed_state(self, tmp_path: Path) -> None:
        def run(net: Steps, *callbacks: Callback, **options: Any) -> dict[int, dict[str, float]]:
            extremes = MetricLogger({"m": MinMaxMetric(MeanMetric())}, inputs=lambda outputs, _: (outputs["value"],))
            return fit(net, extremes, *callbacks, limit_train_batches=2, max_epochs=2, **options).epochs

        whole = run(self.Fails(), saving(tmp_path, "{epoch}"))
        failing = self.Fails()
        failing.error = KeyboardInterrupt
        kept = OnExceptionCheckpoint(tmp_path, "failed")
        with pytest.raises(SystemExit):
            run(failing, kept, resume=tmp_path / "epoch=0.ckpt", num_sanity_val_steps=2)
        assert run(self.Fails(), resume=tmp_path / "failed.ckpt") == {1: whole[1]}
        assert [whole[epoch]["val/max"] for epoch in (0, 1)] == [2.0, 4.0]

    def test_values_after_an_exception_cover_what_was_seen_since(self) -> None:
        net = self.Fails()
        net.error = RuntimeError
        run = trainer(callbacks=[MetricLogger({"acc": acc()})], max_epochs=1)
        with pytest.raises(RuntimeError):
            run.fit(net, loader(8), loader(8))
        assert not {"train/acc", "val/acc"} & run.callback_metrics.keys()
        net.error = None
        (values,) = run.validate(net, loader(8), verbose=False)
        assert values == {"val/acc": float(net.expected(acc(), "val", 2))}


# Two processes


def distributed(path: str) -> dict[str, Any]:
    """Fit whole, keep a checkpoint from the middle of the second epoch, and resume from it, on every process."""
    results: dict[str, Any] = {}
    share = Subset(data(), range(dist.get_rank(), 24, 2))
    for label in ("whole", "resumed"):
        net = Steps()
        callbacks: list[Callback] = [MetricLogger({"acc": acc(), "auroc": tm.MulticlassAUROC(3)}), epochs := Epochs()]
        saves = [saving(Path(path), every_n_train_steps=5)] if label == "whole" else []
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
        run = trainer(callbacks=[*callbacks, *saves], enable_checkpointing=label == "whole", **options)
        torch.manual_seed(0)
        resume = f"{path}/step=5.ckpt" if label == "resumed" else None
        run.fit(net, StatefulDataLoader(share, batch_size=4), DataLoader(share, batch_size=4), ckpt_path=resume)
        results[label] = epochs.train
        results[f"{label} batches"] = [(preds, target) for _, preds, target in net.seen["train"][-3:]]
    return results


def test_two_processes_log_the_metric_of_all_data_and_resume(tmp_path: Path) -> None:
    first, second = on_two_processes(distributed, tmp_path, str(tmp_path))
    assert first["whole"] == second["whole"]
    assert first["whole"].keys() == {0, 1}
    expected = {"train/acc": acc(), "train/auroc": tm.MulticlassAUROC(3)}
    for preds, target in first["whole batches"] + second["whole batches"]:
        for metric in expected.values():
            # Batch by batch: torchmetrics takes logits of a batch that are all from 0 to 1 for probabilities.
            metric.update(preds, target)
    for name, metric in expected.items():
        assert first["whole"][1][name] == pytest.approx(float(metric.compute()), abs=1e-7)
    for rank in (first, second):
        assert rank["resumed"] == {1: rank["whole"][1]}
