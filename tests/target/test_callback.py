from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_freeze import FreezeSchedule, Phase, TargetNetwork
from lightning_freeze.selectors import selector_text
from tests.followers import Student, by_hand, network
from tests.nets import Probe, adamw, loader, members, moved, same, sgd, snapshot, trainer

# Lightning's, for a target that the user has put in eval mode.
in_eval_mode = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")


def fit(student: LightningModule, callback: TargetNetwork, *others: Any, **options: Any) -> Trainer:
    run = trainer(callbacks=[callback, *others], **{"max_epochs": 2, **options})
    run.fit(student, loader())
    return run


@pytest.mark.parametrize("follow", [{"tau": 0.3}, {"tau": 1}, {"every_n_steps": 1}, {"every_n_steps": 5}], ids=str)
@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_target_equals_that_of_a_loop_by_hand(follow: dict[str, Any], optimizer: Any, accumulate: int) -> None:
    student = Student(optimizer)
    expected = by_hand(student, follow.get("tau"), follow.get("every_n_steps"), accumulate=accumulate)
    callback = TargetNetwork("online", "target", **follow)
    fit(student, callback, accumulate_grad_batches=accumulate)
    assert same(dict(student.state_dict()), dict(expected))
    assert callback.steps == 12 // accumulate


def test_source_trains_as_without_the_callback() -> None:
    class Indifferent(Student):
        def loss(self, batch: Any) -> Any:
            return nn.functional.cross_entropy(self.online(batch[0]), batch[1])

    student = Indifferent()
    alone = copy.deepcopy(student)
    trainer(max_epochs=2).fit(alone, loader())
    fit(student, TargetNetwork("online", "target", tau=0.1))
    assert same(snapshot(student.online), snapshot(alone.online))


@in_eval_mode
@pytest.mark.parametrize("copy_buffers", [True, False])
@pytest.mark.parametrize("follow", [{"tau": 0.3}, {"every_n_steps": 4}], ids=str)
def test_buffers_follow_only_with_copy_buffers(copy_buffers: bool, follow: dict[str, Any]) -> None:
    student = Student()
    student.target.eval()  # its own forward leaves the running statistics alone
    student.target[1].running_mean.fill_(7)
    before = snapshot(student.target)
    fit(student, TargetNetwork("online", "target", copy_buffers=copy_buffers, **follow))
    buffers = {name for name, _ in student.target.named_buffers()}
    followed = moved(before, snapshot(student.target)) & buffers
    assert followed == (buffers if copy_buffers else set())
    if copy_buffers:
        assert student.target[1].num_batches_tracked == student.online[1].num_batches_tracked


def test_target_without_buffers_works_without_copy_buffers_only() -> None:
    student = Student()
    student.target[1] = nn.BatchNorm2d(4, track_running_stats=False)
    fit(student, TargetNetwork("online", "target", tau=0.3, copy_buffers=False))
    with pytest.raises(ValueError, match=r"Only in source 'online': 1\.running_mean"):
        fit(student, TargetNetwork("online", "target", tau=0.3))


# What counts as a step


