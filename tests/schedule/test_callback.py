"""FreezeSchedule beside everything else that a Trainer can hold and do."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, GradientAudit, Phase, Plateau
from tests.nets import Net, Probe, adamw, averaging, loader, moved, same, sgd, snapshot, trainer


def trains(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


def below(net: nn.Module, *tops: str) -> set[str]:
    return {name for name, _ in net.named_parameters() if name.startswith(tuple(f"{top}." for top in tops))}


# Compiled modules


@pytest.mark.parametrize("how", ["module", "backbone", "in place"])
def test_compiled_model_moves_the_same_in_each_phase(how: str) -> None:
    """Names show no wrapper, and each phase moves the same as without torch.compile."""
    found: dict[bool, list[Any]] = {False: [], True: []}
    for compiled, seen in found.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        net: Any = Net(sgd)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if compiled and how == "backbone":
            net.backbone = torch.compile(net.backbone, backend="eager")
        if compiled and how == "in place":
            net.backbone.compile(backend="eager")
        given = torch.compile(net, backend="eager") if compiled and how == "module" else net
        schedule = FreezeSchedule(
            [Phase("backbone", epochs=1), Phase(["head", "neck"], epochs=1), Phase("*", lr_scale={"backbone": 0.5})],
            verbose=False,
        )

        def end(_: Trainer, module: LightningModule, seen: list[Any] = seen) -> None:
            weights = {name.replace("_orig_mod.", ""): value for name, value in snapshot(module).items()}
            flags = {name.replace("_orig_mod.", "") for name in trains(module)}
            seen.append((weights, flags))

        trainer(callbacks=[schedule, Probe(end=end)], max_epochs=3).fit(given, loader(), loader())
        assert schedule.history == [(0, 0, 0), (1, 6, 1), (2, 12, 2)]
        assert all(module.training and "train" not in module.__dict__ for module in net.modules())
    assert len(found[True]) == 18
    assert same(found[True], found[False])


# Optimizers


class Gan(LightningModule):
    """Two networks, two optimizers, manual optimization."""

    def __init__(self, toggle: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.toggle = toggle

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].flatten(1)[:, :2]
        for optimizer, sign, fake in zip(self.optimizers(), (1.0, -1.0), (False, True), strict=True):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            made = self.generator(real)
            loss = sign * (self.critic(made) - (0.0 if not fake else self.critic(real))).mean()
            optimizer.zero_grad()
            if loss.requires_grad:
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [adamw(self.generator.parameters()), sgd(self.critic.parameters())]
        return optimizers, [lrs.OneCycleLR(optimizer, 0.1, total_steps=60) for optimizer in optimizers]


# torch's, for an optimizer of which nothing trains
@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")
@pytest.mark.parametrize("toggle", [False, True])
def test_gan_trains_the_network_of_each_phase_only(toggle: bool) -> None:
    torch.manual_seed(0)
    net = Gan(toggle)
    schedule = FreezeSchedule(
        [
            Phase("*", epochs=1),
            Phase("critic", epochs=1),
            Phase(["generator.2", "critic.0"], steps=6, lr_scale={"generator": 0.5}),
            Phase("*"),
        ]
    )
    log: dict[int, tuple[set[str], set[str]]] = {}
    before: dict[str, Tensor] = {}

    def start(run: Trainer, module: LightningModule) -> None:
        if schedule.phase_index not in log:
            log[schedule.phase_index] = (trains(module), set())
            before.clear()
            before.update(snapshot(module))
        held = [set(map(id, (p for g in o.param_groups for p in g["params"]))) for o in run.optimizers]
        for name, p in module.named_parameters():
            home = 0 if name.startswith("generator") else 1
            assert id(p) in held[home]
            assert id(p) not in held[1 - home]

    def end(_: Trainer, module: LightningModule) -> None:
        log[schedule.phase_index][1].update(moved(before, snapshot(module)))

    trainer(callbacks=[schedule, Probe(start, end)], max_epochs=4).fit(net, loader())
    parameters = {name for name, _ in net.named_parameters()}
    for flags, changed in log.values():
        assert changed & parameters <= flags
        assert flags - changed <= {"critic.2.bias", "generator.0.bias"}  # without a gradient here
    # With two optimizers each one's step counts.
    assert schedule.history == [(0, 0, 0), (1, 12, 1), (2, 24, 2), (2, 30, 3)]


class ByHand(Net):
    """Accumulates over two batches itself."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_plateau_does_not_cut_an_accumulation_window_of_the_user() -> None:
    """A plateau seen between two optimizer steps waits for the next one."""
    schedule = FreezeSchedule([Phase("*", until=Plateau("val_loss", patience=2, min_delta=10.0)), Phase("head")])
    seen = []
    probe = Probe(lambda run, _: seen.append((run.global_step, schedule.phase_index)))
    run = trainer(callbacks=[schedule, probe], max_epochs=2, val_check_interval=3)
    run.fit(ByHand(), loader(), loader())
    # Validation runs after batches 3 and 6 of an epoch, batch 3 in the middle of the user's window.
    assert seen[6:] == [(3, 0), (3, 0), (4, 0), (4, 0), (5, 1), (5, 1)]
    assert schedule.history == [(0, 0, 0), (1, 5, 1)]


