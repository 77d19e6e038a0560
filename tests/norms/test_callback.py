"""NormLogger in real fits: what it logs is what a training loop written by hand measures."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import NormLogger
from tests.nets import Net, Probe, adamw, loader, needs_fsdp2, same, snapshot, trainer
from tests.replicas import on_two_processes


class Recorder(Logger):
    """Keeps what NormLogger logs: a list of (step, metrics)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.others: list[int] = []

    name = version = "recorder"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        norms = {name: value for name, value in metrics.items() if name.startswith("norm/")}
        if norms:
            self.rows.append((step, norms))
        else:
            self.others.append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Plain(Net):
    """Without dropout, so that every forward is the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def half_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def nesterov(params: Any) -> torch.optim.Optimizer:
    """One that adds its momentum to the gradients in place."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, foreach=True)


def fit(
    net: LightningModule, *callbacks: Callback, samples: int = 24, data: Any = None, resume: Any = None, **options: Any
) -> Recorder:
    recorder = Recorder()
    defaults = {"max_epochs": 1, "limit_val_batches": 0, "logger": recorder, "log_every_n_steps": 1}
    recorder.trainer = trainer(callbacks=list(callbacks), **{**defaults, **options})
    recorder.trainer.fit(net, data or loader(samples), ckpt_path=resume)
    return recorder


def norm(tensors: Any) -> float:
    return math.hypot(*(float(tensor.double().norm()) for tensor in tensors))


def by_hand(net: Plain, *, accumulate: int = 1, clip: float | None = None) -> list[dict[str, float]]:
    """The same fit as a loop that everybody can read."""
    optimizer, rows = net.make_optimizer(net.parameters()), []
    for index, (images, targets) in enumerate(loader()):
        (nn.functional.cross_entropy(net(images), targets) / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        parameters = list(net.parameters())
        row = {"norm/grad": norm(p.grad for p in parameters), "norm/weight": norm(p.detach() for p in parameters)}
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        row["norm/grad_clipped"] = norm(p.grad for p in parameters)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        row["norm/update"] = norm(p.detach() - b for p, b in zip(parameters, before, strict=True))
        row["norm/update_ratio"] = row["norm/update"] / row["norm/weight"]
        row["norm/nonfinite_grads"] = 0.0
        optimizer.zero_grad()
        rows.append(row)
    return rows


class TestValues:
    @pytest.mark.parametrize("optimizer", [half_sgd, adamw, nesterov])
    @pytest.mark.parametrize("accumulate", [1, 3])
    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_norms_equal_those_of_a_loop_by_hand(self, optimizer: Any, accumulate: int, clip: float | None) -> None:
        net = Plain(optimizer=optimizer)
        expected = by_hand(copy.deepcopy(net), accumulate=accumulate, clip=clip)
        recorder = fit(net, NormLogger(), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
        assert [row for _, row in recorder.rows] == [pytest.approx(row, rel=1e-5) for row in expected]
        assert len(expected) == 6 // accumulate

    def test_grad_clipped_shows_clipping_by_value(self) -> None:
        recorder = fit(Plain(), NormLogger(), gradient_clip_val=1e-4, gradient_clip_algorithm="value")
        count = sum(p.numel() for p in Plain().parameters())
        assert all(0 < row["norm/grad_clipped"] <= 1e-4 * math.sqrt(count) for _, row in recorder.rows)
        assert all(row["norm/grad"] > row["norm/grad_clipped"] for _, row in recorder.rows)

    def test_norms_are_in_callback_and_logged_metrics(self) -> None:
        recorder = fit(Plain(), NormLogger())
        for metrics in (recorder.trainer.callback_metrics, recorder.trainer.logged_metrics):
            last = {name: float(value) for name, value in metrics.items() if name.startswith("norm/")}
            assert last == pytest.approx(recorder.rows[-1][1], rel=1e-6)

    def test_lbfgs_shows_its_first_gradient(self) -> None:
        net = Plain(optimizer=lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3))
        first = by_hand(copy.deepcopy(Plain(optimizer=half_sgd)), accumulate=1)  # only its shape
        recorder = fit(net, NormLogger())
        assert [step for step, _ in recorder.rows] == list(range(6))
        assert all(row.keys() == first[0].keys() and row["norm/update"] > 0 for _, row in recorder.rows)
        assert all(row["norm/grad_clipped"] == row["norm/grad"] for _, row in recorder.rows)


ALL = {f"norm/{name}" for name in ("grad", "grad_clipped", "nonfinite_grads", "weight", "update", "update_ratio")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"what": ("grad",)}, {"norm/grad", "norm/grad_clipped", "norm/nonfinite_grads"}),
        ({"what": ["weight"]}, {"norm/weight"}),
        ({"what": ("update",)}, {"norm/update", "norm/update_ratio"}),
        ({"per": "module"}, {"backbone", "neck", "head"}),
        ({"per": "parameter"}, {name for name, _ in Plain().named_parameters()}),
    ],
)
def test_what_and_per_choose_the_norms_that_are_logged(options: dict[str, Any], expected: set[str]) -> None:
    if "per" in options:
        expected = ALL | {f"{name}/{place}" for name in ALL - {"norm/nonfinite_grads"} for place in expected}
    recorder = fit(Plain(), NormLogger(**options), limit_train_batches=1)
    assert recorder.rows[0][1].keys() == expected