class ByHand(Student):
    """Manual optimization: a network with a target beside another, each with its optimizer."""

    def __init__(self, steps: list[int], *, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.actor = nn.Linear(3, 3)
        self.order, self.raw = steps, raw

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        for number in self.order:
            optimizer = optimizers[number]
            loss = self.actor(self.online(batch[0])).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        weights, biases = [], []
        for p in self.online.parameters():
            (weights if p.ndim > 1 else biases).append(p)
        return torch.optim.SGD(self.actor.parameters(), 0.1), torch.optim.SGD(weights, 0.1), torch.optim.Adam(biases)


@pytest.mark.parametrize("raw", [False, True], ids=["Lightning's optimizers", "torch's optimizers"])
@pytest.mark.parametrize(("order", "expected"), [([0], 0), ([1], 6), ([0, 1], 6), ([1, 2], 12), ([2, 0, 2, 1], 18)])
def test_only_steps_of_an_optimizer_of_the_source_count(order: list[int], expected: int, raw: bool) -> None:
    callback = TargetNetwork("online", "target", tau=0.5)
    fit(ByHand(order, raw=raw), callback, max_epochs=1)
    assert callback.steps == expected


def test_target_follows_at_the_step_not_at_the_end_of_the_batch() -> None:
    """The target follows at the step, not at the end of the batch."""
    seen = []

    class Looking(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            _, optimizer, _ = self.optimizers()
            for _ in range(3):
                before = snapshot(self.target), snapshot(self.online)
                optimizer.zero_grad()
                self.manual_backward(self.online(batch[0]).square().mean())
                optimizer.step()
                name = "5.weight"
                target = torch.lerp(before[0][name], self.online.state_dict()[name], 0.5)
                seen.append(
                    torch.equal(self.target.state_dict()[name], target)
                    and not torch.equal(before[1][name], self.online.state_dict()[name])
                )

    fit(Looking([]), TargetNetwork("online", "target", tau=0.5), max_epochs=1)
    assert seen == [True] * 18


def test_step_that_user_code_skips_does_not_count() -> None:
    class Skipping(Student):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            if batch_idx % 2:
                closure()
            else:
                optimizer.step(closure)

    callback = TargetNetwork("online", "target", every_n_steps=2)
    fit(Skipping(), callback, max_epochs=1)
    assert callback.steps == 3


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_mixed_precision_skips_does_not_count(fused: bool) -> None:
    class Overflowing(Student):
        def loss(self, batch: Any) -> Any:
            loss = nn.functional.cross_entropy(self.online(batch[0]), batch[1])
            return loss * math.inf if self.trainer.fit_loop.total_batch_idx % 2 else loss

    callback = TargetNetwork("online", "target", tau=0.5)
    student = Overflowing(lambda params: torch.optim.SGD(params, lr=0.1, fused=fused))
    fit(student, callback, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0)))
    assert callback.steps == 6


def test_lbfgs_counts_one_step_a_batch() -> None:
    class WithLBFGS(Student):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.online.parameters(), lr=0.1, max_iter=3)

    callback = TargetNetwork("online", "target", tau=0.5)
    fit(WithLBFGS(), callback, max_epochs=1)
    assert callback.steps == 6