@pytest.mark.parametrize("kind", ["generator", "named", "tensor lr", "fused", "foreach", "capturable-free"])
def test_optimizer_of_every_construction_follows_the_phases(kind: str) -> None:
    def build(params: Any) -> torch.optim.Optimizer:
        if kind == "generator":
            return torch.optim.AdamW(p for p in params)
        if kind == "named":
            return torch.optim.AdamW([(f"n{index}", p) for index, p in enumerate(params)])
        if kind == "tensor lr":
            return torch.optim.AdamW(params, lr=torch.tensor(1e-3))
        if kind == "fused":
            return torch.optim.AdamW(params, fused=True)
        if kind == "foreach":
            return torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)
        return torch.optim.AdamW(params, foreach=False)

    net = Net(build)
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"neck": 0.1}, epochs=1), Phase("neck")])
    before: list[dict[str, Tensor]] = []
    changed: list[set[str]] = []

    def end(_: Trainer, module: LightningModule) -> None:
        parameters = {name for name, _ in module.named_parameters()}
        changed.append(moved(before[-1], snapshot(module)) & parameters)

    probe = Probe(lambda _, module: before.append(snapshot(module)), end)
    trainer(callbacks=[schedule, probe], max_epochs=3, gradient_clip_val=0.5).fit(net, loader(), loader())
    biases = {"backbone.0.bias", "backbone.4.bias"}  # in front of a BatchNorm: gradients of rounding size
    expected = [below(net, "head"), trains(net), below(net, "neck")]
    assert [names - biases for names in changed] == [names - biases for names in expected for _ in range(6)]


def test_phases_change_without_an_optimizer(recwarn: pytest.WarningsRecorder) -> None:
    class Still(Net):
        def configure_optimizers(self) -> None:
            return None

    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer(callbacks=[schedule], max_epochs=2).fit(Still(), loader(), loader())
    assert schedule.phase_index == 1


def test_optimizer_with_parameters_outside_the_module_is_refused() -> None:
    """They have no name, so no phase can say whether they train: rather an error than silence."""

    class Outside(Net):
        def configure_optimizers(self) -> Any:
            self.outside = [nn.Parameter(torch.zeros(3))]
            return adamw([*self.parameters(), *self.outside])

    with pytest.raises(MisconfigurationException, match=r"1 parameter.* not the LightningModule's"):
        trainer(callbacks=[FreezeSchedule([Phase("*")])]).fit(Outside(), loader(), loader())


# Tied, lazy and integer parameters


def test_tied_parameter_trains_if_either_name_is_selected() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(4, 4)
            self.twin.weight = self.neck.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.twin(self.neck(self.backbone(x).mean((2, 3))))))

    net = Tied()
    before = snapshot(net)
    schedule = FreezeSchedule([Phase("twin", epochs=1), Phase("head")])
    flags = []
    probe = Probe(lambda _, module: flags.append(trains(module)))
    trainer(callbacks=[schedule, probe], max_epochs=2).fit(net, loader(), loader())
    assert flags == [{"neck.weight", "twin.bias"}] * 6 + [{"head.weight", "head.bias"}] * 6
    assert torch.equal(net.twin.weight, net.neck.weight)
    changed = {name for name in moved(before, snapshot(net)) if not name.startswith(("backbone.1", "backbone.5"))}
    assert changed == {"neck.weight", "twin.weight", "twin.bias", "head.weight", "head.bias"}


