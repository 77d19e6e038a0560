"""Law 3: optimizers that look at their groups outside of a step, rest, keep sums in groups, or are exchanged."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze import FreezeSchedule, Phase, TargetNetwork
from tests.devices import Even
from tests.nets import Net, Probe, adamw, loader, moved, sgd, snapshot, trainer
from tests.phased import rates_in_steps


class SharpnessAware(Optimizer):
    """As SAM is published: another optimizer inside, and the device asked of the first parameter of the first group."""

    def __init__(self, params: Any, base: Any = torch.optim.SGD, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def with_gradients(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        device = self.param_groups[0]["params"][0].device
        norm = torch.stack([p.grad.norm().to(device) for _, p in self.with_gradients()]).norm()
        for group, p in self.with_gradients():
            self.state[p]["up"] = p.grad * (group["rho"] / (norm + 1e-12))
            p.add_(self.state[p]["up"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for _, p in self.with_gradients():
            p.sub_(self.state[p]["up"])
        self.base.step()
        self.zero_grad()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.base.param_groups = self.param_groups


class Averaging(Optimizer):
    """As schedule-free ones: weights in the middle are trained, `eval()` puts the average there, sums are in groups."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "weight_sum": 0.0, "train_mode": True})

    @torch.no_grad()
    def swap(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                        p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train

    def train(self) -> None:
        self.swap(True)

    def eval(self) -> None:
        self.swap(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() before step()")
            weight = (group["lr"] ** 2) * (group["k"] + 1)
            group["weight_sum"] += weight
            share = weight / group["weight_sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1
        return loss


class ByPlace(torch.optim.SGD):
    """Looks the options of a group up by its place in a list of its own."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        self.decays = [0.1 * (place + 1) for place, _ in enumerate(self.param_groups)]

    @torch.no_grad()
    def decay(self) -> None:
        for place, group in enumerate(self.param_groups):
            assert len(self.param_groups) == len(self.decays)
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * self.decays[place])


class CallsSuper(torch.optim.AdamW):
    """Overrides step, as people do, and calls the one of torch: hooks run twice, nested."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class StepsInSteps(Optimizer):
    """A wrapper that steps another optimizer in its own step and shows the other's groups."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__([torch.zeros(1)], base.defaults)
        self.base, self.param_groups, self.state = base, base.param_groups, base.state

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


PHASES = [
    Phase("*", steps=5),
    Phase("head", epochs=1),
    Phase("*", lr_scale={"backbone": 0.1, "neck": 0.5}),
]


def in_groups(make: Callable[[Any], Optimizer]) -> Callable[[Any], Optimizer]:
    """Give an optimizer the backbone in its first group: while that is frozen, the group has nothing to step."""

    def made(params: Any) -> Optimizer:
        params = list(params)
        return make([{"params": params[:8]}, {"params": params[8:]}])

    return made


class ByHand(Callback):
    """Freezes by flags what PHASES freeze."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = pl_module.steps
        for name, p in pl_module.named_parameters():
            p.requires_grad = name.startswith("head.") or not 5 <= step < 12


class Sharp(Even):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer=optimizer)
        self.automatic_optimization = False
        self.steps = 0
        self.target = copy.deepcopy(self.head).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for name, p in self.named_parameters() if not name.startswith("target.")])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers().optimizer
        for step in (optimizer.first_step, optimizer.second_step):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            step()
        self.steps += 1


def sharpness_aware(params: Any) -> Optimizer:
    return SharpnessAware(params, lr=0.01, momentum=0.9)