class TestWhen:
    @pytest.mark.parametrize(("every", "log_every", "steps"), [(None, 4, [3, 7, 11]), (5, 4, [4, 9]), (None, 0, [])])
    def test_norms_are_logged_every_n_steps(self, every: int | None, log_every: int, steps: list[int]) -> None:
        recorder = fit(Plain(), NormLogger(every_n_steps=every), log_every_n_steps=log_every, max_epochs=2)
        assert [step for step, _ in recorder.rows] == steps

    def test_norms_are_logged_at_the_steps_of_the_trainer(self) -> None:
        class Logs(Plain):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                self.log("loss", loss)
                return loss

        recorder = fit(Logs(), NormLogger(), log_every_n_steps=2, accumulate_grad_batches=2, max_epochs=2)
        assert [step for step, _ in recorder.rows] == recorder.others == [1, 3, 5]

    @pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    def test_resumed_fit_logs_at_the_same_steps(self, tmp_path: Path, stop: int) -> None:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="stop")
        options = {"max_steps": stop, "max_epochs": None, "enable_checkpointing": True}
        fit(Plain(), NormLogger(every_n_steps=3), saving, **options)
        recorder = fit(Plain(), NormLogger(every_n_steps=3), resume=tmp_path / "stop.ckpt", max_epochs=2)
        assert all(step % 3 == 2 for step, _ in recorder.rows)
        assert recorder.rows[0][0] >= stop

    def test_logged_step_waits_for_the_device_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waits = []
        original = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda t: waits.append(t.shape) or original(t))
        recorder = fit(TwoOptimizers(), NormLogger(every_n_steps=2))
        assert len(waits) == len(recorder.rows) == 3