def test_integer_parameters_never_train() -> None:
    class Quantised(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(4), requires_grad=False)
            self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)

    net = Quantised()
    trainer(callbacks=[FreezeSchedule([Phase("head", epochs=1), Phase("*")])], max_epochs=2).fit(net, loader())
    assert torch.equal(net.table, torch.arange(4))
    assert not net.table.requires_grad


def test_lazy_modules_get_their_shape_while_frozen() -> None:
    """Their parameters get shapes in the first batch, here while they are frozen."""

    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.neck = nn.LazyLinear(4)  # type: ignore[assignment]
            self.norm = nn.LazyBatchNorm1d()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.norm(self.neck(self.backbone(x).mean((2, 3))))))

    net = Lazy()
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    assert [row[3] for row in schedule.preview(net, 2).rows] == ["15", "255"]
    shots = []
    probe = Probe(end=lambda _, module: shots.append((trains(module), snapshot(module))))
    trainer(callbacks=[schedule, probe], max_epochs=2).fit(net, loader(), loader())
    assert [flags for flags, _ in shots] == [below(net, "head")] * 6 + [trains(net)] * 6
    assert not [name for name in moved(shots[0][1], shots[5][1]) if not name.startswith("head.")]
    assert below(net, "neck", "norm") <= moved(shots[5][1], snapshot(net)) | {"neck.bias"}


# Accumulation


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [{"accumulate_grad_batches": 4}, {"callbacks": {0: 1, 1: 4, 2: 3}}])
def test_step_phases_begin_between_accumulation_windows_only(accumulate: dict[str, Any], clip: str | None) -> None:
    """Ten batches an epoch, so that the last window is not a whole one; phases begin between windows only."""
    schedule = FreezeSchedule([Phase("*", steps=11), Phase("head", steps=3), Phase("neck", steps=1), Phase("*")])
    moments: list[tuple[int, int]] = []
    broken: list[int] = []

    def start(run: Trainer, module: LightningModule) -> None:
        moments.append((run.global_step, schedule.phase_index))
        if run.fit_loop.batch_idx % run.accumulate_grad_batches:
            broken.extend(i for i, p in enumerate(module.parameters()) if p.requires_grad and p.grad is None)

    callbacks: list[Callback] = [schedule, Probe(start)]
    options = {**accumulate, "gradient_clip_val": 0.01 if clip else None, "gradient_clip_algorithm": clip}
    if "callbacks" in options:
        callbacks.append(GradientAccumulationScheduler(options.pop("callbacks")))
    trainer(callbacks=callbacks, max_epochs=5, **options).fit(Net(), loader(40), loader())
    assert not broken
    assert moments == [(step, sum(step >= end for end in (11, 14, 15))) for step, _ in moments]


# Plateaus


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 0.5}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}], ids=str
)
def test_plateau_counts_each_validation_once(options: dict[str, Any]) -> None:
    patience = 3
    schedule = FreezeSchedule(
        [Phase("*", until=Plateau("val_loss", patience=patience, min_delta=100.0)), Phase("head")], verbose=False
    )
    runs: list[tuple[int, int]] = []

    class Counting(Net):
        def on_validation_epoch_end(self) -> None:
            runs.append((self.current_epoch, self.trainer.global_step))

    trainer(callbacks=[schedule], max_epochs=10, **options).fit(Counting(), loader(), loader())
    end = runs[patience]  # the first look is the best one
    expected = (end[0] + (end[1] % 6 == 0), end[1], 1)
    assert schedule.history == [(0, 0, 0), expected]