@pytest.mark.parametrize("make", [sharpness_aware, in_groups(sharpness_aware)], ids=["one group", "two groups"])
def test_two_steps_of_which_neither_is_called_step(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Frozen as by hand, phases count the steps, the target follows each, and it is said that Lightning does not."""
    frozen = [Phase("*", steps=5), Phase("head", steps=7), Phase("*")]
    nets = []
    schedule = FreezeSchedule(frozen, frozen_mode="train", verbose=False)
    follow = TargetNetwork("head", "target", tau=0.5)
    for callbacks in ([ByHand()], [schedule, follow]):
        torch.manual_seed(0)
        nets.append(Sharp(make))
        with caplog.at_level(logging.WARNING, "lightning_freeze"):
            run = trainer(callbacks=callbacks)
            run.fit(nets[-1], loader())
    by_hand, ours = ({k: v for k, v in snapshot(net).items() if not k.startswith("target")} for net in nets)
    assert moved(by_hand, ours) == set()
    assert [begin[1:] for begin in schedule.history] == [(0, 0), (5, 1), (12, 2)]
    assert (run.global_step, follow.steps) == (0, 24)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("the optimizer is stepped past Lightning" in message for message in messages) == 1


def test_scales_reach_the_optimizer_inside() -> None:
    net = Sharp(sharpness_aware)
    schedule = FreezeSchedule([Phase("*", steps=2), Phase("*", lr_scale={"neck": 0.1})])
    with rates_in_steps(net) as rates:
        trainer(callbacks=[schedule]).fit(net, loader())
    assert [row["neck.weight"] for row in rates] == [0.01] * 2 + [0.01 * 0.1] * 22
    assert {row["head.weight"] for row in rates} == {0.01}


class Free(Even):
    """Changes an optimizer's mode as people do in Lightning."""

    def on_train_epoch_start(self) -> None:
        self.optimizers().optimizer.train()

    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.eval()

    def on_validation_epoch_end(self) -> None:
        self.seen = [*getattr(self, "seen", []), snapshot(self)]


class FlagsByHand(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for name, p in pl_module.named_parameters():
            p.requires_grad = name.startswith("head.") or not 4 <= trainer.global_step < 12


@pytest.mark.parametrize("make", [Averaging, in_groups(Averaging)], ids=["one group", "two groups"])
def test_modes_that_walk_groups_find_what_is_frozen(make: Any) -> None:
    """Validation sees the average of what is frozen too, and unfreezing moves nothing."""
    schedule = FreezeSchedule([Phase("*", steps=4), Phase("head", steps=8), Phase("*")], frozen_mode="train")
    found = []
    for callback in (FlagsByHand(), schedule):
        torch.manual_seed(0)
        net = Free(optimizer=make)
        starts: list[dict[str, Tensor]] = []
        probe = Probe(lambda _, module, starts=starts: starts.append(snapshot(module)))
        trainer(callbacks=[callback, probe]).fit(net, loader(), loader())
        found.append([*starts, *net.seen, snapshot(net)])
    assert len(found[0]) == 24 + 4 + 1
    assert all(moved(a, b) == set() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("factor", [10.0, 0.1, 2.0])
@pytest.mark.parametrize("names", [("head",), ("neck", "head"), ("backbone.1",)])
def test_running_sums_of_a_scaled_part_are_those_of_a_group_of_its_own(factor: float, names: tuple[str, ...]) -> None:
    def own(net: nn.Module) -> list[dict[str, Any]]:
        scaled = [name.startswith(tuple(f"{one}." for one in names)) for name, _ in net.named_parameters()]
        rows = list(zip(net.parameters(), scaled, strict=True))
        return [
            {"params": [p for p, inside in rows if not inside]},
            {"params": [p for p, inside in rows if inside], "lr": 0.01 * factor},
        ]

    found = []
    schedule = FreezeSchedule([Phase("*", lr_scale={names: factor})])
    for callbacks, groups in (([], own), ([schedule], lambda net: net.parameters())):
        torch.manual_seed(0)
        net = Free()
        net.make_optimizer = lambda _, net=net, groups=groups: Averaging(groups(net), lr=0.01)
        trainer(callbacks=callbacks, max_epochs=2).fit(net, loader(), loader())
        found.append(snapshot(net))
    assert moved(*found) == set()


def test_running_sums_are_resumed(tmp_path: Any) -> None:
    phases = [Phase("*", steps=3, lr_scale={"neck": 3.0}), Phase("head", steps=5), Phase("*", lr_scale={"neck": 0.1})]

    def run(epochs: int, resume: Any = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = Free(optimizer=Averaging)
        fitting = trainer(callbacks=[FreezeSchedule(phases, verbose=False)], max_epochs=epochs)
        fitting.fit(net, loader(), loader(), ckpt_path=resume, weights_only=True)
        fitting.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return snapshot(net)

    whole = run(3)
    for stop in (1, 2):
        run(stop)
        assert moved(whole, run(3, tmp_path / f"{stop}.ckpt")) == set()


def test_options_by_place() -> None:
    """The optimizer's own lists stay as long as its groups, whatever is frozen or scaled."""

    class Decays(Even):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            optimizer.decay()

    net = Decays(optimizer=in_groups(ByPlace))
    trainer(callbacks=[FreezeSchedule(PHASES, verbose=False)]).fit(net, loader())
    (optimizer,) = net.trainer.optimizers
    assert [len(group["params"]) for group in optimizer.param_groups] == [8, 4]


@pytest.mark.parametrize("scheduler", [None, "one cycle"])
@pytest.mark.parametrize("wrap", ["calls super", "steps in steps"])
def test_hooks_that_are_nested_scale_once(wrap: str, scheduler: str | None) -> None:
    """As the plain optimizer, to the bit, and as many steps."""
    make: Any = {
        "plain": lambda params: torch.optim.AdamW(params, lr=0.01),
        "calls super": lambda params: CallsSuper(params, lr=0.01),
        "steps in steps": lambda params: StepsInSteps(torch.optim.AdamW(params, lr=0.01)),
    }
    cycle = (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30)) if scheduler else None
    found = []
    for kind in ("plain", wrap):
        torch.manual_seed(0)
        net = Even(optimizer=make[kind], scheduler=cycle, interval="step")
        schedule = FreezeSchedule(PHASES, verbose=False)
        run = trainer(callbacks=[schedule])
        run.fit(net, loader())
        found.append((snapshot(net), schedule.history, [group["lr"] for group in run.optimizers[0].param_groups]))
    assert moved(found[0][0], found[1][0]) == set()
    assert found[0][1:] == found[1][1:]


class RaisesOnce(torch.optim.SGD):
    """Its third step fails before anything is stepped, as one that finds no memory."""

    calls = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("no memory")
        return super().step(closure)


def test_after_a_step_that_failed_the_groups_are_the_users_own() -> None:
    """User code may catch the error and go on: groups are whole at once, and scales are as before."""

    class Catches(Even):
        def __init__(self) -> None:
            super().__init__(optimizer=lambda params: RaisesOnce(params, lr=0.01))
            self.automatic_optimization = False
            self.groups: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            try:
                optimizer.step()
            except ArithmeticError:
                self.failed = batch_idx

        def on_train_batch_end(self, *_: Any) -> None:
            self.groups.append(len(self.trainer.optimizers[0].param_groups))

    net = Catches()
    with rates_in_steps(net) as rates:
        trainer(callbacks=[FreezeSchedule([Phase("*", lr_scale={"neck": 0.1})])], max_epochs=2).fit(net, loader())
    assert net.failed == 2
    assert {(row["neck.weight"], row["head.weight"]) for row in rates} == {(0.01 * 0.1, 0.01)}
    assert set(net.groups) == {1}


class Exchanges(Callback):
    """As answers in Lightning's forum advise."""

    def __init__(self, at: int, make: Callable[[Any], Optimizer]) -> None:
        self.at, self.make = at, make

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.at:
            trainer.optimizers = [self.make(pl_module.make_parameters())]


class Followed(Even):
    def __init__(self, optimizer: Any = sgd, only: str = "") -> None:
        super().__init__(optimizer=optimizer)
        self.target = copy.deepcopy(self.head).requires_grad_(False)
        self.only = only

    def make_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.startswith(self.only)]

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.make_parameters())


@pytest.mark.parametrize("first", [True, False], ids=["schedule first", "exchange first"])
@pytest.mark.parametrize("only", ["", "head"], ids=["all given", "adopted"])
def test_an_optimizer_that_is_exchanged_is_taken_over(only: str, first: bool) -> None:
    """Scales, adoption, the frozen and the target go on with the new one; the old one is the user's own again."""
    phases = [Phase("*", epochs=1), Phase("head", epochs=2), Phase("*", lr_scale={"backbone": 0.01})]
    schedule, follow = FreezeSchedule(phases, verbose=False), TargetNetwork("head", "target", tau=0.5)
    net = Followed(only=only)
    before: list[Any] = []
    exchange = Exchanges(2, adamw)
    probe = Probe(lambda run, _: before.append(run.optimizers[0]))
    callbacks = [schedule, follow, exchange] if first else [exchange, follow, schedule]
    run = trainer(callbacks=[*callbacks, probe])
    with rates_in_steps(net) as rates:
        run.fit(net, loader())
    old, new = before[0], before[-1]
    assert (type(old), type(new)) == (torch.optim.SGD, torch.optim.AdamW)
    assert [row["backbone.0.weight"] for row in rates[18:]] == [0.01 * 0.01] * 6
    assert {row["head.weight"] for row in rates} == {0.01}
    assert follow.steps == 24
    given = len(net.make_parameters())
    for optimizer in (old, new):
        assert [len(group["params"]) for group in optimizer.param_groups] == [given]
        assert not optimizer._optimizer_state_dict_pre_hooks
    frozen = [p for name, p in net.named_parameters() if name.startswith("backbone.") and not only]
    assert all(new.state[p]["step"] == 6 for p in frozen)


def half_precision() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]}