class TestMixedPrecision:
    def rows(self, scale: float, make: Callable[[], Plain] = Plain, **options: Any) -> list[dict[str, float]]:
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        net = make()
        return [row for _, row in fit(net, NormLogger(per="module"), plugins=plugin, **options).rows]

    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_norms_are_without_the_loss_scale(self, clip: float | None) -> None:
        expected = self.rows(1.0, gradient_clip_val=clip)
        assert self.rows(256.0, gradient_clip_val=clip) == [pytest.approx(row, rel=0.05) for row in expected]
        assert len(expected) == 6

    def test_norms_of_a_fused_optimizer_are_without_the_loss_scale(self) -> None:
        def sgd(fused: bool) -> Plain:
            return Plain(optimizer=lambda params: torch.optim.SGD(params, lr=0.01, fused=fused))

        expected = self.rows(256.0, lambda: sgd(fused=False))
        assert self.rows(256.0, lambda: sgd(fused=True)) == [pytest.approx(row, rel=0.01) for row in expected]

    def test_norms_in_manual_optimization_are_without_the_loss_scale(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TwoOptimizers, "clip", None)  # by hand one would clip what is still scaled
        expected = self.rows(1.0, TwoOptimizers)
        assert self.rows(256.0, TwoOptimizers) == [pytest.approx(row, rel=0.05) for row in expected]

    @pytest.mark.parametrize("fused", [False, True])
    def test_skipped_step_has_no_update_and_names_bad_gradients(
        self, fused: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        callback = NormLogger()
        net = Plain(optimizer=lambda params: torch.optim.SGD(params, lr=0.1, fused=fused))
        net.head.bias.register_hook(lambda grad: grad * math.inf)
        before = snapshot(net.head)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
        with caplog.at_level(logging.WARNING, "lightning_freeze"):
            recorder = fit(net, callback, plugins=plugin, limit_train_batches=1)
        (row,) = (row for _, row in recorder.rows)
        assert same(before, snapshot(net.head))
        assert row["norm/update"] == row["norm/update_ratio"] == 0.0
        assert row["norm/nonfinite_grads"] == 1.0
        assert callback.nonfinite == ("head.bias",)
        assert "1 gradient is not finite: head.bias" in caplog.text


class TestNonFinite:
    def test_nonfinite_gradients_are_counted_and_the_first_named(self, caplog: pytest.LogCaptureFixture) -> None:
        net = Plain()
        for parameter in net.parameters():
            parameter.register_hook(lambda grad: grad * math.nan)
        with caplog.at_level(logging.WARNING, "lightning_freeze"):
            recorder = fit(net, NormLogger(), limit_train_batches=1)
        assert recorder.rows[0][1]["norm/nonfinite_grads"] == 12.0
        assert (
            "step 0: 12 gradients are not finite: backbone.0.weight, backbone.0.bias, backbone.1.weight" in caplog.text
        )
        assert caplog.text.rstrip().endswith("and 7 more")

    def test_nonfinite_gradient_in_two_optimizers_is_named_once(self, caplog: pytest.LogCaptureFixture) -> None:
        class Both(TwoOptimizers):
            def parts(self) -> list[list[nn.Parameter]]:
                return [[self.head.bias], [self.neck.weight, self.head.bias]]

            def training_step(self, batch: Any, batch_idx: int) -> None:
                self.manual_backward(self.head.bias.sum() * math.nan)
                for optimizer in self.optimizers():
                    optimizer.step()

        callback = NormLogger()
        recorder = fit(Both(), callback, limit_train_batches=1)
        assert callback.nonfinite == ("head.bias",)
        assert "1 gradient is not finite: head.bias" in caplog.text
        assert [recorder.rows[0][1][f"norm/optimizer_{index}/nonfinite_grads"] for index in (0, 1)] == [1.0, 1.0]

    def test_nonfinite_is_empty_when_gradients_are_finite_again(self) -> None:
        callback, net = NormLogger(), Plain()
        net.head.bias.register_hook(lambda grad: grad * (math.nan if net.global_step == 0 else 1.0))
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))  # skips the first step
        recorder = fit(net, callback, limit_train_batches=2, plugins=plugin)
        assert [row["norm/nonfinite_grads"] for _, row in recorder.rows] == [1.0, 0.0]
        assert callback.nonfinite == ()


class TestWhichParameters:
    def test_frozen_parameters_do_not_count(self) -> None:
        class Frozen(Plain):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.neck.requires_grad_(batch_idx >= 2)

        recorder = fit(Frozen(), NormLogger(per="parameter"), limit_train_batches=4)
        has_neck = [any("neck" in name for name in row) for _, row in recorder.rows]
        assert has_neck == [False, False, True, True]

    def test_parameter_frozen_after_backward_counts_while_its_gradient_is_applied(self) -> None:
        class FreezesLate(Plain):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.neck.requires_grad_(batch_idx != 1)  # in the middle of an accumulation, by flag alone

        net = FreezesLate(optimizer=half_sgd)
        before = snapshot(net.neck)
        (_, row), *_ = fit(net, NormLogger(per="module"), accumulate_grad_batches=2, limit_train_batches=2).rows
        assert not same(before, snapshot(net.neck))
        assert row["norm/update/neck"] == pytest.approx(0.5 * row["norm/grad/neck"], rel=1e-4)

    def test_parameters_in_no_optimizer_do_not_count(self) -> None:
        net = Plain(optimizer=lambda params: half_sgd(list(params)[-2:]))
        (_, row), *_ = fit(net, NormLogger(per="module")).rows
        assert {name.split("/")[2] for name in row if name.count("/") == 2} == {"head"}

    def test_parameter_without_gradient_has_a_weight_and_no_update(self) -> None:
        class Unused(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.backbone(x).mean((2, 3)))

        (_, row), *_ = fit(Unused(optimizer=half_sgd), NormLogger(per="parameter")).rows
        assert "norm/grad/neck.weight" not in row
        assert row["norm/weight/neck.weight"] > 0
        assert row["norm/update/neck.weight"] == row["norm/update_ratio/neck.weight"] == 0.0

    def test_sparse_gradients_are_measured(self) -> None:
        class Words(LightningModule):
            def __init__(self, sparse: bool) -> None:
                super().__init__()
                self.table = nn.Embedding(5, 3, sparse=sparse)
                nn.init.ones_(self.table.weight)

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                return self.table(batch[0]).pow(2).sum()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        words = DataLoader(TensorDataset(torch.tensor([1, 1, 4, 2, 2, 2])), batch_size=3)
        dense, sparse = (fit(Words(sparse), NormLogger(per="parameter"), data=words).rows for sparse in (False, True))
        assert sparse == [(step, pytest.approx(row, rel=1e-6)) for step, row in dense]
        assert dense[0][1]["norm/grad"] == pytest.approx(norm([torch.tensor([4.0] * 3 + [2.0] * 3)]))


