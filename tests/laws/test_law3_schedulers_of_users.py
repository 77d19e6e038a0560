"""Law 3: schedulers that people write themselves, nest in others, step themselves or keep to themselves."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor
from torch.optim import lr_scheduler as lrs

from lightning_freeze import FreezeSchedule, Phase
from tests.nets import Net, loader, sgd, trainer


class WarmUpThen(lrs.LRScheduler):
    """A scheduler kept as an attribute, which takes over after the warm-up."""

    def __init__(self, optimizer: Any) -> None:
        self.after = lrs.LambdaLR(optimizer, lambda step: 0.9**step)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < 5:
            return [base * (self.last_epoch + 1) / 5 for base in self.base_lrs]
        self.after.step()
        return self.after.get_last_lr()


class Switching:
    """No class of torch, schedulers in a dict, and the dict in another scheduler's tuple."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.stages = {"first": lrs.LambdaLR(optimizer, lambda step: 0.8), "then": (WarmUpThen(optimizer),)}

    def step(self) -> None:
        self.steps += 1
        (self.stages["first"] if self.steps < 7 else self.stages["then"][0]).step()  # type: ignore[index]

    def get_last_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Peaks(lrs.LRScheduler):
    """Lists with an entry a group whose names do not say so, one of them first read after a while."""

    def __init__(self, optimizer: Any) -> None:
        self.peaks = [2 * group["lr"] for group in optimizer.param_groups]
        self.floors = tuple(1e-4 for _ in optimizer.param_groups)
        self.decays = [lambda step: 0.9**step for _ in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < 7:
            return [peak / (8 - self.last_epoch) for peak in self.peaks]
        rows = zip(self.peaks, self.floors, self.decays, strict=True)
        return [max(floor, peak * decay(self.last_epoch)) for peak, floor, decay in rows]


class Milestones(lrs.LRScheduler):
    """As many milestones and stages as groups, by chance, beside a list with an entry a group."""

    def __init__(self, optimizer: Any) -> None:
        count = len(optimizer.param_groups)
        self.milestones = [9, 15][:count]
        self.stage_lrs = [0.5, 0.3][:count]
        self.starts = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        passed = bisect.bisect_right(self.milestones, self.last_epoch)
        factor = 0.1**passed * self.stage_lrs[-1]
        return [start * factor for start in self.starts]


class OwnStep:
    """Not of torch, no get_lr, its list not called like one with an entry a group."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.base_values = [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        self.steps += 1
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.base_values[index] / (1 + self.steps)

    state_dict, load_state_dict = Switching.state_dict, Switching.load_state_dict


MADE = {cls.__name__: cls for cls in (WarmUpThen, Switching, Peaks, Milestones, OwnStep)}


def two_groups(params: Any) -> torch.optim.Optimizer:
    params = list(params)
    return torch.optim.SGD([{"params": params[:-2]}, {"params": params[-2:], "lr": 0.03}], lr=1e-2, momentum=0.9)


def head_only(params: Any) -> torch.optim.Optimizer:
    return sgd(list(params)[-2:])


class StepsItself(Net):
    """Keeps the scheduler to itself and steps it, with manual or automatic optimization."""

    manual = False
    in_a_closure = False

    def configure_optimizers(self) -> Any:
        assert self.make_scheduler is not None
        self.automatic_optimization = not self.manual
        optimizer = self.make_optimizer(self.parameters())
        scheduler = self.make_scheduler(optimizer)
        if self.in_a_closure:
            self.advance = lambda: scheduler.step()
        else:
            self.kept = [scheduler]
            self.advance = lambda: self.kept[0].step()
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.advance()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.manual:
            self.advance()


def rates_by_name(
    net: Net, schedule: FreezeSchedule | None, *others: Callback, checkpoint: Path | None = None
) -> list[dict[str, float]]:
    """The learning rate of each parameter that trains, in each step."""
    seen: list[dict[str, float]] = []
    names = {id(p): name for name, p in net.named_parameters()}

    class Note(Callback):
        def on_train_start(self, trainer: Trainer, _: LightningModule) -> None:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(self.note)

        def note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
            groups = optimizer.param_groups
            seen.append({names[id(p)]: float(group["lr"]) for group in groups for p in group["params"]})

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*", category=UserWarning)
        callbacks = [*([schedule] if schedule else []), *others, Note()]
        run = trainer(callbacks=callbacks, enable_checkpointing=any(isinstance(c, Checkpoint) for c in others))
        run.fit(net, loader(stateful=True), loader(), ckpt_path=checkpoint, weights_only=False)
    return seen


class Returned(Net):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


def nets(optimizer: Any, make: Callable[[Any], Any], kept: str) -> Net:
    if kept == "returned":
        return Returned(optimizer, make, interval="step")
    net = StepsItself(optimizer, make)
    net.manual, net.in_a_closure = "manual" in kept, "closure" in kept
    return net


PAIRS = [(name, kept) for name in MADE for kept in ("returned", "closure, manual")]


@pytest.mark.parametrize("optimizer", [sgd, two_groups])
@pytest.mark.parametrize(("name", "kept"), PAIRS)
def test_scaled_rates(name: str, kept: str, optimizer: Any) -> None:
    """Each parameter has the rate it has without the callback, times the phase's scale."""
    phases = [Phase("*", epochs=1), Phase("*", epochs=1, lr_scale={"neck": 3.0}), Phase("*", lr_scale={"neck": 0.5})]
    plain = rates_by_name(nets(optimizer, MADE[name], kept), None)
    seen = rates_by_name(nets(optimizer, MADE[name], kept), FreezeSchedule(phases))
    assert len(plain) == 24
    assert len({row["neck.weight"] for row in plain}) > 1
    for step, (row, expected) in enumerate(zip(seen, plain, strict=True)):
        scale = (1.0, 3.0, 0.5, 0.5)[step // 6]
        assert row == {key: rate * (scale if key[:4] == "neck" else 1.0) for key, rate in expected.items()}


@pytest.mark.parametrize(("name", "kept"), PAIRS)
def test_adopted_rates(name: str, kept: str) -> None:
    plain = rates_by_name(nets(head_only, MADE[name], kept), None)
    net = nets(head_only, MADE[name], kept)
    seen = rates_by_name(net, FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.1})]))
    for row, expected in zip(seen[6:], plain[6:], strict=True):
        head = expected["head.weight"]
        assert row == {key: head * (0.1 if key.startswith("backbone") else 1.0) for key, _ in net.named_parameters()}