def test_source_in_no_optimizer_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    student = Student(lambda _: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        fit(student, callback := TargetNetwork("online", "target", tau=0.5), max_epochs=1)
    (record,) = caplog.records
    assert record.getMessage() == (
        "TargetNetwork: no optimizer holds a parameter of 'online', so 'target' rests until one does."
    )
    assert callback.steps == 0


# The start


def test_fresh_fit_copies_before_the_first_batch() -> None:
    starts = []

    def start(_: Trainer, student: Any) -> None:
        starts.append(same(snapshot(student.online), snapshot(student.target)))

    student = Student()
    fit(student, TargetNetwork("online", "target", tau=0.5), Probe(start), max_epochs=1)
    assert starts == [True] + [False] * 5


def test_sanity_check_sees_the_copy() -> None:
    seen = []

    class Validated(Student):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(torch.equal(self.online[0].weight, self.target[0].weight))

    run = trainer(callbacks=[TargetNetwork("online", "target", tau=0.5)], max_epochs=1, num_sanity_val_steps=1)
    run.fit(Validated(), loader(), loader())
    assert seen == [True] + [False] * 6


def test_continued_fit_keeps_the_target_and_the_count() -> None:
    whole, halves = Student(), Student()
    halves.load_state_dict(whole.state_dict())
    fit(whole, TargetNetwork("online", "target", every_n_steps=5), max_epochs=3)
    callback = TargetNetwork("online", "target", every_n_steps=5)
    run = fit(halves, callback, max_epochs=1)
    assert callback.steps == 6
    run.fit_loop.max_epochs = 3
    # Lightning asks configure_optimizers again when a fit goes on; the user who wants the old one keeps it.
    optimizer = run.optimizers[0]
    halves.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    run.fit(halves, loader())
    assert callback.steps == 18
    assert same(snapshot(whole), snapshot(halves))


def test_callback_used_for_another_module_begins_anew() -> None:
    callback = TargetNetwork("online", "target", every_n_steps=100)
    fit(Student(), callback, max_epochs=1)
    student = Student()
    start = copy.deepcopy(student.online)
    fit(student, callback, max_epochs=1)
    assert callback.steps == 6
    assert torch.equal(student.target[0].weight, start[0].weight)


def test_checkpoint_written_without_the_callback_keeps_its_target(tmp_path: Path) -> None:
    student = Student()
    run = trainer(max_epochs=1)
    run.fit(student, loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    resumed, callback = Student(), TargetNetwork("online", "target", every_n_steps=100)
    callback.steps = 3  # from an earlier use
    run = trainer(callbacks=[callback], max_epochs=2)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert torch.equal(resumed.target[0].weight, student.target[0].weight)
    assert callback.steps == 6


# Gradient-free, in no optimizer


def own_group(params: Any) -> torch.optim.Optimizer:
    params = list(params)
    half = len(params) // 2
    return torch.optim.AdamW([{"params": params[:half]}, {"params": params[half:], "lr": 0.5}], lr=0.01)


def named(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([(f"p{index}", p) for index, p in enumerate(params)], lr=0.01, weight_decay=0.1)


def trainable_only(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in params if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("optimizer", [adamw, own_group, named, trainable_only])
def test_optimizer_that_has_the_target_does_not_move_it(optimizer: Any) -> None:
    """With weight decay and momentum, and whatever was there before the fit."""
    sizes = []

    def look(trainer: Trainer, student: Any) -> None:
        assert all((p.requires_grad, p.grad) == (False, None) for p in student.target.parameters())
        (held,) = trainer.optimizers
        assert all(
            len(group.get("param_names", group["params"])) == len(group["params"]) for group in held.param_groups
        )
        sizes.append([len(group["params"]) for group in held.param_groups])

    student = Student(optimizer, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9))
    fit(student, TargetNetwork("online", "target", every_n_steps=99), Probe(look, look), max_epochs=1)
    assert all(p.requires_grad for p in student.parameters())
    assert sizes == [[len(group["params"]) for group in optimizer(student.parameters()).param_groups]] * 12
    start = Student(optimizer)
    start.load_state_dict(student.state_dict())
    for mine, source in zip(student.target.parameters(), student.online.parameters(), strict=True):
        assert not torch.equal(mine, source)


def test_target_frozen_by_hand_is_frozen_after_the_fit() -> None:
    student = Student()
    student.target.requires_grad_(False)
    fit(student, TargetNetwork("online", "target", tau=0.5), max_epochs=1)
    assert not any(p.requires_grad for p in student.target.parameters())


def in_order(schedule: FreezeSchedule, target: TargetNetwork, first: str) -> list[Any]:
    return [schedule, target] if first == "schedule" else [target, schedule]


either_order = pytest.mark.parametrize("first", ["schedule", "target"])


@either_order
@pytest.mark.parametrize(
    "everything", ["*", ["*", "!target"], ["online", "target"], lambda *_: True], ids=selector_text
)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen by hand"])
def test_target_stays_frozen_in_every_phase_of_a_schedule(first: str, everything: Any, trainable: bool) -> None:
    phases = [Phase("online.5", steps=2), Phase(everything, steps=2, lr_scale={"online.0": 0.1}), Phase("online.0")]
    target = TargetNetwork("online", "target", tau=0.5)
    student, sizes = Student(), []
    if not trainable:
        student.target.requires_grad_(False)
    if everything == ["online", "target"]:
        with pytest.raises(ValueError, match="'target' selects nothing else"):
            trainer(callbacks=in_order(FreezeSchedule(phases), target, first), max_epochs=1).fit(student, loader())
        return

    def look(trainer: Trainer, student: Any) -> None:
        assert not any(p.requires_grad for p in student.target.parameters())
        sizes.append(sum(p.requires_grad for p in student.parameters()))
        saved = trainer.optimizers[0].state_dict()["param_groups"]
        assert [len(group["params"]) for group in saved] == [12]

    run = trainer(callbacks=[*in_order(FreezeSchedule(phases), target, first), Probe(look)], max_epochs=1)
    run.fit(student, loader())
    assert sizes == [2, 2, 6, 6, 2, 2]
    assert target.steps == 6
    assert members(run.optimizers[0]) == [id(p) for p in student.parameters()]
    assert {p.requires_grad for p in student.target.parameters()} == {trainable}
    assert all(p.requires_grad for p in student.online.parameters())


@either_order
def test_schedule_adopts_no_target(first: str) -> None:
    """The optimizer was given the source only, and the schedule, that trains everything, leaves it at that."""
    student = Student()
    student.make_optimizer = lambda _: adamw(student.online.parameters())  # type: ignore[method-assign]
    run = trainer(
        callbacks=in_order(FreezeSchedule([Phase("*")]), TargetNetwork("online", "target", tau=0.5), first),
        max_epochs=1,
    )
    run.fit(student, loader())
    assert members(run.optimizers[0]) == [id(p) for p in student.online.parameters()]


@either_order
@pytest.mark.parametrize("phase", ["target", "target.5.bias", ["online", "target.5.bias"]], ids=str)
def test_phase_that_names_only_the_target_is_refused(first: str, phase: Any) -> None:
    student, schedule = Student(), FreezeSchedule([Phase("online.5", epochs=1), Phase(phase)])
    with pytest.raises(ValueError, match=r"would train what TargetNetwork keeps frozen: 'target.*Leave it out of"):
        trainer(callbacks=in_order(schedule, TargetNetwork("online", "target", tau=0.5), first)).fit(student, loader())
    assert all(p.requires_grad for p in student.parameters())


@either_order
@pytest.mark.parametrize("frozen_mode", ["batchnorm", "eval", "train"])
@pytest.mark.parametrize("eval_mode", [True, False])
def test_schedule_does_not_change_the_mode_of_the_target(first: str, frozen_mode: Any, eval_mode: bool) -> None:
    seen = []
    schedule = FreezeSchedule([Phase("online.5", steps=3), Phase("*")], frozen_mode=frozen_mode)
    callbacks = in_order(schedule, TargetNetwork("online", "target", tau=0.5, eval_mode=eval_mode), first)
    probe = Probe(lambda _, student: seen.append({module.training for module in student.target.modules()}))
    student = Student()
    trainer(callbacks=[*callbacks, probe], max_epochs=1).fit(student, loader())
    assert seen == [{not eval_mode}] * 6
    assert all(module.training for module in student.modules())


def test_target_rests_while_its_source_is_frozen() -> None:
    class WithHead(Student):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def loss(self, batch: Any) -> Any:
            return nn.functional.cross_entropy(self.head(self.online(batch[0])), batch[1])

    phases = [Phase("head", steps=2), Phase(["online", "head"], steps=2), Phase("head")]
    callback = TargetNetwork("online", "target", tau=0.5)
    fit(WithHead(), callback, FreezeSchedule(phases), max_epochs=1)
    assert callback.steps == 2


# Mode


class Moody(Student):
    def on_train_epoch_start(self) -> None:
        self.train()


def modes(student: Student, eval_mode: bool) -> list[bool]:
    seen = []
    probe = Probe(lambda _, student: seen.append(any(module.training for module in student.target.modules())))
    fit(student, TargetNetwork("online", "target", tau=0.5, eval_mode=eval_mode), probe, max_epochs=1)
    return seen


def test_target_in_eval_mode_stays_there_after_train() -> None:
    student = Moody()
    assert modes(student, eval_mode=True) == [False] * 6
    assert all(module.training for module in student.target.modules())
    assert "train" not in vars(student.target)


@in_eval_mode
def test_target_keeps_the_users_mode_without_eval_mode() -> None:
    assert modes(Moody(), eval_mode=False) == [True] * 6
    student = Student()
    student.target.eval()
    assert modes(student, eval_mode=False) == [False] * 6


@in_eval_mode
def test_eval_mode_gives_the_target_of_a_users_eval() -> None:
    """With it, the target's statistics are what they would be if the user had put it in eval mode."""
    student = Student()
    by_user = copy.deepcopy(student)
    by_user.target.eval()
    fit(student, TargetNetwork("online", "target", tau=0.5, eval_mode=True))
    fit(by_user, TargetNetwork("online", "target", tau=0.5))
    assert same(snapshot(student), snapshot(by_user))


# Modules of all kinds


def test_modules_made_in_configure_model_are_found() -> None:
    class Late(Student):
        def __init__(self) -> None:
            super().__init__()
            del self.online, self.target

        def configure_model(self) -> None:
            if not hasattr(self, "online"):
                self.online, self.target = network(), network()

    callback = TargetNetwork("online", "target", tau=0.5)
    fit(Late(), callback, max_epochs=1)
    assert callback.steps == 6


def test_dotted_names_find_aliases_and_compiled_modules() -> None:
    class Nested(Student):
        def __init__(self) -> None:
            super().__init__()
            self.agent = nn.ModuleDict({"critic": torch.compile(self.online, backend="eager"), "copy": self.target})

    student = Nested()
    fit(student, TargetNetwork("agent.critic", "agent.copy", tau=1), max_epochs=1)
    assert same(snapshot(student.online), snapshot(student.target))


def test_two_targets_follow_one_source() -> None:
    class Two(Student):
        def __init__(self) -> None:
            super().__init__()
            self.slow = network()

    student = Two()
    fast, slow = TargetNetwork("online", "target", tau=0.9), TargetNetwork("online", "slow", tau=0.1)
    assert fast.state_key != slow.state_key
    run = fit(student, fast, slow, max_epochs=1)
    assert fast.steps == slow.steps == 6
    assert len(run.optimizers[0].param_groups[0]["params"]) == 18
    distances = [(student.online[5].weight - m[5].weight).norm() for m in (student.target, student.slow)]
    assert distances[0] < distances[1]


def test_target_of_a_target_is_refused() -> None:
    class Chain(Student):
        def __init__(self) -> None:
            super().__init__()
            self.slow = network()

    callbacks = [TargetNetwork("online", "target", tau=0.5), TargetNetwork("target", "slow", tau=0.5)]
    for ordered in (callbacks, callbacks[::-1]):
        with pytest.raises(MisconfigurationException, match="'target' is itself a target"):
            fit(Chain(), *ordered)


def test_target_stays_in_float32_under_mixed_precision() -> None:
    student = Student()
    callback = TargetNetwork("online", "target", tau=0.001)
    fit(student, callback, precision="bf16-mixed")
    assert student.target[0].weight.dtype == torch.float32
    assert callback.steps == 12


# Errors come early and say what to do


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("net", "net"), {"tau": 0.5}, "cannot follow itself"),
        (("net", "net.target"), {"tau": 0.5}, "'net.target' is inside 'net'"),
        (("a.net", "a"), {"tau": 0.5}, "'a.net' is inside 'a'"),
        (("", "net"), {"tau": 0.5}, r"source=''\): name a module inside"),
        (("a", "b"), {}, "give one of the two"),
        (("a", "b"), {"tau": 0.5, "every_n_steps": 3}, "give one of the two"),
        (("a", "b"), {"tau": -0.5}, r"TargetNetwork\(tau=-0.5\)"),
        (("a", "b"), {"tau": 1.5}, r"in \[0, 1\]"),
        (("a", "b"), {"tau": float("nan")}, r"in \[0, 1\]"),
        (("a", "b"), {"every_n_steps": 0}, r"every_n_steps=0\): every_n_steps is at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetNetwork(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((nn.Linear(1, 1), "b"), {"tau": 0.5}, r"source=Linear.*dotted name of a module"),
        (("a", None), {"tau": 0.5}, r"target=None"),
        (("a", "b"), {"tau": "0.5"}, r"TargetNetwork\(tau='0.5'\)"),
        (("a", "b"), {"every_n_steps": 2.0}, r"every_n_steps=2.0\): every_n_steps is a whole number"),
        (("a", "b"), {"every_n_steps": True}, r"every_n_steps=True"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TargetNetwork(*arguments, **options)


def test_name_that_begins_like_the_other_is_accepted() -> None:
    TargetNetwork("net", "net_target", tau=0.5)


def refused(student: LightningModule, callback: TargetNetwork, error: type[Exception]) -> str:
    """Return the message of the error at fit start, and check that nothing stays behind."""
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    before = snapshot(student)
    with pytest.raises(error) as caught:
        fit(student, callback)
    assert flags == {name: p.requires_grad for name, p in student.named_parameters()}
    assert not moved(before, snapshot(student))
    return str(caught.value)


def test_unknown_name_is_refused_with_the_closest_one() -> None:
    assert refused(Student(), TargetNetwork("onlin", "target", tau=0.5), ValueError) == (
        "TargetNetwork(source='onlin') names no module of Student. Did you mean 'online'?\n"
        "Top-level modules: online, target."
    )
    assert "TargetNetwork(target='target.9')" in refused(
        Student(), TargetNetwork("online", "target.9", tau=0.5), ValueError
    )


def test_different_architectures_are_refused_at_fit_start() -> None:
    student = Student()
    student.target[5] = nn.Linear(36, 4)
    assert refused(student, TargetNetwork("online", "target", tau=0.5), ValueError) == (
        "The target 'target' does not have the architecture of the source 'online'.\n"
        "Different: 5.weight is (3, 36) float32 in source 'online', (4, 36) float32 in target 'target'; "
        "5.bias is (3,) float32 in source 'online', (4,) float32 in target 'target'."
    )


def test_target_that_shares_parameters_is_refused() -> None:
    student = Student()
    student.target = student.online
    assert "shares parameters with the source 'online'" in refused(
        student, TargetNetwork("online", "target", tau=0.5), ValueError
    )
    student = Student()
    student.head = nn.Linear(36, 3)
    student.head.weight = student.target[5].weight
    message = refused(student, TargetNetwork("online", "target", tau=0.5), ValueError)
    assert message.startswith("The target 'target' shares parameters with a module outside of it: 5.weight.")


def test_fit_without_a_torch_optimizer_is_refused() -> None:
    class Without(Student):
        def configure_optimizers(self) -> None:
            return None

    with pytest.warns(UserWarning, match="will run with no optimizer"):
        message = refused(Without(), TargetNetwork("online", "target", tau=0.5), MisconfigurationException)
    assert "configure_optimizers gave none" in message

    class Foreign:
        """What Lightning takes for an optimizer."""

        param_groups: tuple[()] = ()

        def __init__(self) -> None:
            self.defaults: dict[str, Any] = {}
            self.state: dict[str, Any] = {}

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

        def step(self, closure: Any = None) -> None: ...

    student = Student(lambda _: Foreign())  # type: ignore[arg-type, return-value]
    message = refused(student, TargetNetwork("online", "target", tau=0.5), MisconfigurationException)
    assert "Foreign is not a torch.optim.Optimizer" in message


def test_lbfgs_that_has_the_target_does_not_move_it() -> None:
    """It makes one vector of all it has; the target's part of it is zero."""
    student = Student(lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3))
    before = copy.deepcopy(student.online)
    fit(student, TargetNetwork("online", "target", every_n_steps=99), max_epochs=1)
    assert all(map(torch.equal, student.target.parameters(), before.parameters()))
    assert not any(map(torch.equal, student.online.parameters(), before.parameters()))


def test_strategy_that_shards_is_refused() -> None:
    run = trainer()
    run.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match="does not work with FSDPStrategy"):
        TargetNetwork("online", "target", tau=0.5).on_fit_start(run, BoringModel())