class TwoOptimizers(Plain):
    """Manual optimization: the backbone and the rest step apart, the second one after clipping by hand."""

    clip = 0.01

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, parameters in zip(self.optimizers(), self.parts(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            row = {"grad": norm(p.grad for p in parameters)}
            if parameters[0] is self.neck.weight and self.clip:
                nn.utils.clip_grad_norm_(parameters, self.clip)
            row["grad_clipped"] = norm(p.grad for p in parameters)
            self.seen.append(row)
            optimizer.step()

    def parts(self) -> list[list[nn.Parameter]]:
        return [list(self.backbone.parameters()), [*self.neck.parameters(), *self.head.parameters()]]

    def configure_optimizers(self) -> Any:
        return [half_sgd(part) for part in self.parts()]


def assert_shown(rows: list[dict[str, float]], seen: list[dict[str, float]]) -> None:
    """Assert that each row shows what was seen of both optimizers in its batch."""
    for index, row in enumerate(rows):
        for which in (0, 1):
            expected = seen[2 * index + which]
            assert {name: row[f"norm/optimizer_{which}/{name}"] for name in expected} == pytest.approx(
                expected, rel=1e-5
            )


class TestManualOptimization:
    def test_each_optimizer_logs_norms_around_clipping_by_hand(self) -> None:
        net = TwoOptimizers()
        rows = [row for _, row in fit(net, NormLogger(per="module")).rows]
        assert len(rows) == 6
        assert_shown(rows, net.seen)
        for row in rows:
            for which in ("norm/optimizer_0", "norm/optimizer_1"):
                assert row[f"{which}/update"] == pytest.approx(0.5 * row[f"{which}/grad_clipped"], rel=1e-3)
            assert row["norm/optimizer_1/grad_clipped"] == pytest.approx(TwoOptimizers.clip, rel=1e-2)
            assert "norm/optimizer_0/grad/backbone" in row
            assert "norm/optimizer_1/grad/backbone" not in row

    @pytest.mark.parametrize("toggle", [True, False])
    def test_two_backwards_before_two_steps_are_measured_apart(self, toggle: bool) -> None:
        class Together(TwoOptimizers):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                for optimizer, parameters in zip(self.optimizers(), self.parts(), strict=True):
                    optimizer.zero_grad()
                    if toggle:
                        self.toggle_optimizer(optimizer)
                    loss = sum(p.pow(3).sum() for p in parameters)  # the gradient grows after the clip, if that counts
                    self.manual_backward(loss)
                    self.manual_backward(2 * sum(p.sum() for p in parameters[1:]))
                    row = {"grad": norm(p.grad for p in parameters)}
                    nn.utils.clip_grad_norm_(parameters, self.clip)
                    self.seen.append({**row, "grad_clipped": norm(p.grad for p in parameters)})
                    if toggle:
                        self.untoggle_optimizer(optimizer)
                for optimizer in self.optimizers():
                    optimizer.step()

        net = Together()
        rows = [row for _, row in fit(net, NormLogger()).rows]
        assert len(rows) == 6
        assert_shown(rows, net.seen)

    def test_gradient_removed_before_the_step_does_not_count(self) -> None:
        class Forgets(TwoOptimizers):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                first, _ = self.optimizers()
                self.manual_backward(self(batch[0]).sum())
                first.zero_grad()
                self.manual_backward(self.backbone[0].weight.sum())
                first.step()

        (_, row), *_ = fit(Forgets(), NormLogger(per="parameter")).rows
        assert {name for name in row if name.startswith("norm/optimizer_0/grad/")} == {
            "norm/optimizer_0/grad/backbone.0.weight"
        }
        assert row["norm/optimizer_0/grad"] == pytest.approx(math.sqrt(Net().backbone[0].weight.numel()))

    @pytest.mark.parametrize("again", [True, False])
    @pytest.mark.parametrize("precision", ["32-true", "16-mixed", "fused"])
    def test_gradient_zeroed_in_place_is_zero(self, again: bool, precision: str) -> None:
        class Zeroes(TwoOptimizers):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                first, _ = self.optimizers()
                self.manual_backward(self(batch[0]).sum())
                first.zero_grad(set_to_none=False)
                if again:
                    self.manual_backward(self.backbone[0].weight.sum())
                first.step()

            def configure_optimizers(self) -> Any:
                fused = precision == "fused"
                return [torch.optim.SGD(part, lr=0.1, fused=fused) for part in self.parts()]

        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if precision != "32-true" else []
        rows = [row for _, row in fit(Zeroes(), NormLogger(per="parameter"), plugins=plugins).rows]
        assert len(rows) == 6
        expected = math.sqrt(Net().backbone[0].weight.numel()) if again else 0.0
        for row in rows:
            norms = {name: value for name, value in row.items() if name.startswith("norm/optimizer_0/grad/")}
            assert len(norms) == 8
            assert norms.pop("norm/optimizer_0/grad/backbone.0.weight") == pytest.approx(expected)
            assert set(norms.values()) == {0.0}
            assert row["norm/optimizer_0/grad"] == row["norm/optimizer_0/grad_clipped"] == pytest.approx(expected)

    def test_gradient_clipped_to_zero_by_an_infinite_one_is_shown_unclipped(self) -> None:
        class Clips(TwoOptimizers):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                first, _ = self.optimizers()
                self.manual_backward(sum(p.sum() for p in self.backbone.parameters()))
                nn.utils.clip_grad_norm_(self.backbone.parameters(), 1.0)
                first.step()

        net = Clips()
        net.backbone[0].bias.register_hook(lambda grad: grad * math.inf)
        (_, row), *_ = fit(net, NormLogger(per="parameter"), limit_train_batches=1).rows
        assert row["norm/optimizer_0/grad/backbone.1.bias"] == 2.0
        assert row["norm/optimizer_0/grad_clipped/backbone.1.bias"] == 0.0

    def test_optimizer_that_steps_seldom_is_logged_when_it_does(self) -> None:
        class Seldom(TwoOptimizers):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                first, second = self.optimizers()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                first.step()
                if batch_idx % 4 == 2:
                    second.step()

        rows = fit(Seldom(), NormLogger(every_n_steps=2), samples=48).rows
        assert [step for step, row in rows if "norm/optimizer_0/grad" in row] == [1, 3, 5, 7, 9, 11]
        assert [step for step, row in rows if "norm/optimizer_1/grad" in row] == [2, 6, 10]

    def test_first_of_several_steps_in_a_batch_is_shown(self) -> None:
        class Often(TwoOptimizers):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                first, _ = self.optimizers()
                for _ in range(3):
                    first.zero_grad()
                    self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                    self.seen.append({"grad": norm(p.grad for p in self.backbone.parameters())})
                    first.step()

        net = Often()
        rows = fit(net, NormLogger()).rows
        firsts = [seen["grad"] for seen in net.seen[::3]]
        assert [row["norm/optimizer_0/grad"] for _, row in rows] == pytest.approx(firsts, rel=1e-5)
        assert [row["norm/optimizer_0/update"] for _, row in rows] == pytest.approx([0.5 * f for f in firsts], rel=1e-3)


def test_no_hook_is_left_between_logged_steps() -> None:
    counts: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            (one,) = trainer.optimizers
            counts.append(len(one._optimizer_step_post_hooks) + len(one._optimizer_step_pre_hooks))

    fit(Plain(), NormLogger(), Counts())
    assert counts == [0] * 6


class TestAfterAnException:
    def test_failing_step_names_its_nonfinite_gradients(self, caplog: pytest.LogCaptureFixture) -> None:
        class Refuses(Plain):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                if not self.head.bias.grad.isfinite().all():
                    raise FloatingPointError("not finite")

        callback, net = NormLogger(), Refuses()
        net.head.bias.register_hook(lambda grad: grad * (math.nan if net.global_step == 1 else 1.0))
        run = trainer(callbacks=[callback], limit_val_batches=0, log_every_n_steps=1)
        with pytest.raises(FloatingPointError):
            run.fit(net, loader())
        assert callback.nonfinite == ("head.bias",)
        assert "step 1: 1 gradient is not finite: head.bias" in caplog.text
        assert run.callback_metrics["norm/nonfinite_grads"] == 0.0  # of the last step that ended

    def test_next_fit_begins_without_nonfinite_names(self) -> None:
        callback = NormLogger()
        callback.nonfinite = ("head.bias",)
        seen = []
        look = Probe(start=lambda *_: seen.append(callback.nonfinite))
        fit(Plain(), callback, look, limit_train_batches=1)
        assert seen == [()]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"per": "modules"}, ValueError, r"per is one of 'total', 'module', 'parameter'\. Did you mean 'module'\?"),
            ({"what": ("gradient",)}, ValueError, r"what is one of 'grad', 'weight', 'update'\. Did you mean 'grad'\?"),
            ({"what": "grad"}, TypeError, r"Write what=\('grad',\)"),
            ({"what": ()}, ValueError, "logs nothing"),
            ({"every_n_steps": 0}, ValueError, "at least 1"),
            ({"every_n_steps": 2.0}, TypeError, "whole number"),
            ({"every_n_steps": True}, TypeError, "whole number"),
        ],
    )
    def test_bad_arguments_are_refused_at_construction(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            NormLogger(**arguments)

    def test_strategy_that_hides_parameters_is_refused(self) -> None:
        run = trainer()
        run.strategy.__class__ = FSDPStrategy
        with pytest.raises(MisconfigurationException, match="ModelParallelStrategy"):
            NormLogger().on_fit_start(run, Plain())

    def test_optimizer_that_is_not_of_torch_is_refused(self) -> None:
        class Steps:
            param_groups: list[Any] = []  # noqa: RUF012
            defaults: dict[str, Any] = {}  # noqa: RUF012
            state: dict[str, Any] = {}  # noqa: RUF012

            def state_dict(self) -> dict[str, Any]:
                return {}

            def load_state_dict(self, state: Any) -> None: ...

            def step(self, closure: Any = None) -> None: ...

        with pytest.raises(MisconfigurationException, match="Steps is not a"):
            fit(Plain(optimizer=lambda params: Steps()), NormLogger())


class Sharded(Plain):
    """FSDP2 with a frozen unit."""

    def __init__(self) -> None:
        super().__init__(optimizer=half_sgd)
        self.backbone.requires_grad_(False)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for part in (self.backbone, self.neck, self.head, self):
                fully_shard(part, mesh=mesh)


def sharded_rows(sharded: bool) -> list[dict[str, float]]:
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "auto"
    net, callback, rows = Sharded(), NormLogger(per="parameter"), []

    class Rows(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("norm/")})

    run = trainer(
        strategy=strategy,
        devices=2 if sharded else 1,
        callbacks=[callback, Rows()],
        max_epochs=1,
        limit_val_batches=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    run.fit(net, loader(8))
    return rows


@needs_fsdp2
def test_norms_of_dtensors_are_those_of_the_whole(tmp_path: Path) -> None:
    expected = sharded_rows(False)
    for rows in on_two_processes(sharded_rows, tmp_path, True):
        assert rows == [pytest.approx(row, rel=1e-5) for row in expected]
    assert len(expected) == 2


class ClipsBetween(TwoOptimizers):
    """Clips the backbone's gradients by hand before a backward that only reaches the head."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        backbone, rest = self.parts()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        row = {"grad": norm(p.grad for p in backbone)}
        nn.utils.clip_grad_norm_(backbone, 0.001)
        self.manual_backward(self.head(torch.ones(1, 4)).pow(2).sum())
        self.seen += [
            {**row, "grad_clipped": norm(p.grad for p in backbone)},
            {"grad": norm(p.grad for p in rest), "grad_clipped": norm(p.grad for p in rest)},
        ]
        for optimizer in self.optimizers():
            optimizer.step()


def clipped_between() -> dict[str, Any]:
    results = {}
    for view in (True, False):
        strategy = DDPStrategy(gradient_as_bucket_view=view, find_unused_parameters=True)
        net = ClipsBetween()
        recorder = fit(net, NormLogger(), samples=12, strategy=strategy, devices=2, use_distributed_sampler=False)
        results[str(view)] = {"rows": [row for _, row in recorder.rows], "seen": net.seen}
    return results


def test_clipped_gradients_in_a_shared_bucket_are_not_measured_again(tmp_path: Path) -> None:
    for rank in on_two_processes(clipped_between, tmp_path):
        for result in rank.values():
            assert len(result["rows"]) == 3
            assert_shown(result["rows"], result["seen"])