@pytest.mark.parametrize("first", [{"until": Plateau("val_loss", patience=1, min_delta=100.0)}, {"steps": 14}], ids=str)
def test_validation_before_a_phase_is_no_look_of_it(first: dict[str, Any]) -> None:
    """It begins in mid-epoch, after a validation; the epoch's end then finds the old value among the metrics."""
    phases = [Phase("*", **first), Phase("head", until=Plateau("val_loss", patience=1, min_delta=100.0)), Phase("*")]
    schedule = FreezeSchedule(phases, verbose=False)
    trainer(callbacks=[schedule], max_epochs=5, val_check_interval=5).fit(Net(), loader(30), loader())
    assert schedule.history[-1] == (3, 29, 2)  # the second validation that runs in it


@pytest.mark.parametrize("where", ["step", "epoch end", "on_train_epoch_end", "callback"])
def test_plateau_counts_a_training_metric_once_an_epoch(where: str) -> None:
    class Logging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if where in ("step", "epoch end"):
                self.log("score", 1.0, on_step=where == "step", on_epoch=where == "epoch end")
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            if where == "on_train_epoch_end":
                self.log("score", 1.0)

    class Logger(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if where == "callback":
                pl_module.log("score", 1.0)

    schedule = FreezeSchedule([Phase("*", until=Plateau("score", patience=2, mode="max")), Phase("head")])
    trainer(callbacks=[schedule, Logger()], max_epochs=5).fit(Logging(), loader(), loader())
    assert schedule.history == [(0, 0, 0), (3, 18, 1)]


@pytest.mark.parametrize("monitor", ["train_loss", "val_loss"])
def test_plateau_takes_no_value_from_checkpoints_or_validation_outside_the_fit(tmp_path: Path, monitor: str) -> None:
    """A checkpoint written before the epoch's mean is there, and a validation outside of the fit."""

    class Logging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", float(self.trainer.global_step), on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    seen = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        phases = [Phase("*", until=Plateau(monitor, patience=3, min_delta=100.0)), Phase("head")]
        schedule, net = FreezeSchedule(phases, verbose=False), Logging()
        best: list[float | None] = []
        callbacks = [
            schedule,
            Probe(lambda *_, best=best, schedule=schedule: best.append(schedule.progress.plateau.best)),
        ]
        if disturbed:
            callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1))
        run = trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=disturbed)
        run.fit(net, loader(), loader())
        if disturbed:
            run.validate(net, loader(), verbose=False)
        run.fit_loop.max_epochs = 6
        run.fit(net, loader(), loader())
        seen.append((schedule.history, best))
    assert seen[0] == seen[1]
    assert seen[0][0] == [(0, 0, 0), (4, 24, 1)]


# Other callbacks


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging"])
def test_frozen_weights_stay_to_the_bit_in_an_average(name: str) -> None:
    """What is frozen from the start is to the bit what it was in the average too."""
    average, net = averaging(name), Net(sgd)
    before = snapshot(net)
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase(["head", "neck"])])
    for order in (0, 1):
        callbacks = [schedule, average()] if order else [average(), schedule]
        trainer(callbacks=callbacks, max_epochs=2).fit(net, loader(), loader())
    frozen = moved(before, snapshot(net)) - below(net, "head", "neck")
    if name == "WeightAveraging":
        assert not frozen
    # Lightning's moving average of equal values differs from them by rounding.
    torch.testing.assert_close([net.state_dict()[name] for name in frozen], [before[name] for name in frozen])


def test_stochastic_weight_averaging_is_refused_with_frozen_statistics() -> None:
    """It computes the statistics of all BatchNorm layers anew, frozen or not: that is refused."""
    phases = [Phase("head", epochs=1), Phase("*", lr_scale={"neck": 0.1})]
    swa = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging"):
        trainer(callbacks=[FreezeSchedule(phases), swa]).fit(Net(), loader(), loader())
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging"):
        trainer(callbacks=[FreezeBatchNorm(), swa]).fit(Net(), loader(), loader())
    schedule = FreezeSchedule(phases, frozen_mode="train")
    trainer(callbacks=[schedule, StochasticWeightAveraging(0.1, swa_epoch_start=1)], max_epochs=3).fit(
        Net(sgd, lambda o: lrs.ExponentialLR(o, 0.9)), loader(), loader()
    )
    assert schedule.phase_index == 1