@pytest.mark.parametrize("optimizer", [sgd, two_groups])
def test_stochastic_weight_averaging(optimizer: Any) -> None:
    """It finds the user's groups, also with a rate for each of them."""

    def averaging(rates: Any) -> StochasticWeightAveraging:
        return StochasticWeightAveraging(rates, swa_epoch_start=1, annealing_epochs=2)

    count = 1 if optimizer is sgd else 2
    scaled = [Phase("*", epochs=1), Phase("*", lr_scale={"neck": 0.5})]
    for rates in (1e-3, [1e-3] * count):
        plain = rates_by_name(Net(optimizer), None, averaging(rates))
        seen = rates_by_name(Net(optimizer), FreezeSchedule(scaled, frozen_mode="train"), averaging(rates))
        assert seen[:6] == plain[:6]
        for row, expected in zip(seen[6:], plain[6:], strict=True):
            assert row == {key: rate * (0.5 if key[:4] == "neck" else 1.0) for key, rate in expected.items()}


class Wrapping(Switching):
    """Saves what it wraps, as careful people do."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        chained = lrs.SequentialLR(
            optimizer, [lrs.LinearLR(optimizer, 0.1, total_iters=4), lrs.StepLR(optimizer, 3)], milestones=[4]
        )
        self.stages = {"first": lrs.ChainedScheduler([chained, lrs.LambdaLR(optimizer, lambda step: 0.99**step)])}

    def step(self) -> None:
        self.stages["first"].step()

    def state_dict(self) -> dict[str, Any]:
        return self.stages["first"].state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stages["first"].load_state_dict(state)


@pytest.mark.parametrize("optimizer", [sgd, two_groups])
@pytest.mark.parametrize("make", [Wrapping, Milestones])
@pytest.mark.parametrize("step", [4, 9, 14])
def test_resumed_with_and_without_the_callback(step: int, make: Any, optimizer: Any, tmp_path: Any) -> None:
    """The checkpoint has the scheduler as the user's own groups need it."""
    phases = [Phase("head", steps=4), Phase("*", epochs=1, lr_scale={"neck": 0.1}), Phase("*", lr_scale={"neck": 3.0})]
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    path = tmp_path / f"step={step}.ckpt"
    whole = rates_by_name(Returned(optimizer, make, interval="step"), FreezeSchedule(phases), saver)
    plain = rates_by_name(Returned(optimizer, make, interval="step"), None)
    for schedule, expected in ((FreezeSchedule(phases), whole), (None, plain)):
        net = Returned(optimizer, make, interval="step")
        assert rates_by_name(net, schedule, checkpoint=path) == expected[step:]
    (state,) = torch.load(path, weights_only=False)["lr_schedulers"]
    assert len(state["_last_lr"]) == (1 if optimizer is sgd else 2)


def test_two_optimizers_of_which_one_has_a_scheduler_that_nobody_returned() -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            first = torch.optim.SGD(self.backbone.parameters(), lr=0.01)
            second = torch.optim.Adam([*self.neck.parameters(), *self.head.parameters()], lr=0.02)
            self.kept = Peaks(second)
            return [first, second], [lrs.OneCycleLR(first, [0.1], total_steps=60)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.lr_schedulers().step()
            self.kept.step()
            return loss

    plain = rates_by_name(Two(), None)
    phases = [Phase("*", epochs=1), Phase("*", lr_scale={"neck": 0.1, "backbone.0": 0.5})]
    seen = rates_by_name(Two(), FreezeSchedule(phases))
    assert len(seen) == len(plain) == 24 * 2
    for number, (row, expected) in enumerate(zip(seen, plain, strict=True)):
        scales = {"neck": 0.1, "backbone.0": 0.5} if number >= 12 else {}
        wanted = {name: rate * scales.get(name.rpartition(".")[0], 1.0) for name, rate in expected.items()}
        assert row == wanted