class TwoByHand(Even):
    """Two optimizers in manual optimization, of which the schedule lets one rest."""

    def __init__(self, make: Any = sgd, *, clips: str | None = None) -> None:
        super().__init__(optimizer=make)
        self.automatic_optimization, self.clips = False, clips

    def configure_optimizers(self) -> Any:
        upper = [*self.neck.parameters(), *self.head.parameters()]
        return [self.make_optimizer(self.backbone.parameters()), sgd(upper)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            if self.clips:
                self.clip_gradients(optimizer, 0.5, self.clips)
            optimizer.step()


def fused(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, fused=True)


@pytest.mark.parametrize("rests", ["head", "backbone"])
@pytest.mark.parametrize(
    ("make", "clips", "scales"),
    [(sgd, None, True), (adamw, "norm", True), (fused, None, True), (sgd, "value", True), (adamw, "value", False)],
)
def test_an_optimizer_at_rest_is_scaled_clipped_and_stepped(
    make: Any, clips: str | None, scales: bool, rests: str
) -> None:
    """GradScaler and clip_grad_value_ refuse one without any gradient. It stays to the bit, and goes on afterwards."""
    others = "backbone" if rests == "head" else ["neck", "head"]
    schedule = FreezeSchedule([Phase("*", epochs=1), Phase(others, epochs=1), Phase("*")], verbose=False)
    starts: dict[int, dict[str, Tensor]] = {}
    probe = Probe(lambda _, module: starts.setdefault(schedule.phase_index, snapshot(module)))
    net = TwoByHand(make, clips=clips)
    trainer(callbacks=[schedule, probe], max_epochs=3, **(half_precision() if scales else {})).fit(net, loader())
    assert [begin[0] for begin in schedule.history] == [0, 1, 2]
    names = {name for name, _ in net.named_parameters()}
    rested = {name for name in names if name.startswith("backbone.") == (rests == "backbone")}
    in_front_of_a_norm = {"backbone.0.bias", "backbone.4.bias"}
    assert (moved(starts[1], starts[2]) & names) - in_front_of_a_norm == names - rested - in_front_of_a_norm
    assert (moved(starts[2], snapshot(net)) & names) | in_front_of_a_norm == names
    assert all(p.grad is None or p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_gradient_scaler_in_automatic_optimization(accumulate: int, clip: float | None) -> None:
    """The groups that the scaler sees are whole, also where one of them has nothing to step."""
    seen = []

    class Sees(MixedPrecision):
        def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append([len(group["params"]) for group in optimizer.param_groups])
            return super().optimizer_step(optimizer, *args, **kwargs)

    net, schedule = Even(optimizer=in_groups(sgd)), FreezeSchedule(PHASES[1:], verbose=False)
    before = snapshot(net)
    precision = Sees("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "max_epochs": 2}
    trainer(callbacks=[schedule], plugins=[precision], **options).fit(net, loader())
    assert seen
    assert all(row == [8, 4] for row in seen)
    assert {"backbone.0.weight", "neck.weight", "head.weight"} <= moved(before, snapshot(net))


def test_what_looks_at_groups_around_a_step_sees_the_users_own() -> None:
    """The closure, hooks of the module, clipping, and an ``optimizer_step`` of the user's own."""
    seen: list[tuple[str, list[tuple[int, float]]]] = []

    class Looks(Even):
        def note(self, where: str) -> None:
            groups = self.trainer.optimizers[0].param_groups
            seen.append((where, [(len(group["params"]), group["lr"]) for group in groups]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.note("training_step")
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            self.note("on_after_backward")

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            self.note("configure_gradient_clipping")
            super().configure_gradient_clipping(*args, **kwargs)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.note("on_before_optimizer_step")

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            self.note("before")
            optimizer.step(closure=optimizer_closure)
            self.note("after")

        def on_train_batch_end(self, *_: Any) -> None:
            self.note("on_train_batch_end")

    schedule = FreezeSchedule(PHASES, verbose=False)
    trainer(callbacks=[schedule], gradient_clip_val=0.5).fit(Looks(optimizer=in_groups(sgd)), loader())
    assert len({where for where, _ in seen}) == 7
    assert {str(groups) for _, groups in seen} == {str([(8, 0.01), (4, 0.01)])}


def test_steps_past_lightning_end_a_phase_at_the_step_that_it_says(caplog: pytest.LogCaptureFixture) -> None:
    """Where Lightning's wrapper is passed by, and where it is not: no step is counted twice."""

    class Past(Net):
        def __init__(self, wrapped: bool) -> None:
            super().__init__(sgd)
            self.automatic_optimization, self.wrapped = False, wrapped

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers() if self.wrapped else self.optimizers().optimizer
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    for wrapped in (True, False):
        schedule = FreezeSchedule([Phase("head", steps=4), Phase("neck", steps=9), Phase("*")], verbose=False)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lightning_freeze"):
            trainer(callbacks=[schedule]).fit(Past(wrapped), loader())
        assert [begin[1] for begin in schedule.history] == [0, 4, 13]
        assert [("past Lightning" in record.getMessage()) for record in caplog.records] == ([] if wrapped else [True])