class Tunable(Net):
    def __init__(self) -> None:
        super().__init__(scheduler=lambda o: lrs.LambdaLR(o, lambda step: 0.9**step), interval="step")
        self.lr, self.batch_size = 1e-3, 4

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("finder", ["lr", "batch"])
@pytest.mark.filterwarnings("ignore")
def test_finders_leave_the_schedule_as_it_was(tmp_path: Path, finder: str, first: bool) -> None:
    find = LearningRateFinder(num_training_steps=5) if finder == "lr" else BatchSizeFinder(max_trials=1, init_val=4)
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"neck": 0.5}, steps=2), Phase("neck")])
    net = Tunable()
    flags = []
    probe = Probe(lambda run, module: flags.append((run.global_step, trains(module))))
    callbacks = [schedule, find, probe] if first else [find, schedule, probe]
    trainer(tmp_path, callbacks=callbacks, max_epochs=3).fit(net)
    each = {4: 6, 8: 3}[net.batch_size]
    assert schedule.history == [(0, 0, 0), (1, each, 1), (1, each + 2, 2)]
    head, every, neck = below(net, "head"), trains(net), below(net, "neck")
    assert flags == [(s, head if s < each else every if s < each + 2 else neck) for s in range(3 * each)]


@pytest.mark.filterwarnings("ignore")
def test_tuner_before_the_fit_leaves_the_schedule_at_its_start(tmp_path: Path) -> None:
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    net = Tunable()
    run = trainer(tmp_path, callbacks=[schedule], max_epochs=2)
    Tuner(run).lr_find(net, num_training=5)
    Tuner(run).scale_batch_size(net, max_trials=1, init_val=4)
    run.fit(net)
    assert schedule.history[0] == (0, 0, 0)
    assert [index for _, _, index in schedule.history] == [0, 1]


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_restored_by_a_finder_in_mid_fit_leaves_the_schedule_whole(tmp_path: Path) -> None:
    """A checkpoint restored in the middle of a fit leaves schedule, groups and schedulers whole."""

    class Later(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    for order in (0, 1):
        phases = [Phase("head", epochs=1), Phase("*", lr_scale={"neck": 0.5}, epochs=1), Phase("neck")]
        schedule = FreezeSchedule(phases)
        callbacks = [schedule, Later(num_training_steps=3)]
        run = trainer(tmp_path, callbacks=callbacks if order else callbacks[::-1], max_epochs=3)
        run.fit(Tunable())
        assert schedule.history == [(0, 0, 0), (1, 6, 1), (2, 12, 2)]


# Other stages and ways to end


def test_evaluation_outside_a_fit_changes_no_flag(tmp_path: Path) -> None:
    class Testable(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    net = Testable()
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    run = trainer(tmp_path, callbacks=[schedule, FreezeBatchNorm("backbone.1")], max_epochs=2)
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    for _ in range(2):
        run.validate(net, loader(), verbose=False)
        run.test(net, loader(), verbose=False)
        run.predict(net, loader())
        assert before == {name: p.requires_grad for name, p in net.named_parameters()}
        run.fit(net, loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    run.test(net, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True)
    assert schedule.history == [(0, 0, 0), (1, 6, 1)]


def test_fit_with_nothing_left_to_do_does_not_show_in_another_trainer(tmp_path: Path) -> None:
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    net = Net()
    run = trainer(tmp_path, callbacks=[schedule], max_epochs=2)
    run.fit(net, loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    trainer(callbacks=[schedule], max_epochs=2).fit(net, loader(), loader(), ckpt_path=tmp_path / "end.ckpt")
    trainer(callbacks=[schedule], max_epochs=1).fit(net, loader(), loader())
    assert schedule.history == [(0, 0, 0)]


def test_failed_resume_does_not_show_in_the_next_fit(tmp_path: Path) -> None:
    class Broken(Net):
        broken = True

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.broken:
                raise RuntimeError("not yet right")
            super().validation_step(batch, batch_idx)

    phases = [Phase("head", epochs=1), Phase("*")]
    run = trainer(tmp_path, callbacks=[FreezeSchedule(phases)], max_epochs=2)
    run.fit(Net(), loader(), loader())
    run.save_checkpoint(tmp_path / "second.ckpt")
    net, schedule = Broken(), FreezeSchedule(phases)
    with pytest.raises(RuntimeError, match="not yet right"):
        trainer(callbacks=[schedule], num_sanity_val_steps=1).fit(
            net, loader(), loader(), ckpt_path=tmp_path / "second.ckpt", weights_only=True
        )
    net.broken = False
    net.train()  # Lightning leaves it in eval mode
    trainer(callbacks=[schedule], max_epochs=1).fit(net, loader(), loader())
    assert schedule.history == [(0, 0, 0)]


def test_checkpoint_without_the_callback_takes_a_used_trainer_back(tmp_path: Path) -> None:
    net, bare = Net(), trainer(tmp_path, max_epochs=1)
    bare.fit(net, loader(), loader())
    bare.save_checkpoint(tmp_path / "first.ckpt")
    schedule = FreezeSchedule([Phase("head", epochs=2), Phase("*")])
    seen: set[tuple[int, int]] = set()
    probe = Probe(lambda run, _: seen.add((run.current_epoch, schedule.phase_index)))
    run = trainer(callbacks=[schedule, probe], max_epochs=4)
    run.fit(net, loader(), loader())
    seen.clear()
    run.fit(net, loader(), loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert seen == {(1, 0), (2, 1), (3, 1)}
    assert schedule.history == [(0, 0, 0), (2, 12, 1)]


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"fast_dev_run": True}, [0]),
        ({"fast_dev_run": 3}, [0, 1]),
        ({"max_epochs": -1, "max_steps": 9}, [0, 1]),
        ({"max_steps": 5}, [0]),
        ({"limit_train_batches": 0.5, "max_epochs": 2}, [0, 1]),
        ({"overfit_batches": 2, "max_epochs": 2}, [0, 1]),
        ({"min_epochs": 3, "max_epochs": 3}, [0, 1]),
    ],
    ids=str,
)
def test_short_fits_begin_only_the_phases_they_reach(options: dict[str, Any], phases: list[int]) -> None:
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    trainer(callbacks=[schedule], **options).fit(Net(), loader(), loader())
    assert [index for _, _, index in schedule.history] == phases


def test_callbacks_copy_and_pickle_without_the_model() -> None:
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    frozen = FreezeBatchNorm("backbone.1")
    copies: list[Any] = []
    probe = Probe(lambda *_: copies.append((pickle.dumps(schedule), copy.deepcopy([schedule, frozen]))))
    net = Net()
    run = trainer(callbacks=[schedule, frozen, probe], max_epochs=2)
    run.fit(net, loader(), loader())
    copies.append((pickle.dumps(schedule), copy.deepcopy([schedule, frozen])))
    for pickled, (one, two) in copies:
        assert len(pickled) < 3000
        again = pickle.loads(pickled)
        for each in (one, again):
            assert each.phases == schedule.phases
        assert not [value for value in [*vars(one).values(), *vars(two).values()] if isinstance(value, nn.Module)]
    trainer(callbacks=[copies[3][1][0]], max_epochs=2).fit(net, loader(), loader())
    assert copies[3][1][0].history == schedule.history


# YAML

TRAINER = """
seed_everything: 0
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""


class Configured(Net):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        assert width == 4


CONFIG = f"""
model: {{width: 4}}
{TRAINER}
  max_epochs: 2
  callbacks:
    - class_path: lightning_freeze.FreezeSchedule
      init_args:
        frozen_mode: eval
        phases:
          - {{train: head, steps: 4}}
          - train: [head, "backbone.*", "!*.bias"]
            name: top
            epochs: 1
            lr_scale: {{backbone: 1e-1}}
            until: {{monitor: val_loss, patience: 9, min_delta: 1e-3}}
          - {{train: "*", lr_scale: 1}}
    - class_path: lightning_freeze.FreezeBatchNorm
      init_args: {{select: [backbone.1, backbone.5], train_affine: true}}
    - class_path: lightning_freeze.GradientAudit
      init_args: {{ignore: [backbone, "!backbone.5"]}}
"""


class Loads(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's
def test_config_and_the_one_that_lightning_saves_of_it_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli_module = pytest.importorskip("lightning.pytorch.cli")
    found = []
    (tmp_path / "first.yaml").write_text(CONFIG)
    for config, folder in (("first.yaml", "one"), ("one/config.yaml", "two")):
        root = f"--trainer.default_root_dir={tmp_path / folder}"
        monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(tmp_path / config), root])
        cli = cli_module.LightningCLI(Configured, Loads)
        schedule, batchnorm, audit = [
            next(callback for callback in cli.trainer.callbacks if isinstance(callback, kind))
            for kind in (FreezeSchedule, FreezeBatchNorm, GradientAudit)
        ]
        assert schedule.history == [(0, 0, 0), (0, 4, 1), (1, 6, 2)]
        found.append((schedule.phases, schedule.frozen_mode, batchnorm.select, audit.ignore))
    top = ["head", "backbone.*", "!*.bias"]
    until = Plateau("val_loss", patience=9, min_delta=1e-3)
    assert found[0] == found[1]
    assert found[0] == (
        [
            Phase("head", steps=4),
            Phase(top, name="top", epochs=1, lr_scale={"backbone": 0.1}, until=until),
            Phase("*", lr_scale=1),
        ],
        "eval",
        ["backbone.1", "backbone.5"],
        ["backbone", "!backbone.5"],
    )


# Words


@pytest.mark.parametrize(
    ("phases", "options", "expected"),
    [
        (
            [Phase("head", epochs=2), Phase("neck", epochs=2), Phase("*", name="late")],
            {"max_epochs": 2},
            [
                "phase 2/3 'neck' never begins: the fit ends before, at max_epochs=2.",
                "phase 3/3 'late' never begins: the fit ends before, at max_epochs=2.",
                "the fit ended at epoch 2, step 12 in phase 1/3 'head'; never began: 'neck', 'late'.",
            ],
        ),
        (
            [Phase("head", steps=6), Phase("*")],
            {"max_epochs": 9, "max_steps": 6},
            [
                "phase 2/2 '*' never begins: the fit ends before, at max_epochs=9 or max_steps=6.",
                "the fit ended at epoch 1, step 6 in phase 1/2 'head'; never began: '*'.",
            ],
        ),
        ([Phase("head", steps=5), Phase("*")], {"max_epochs": -1, "max_steps": 6}, []),
        (
            [Phase("head", epochs=3, until=Plateau("val_loss", patience=3)), Phase("*")],
            {"max_epochs": 4},
            ["phase 1/2 'head' cannot end by its plateau: epochs=3 ends it before patience=3 is over."],
        ),
        (
            [Phase("head", epochs=2, until=Plateau("val_loss", patience=3)), Phase("*")],
            {"max_epochs": 4, "val_check_interval": 0.5},
            [],
        ),
        ([Phase("head", epochs=9), Phase("*")], {"fast_dev_run": True}, []),
    ],
)
def test_phase_that_cannot_begin_or_end_is_warned_of_at_fit_start(
    phases: Any, options: Any, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer(callbacks=[FreezeSchedule(phases, verbose=False)], **options).fit(Net(), loader(), loader())
    ours = [record for record in caplog.records if record.name.startswith("lightning_freeze")]
    assert [record.getMessage() for record in ours if record.levelno == logging.WARNING] == expected


def test_each_transition_logs_one_line_if_verbose(caplog: pytest.LogCaptureFixture) -> None:
    for verbose in (True, False):
        caplog.clear()
        schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", name="all")], verbose=verbose)
        trainer(callbacks=[schedule], max_epochs=2).fit(Net(), loader(), loader())
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_freeze")]
        assert lines == verbose * [
            "phase 1/2 'head' from epoch 0, step 0: trains 15 of 275 parameters (5.5 %), 2 of 2 BatchNorm frozen",
            "phase 2/2 'all' from epoch 1, step 6, after 1 epoch: trains 275 of 275 parameters (100.0 %), 0 of 2 "
            "BatchNorm frozen",
        ]
