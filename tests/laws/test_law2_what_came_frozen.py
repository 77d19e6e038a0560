"""Laws 1 and 2: ``"*"`` is what was trainable when the fit began; what came frozen is woken by its name alone."""

from __future__ import annotations

import ast
import copy
import logging
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase
from tests.devices import Even, differing, share
from tests.nets import Net, Probe, adamw, loader, moved, sgd, snapshot, trainer
from tests.replicas import WORLD, on_two_processes


class Adapted(nn.Module):
    """A linear layer that came with the model, frozen, and a trainable low-rank adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_a.t() @ self.lora_b.t()


class Frozen(Even):
    """With one of each kind that people freeze for good; gives its optimizer what ``gives`` says."""

    came = ("teacher.", "perceptual.", "ema.", "metric.", "neck.base.")

    def __init__(self, optimizer: Any = sgd, gives: str = "all") -> None:
        super().__init__(optimizer=optimizer)
        self.neck = Adapted(self.neck)  # type: ignore[assignment]
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)
        self.perceptual = nn.Linear(3, 4).requires_grad_(False)
        self.metric = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        self.ema = copy.deepcopy(self.head).requires_grad_(False)
        self.gives = gives

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        with torch.no_grad():
            taught = self.teacher(batch[0]).mean((2, 3))
            self.log("metric", self.metric.eval()(logits).mean())
        seen = self.perceptual(logits) - self.perceptual(self.ema(taught))
        loss = nn.functional.cross_entropy(logits, batch[1]) + seen.square().mean()
        if not self.automatic_optimization:
            self.step(loss)
        return loss

    def step(self, loss: Tensor) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.gives == "two":
            self.automatic_optimization = False
            return [self.make_optimizer(trainable[:-2]), self.make_optimizer(trainable[-2:])]
        return self.make_optimizer(self.parameters() if self.gives == "all" else trainable)


def named(net: nn.Module, *starts: str) -> set[str]:
    return {name for name, _ in net.named_parameters() if name.startswith(starts)}


def fit(net: Net, schedule: FreezeSchedule, *others: Callback, **options: Any) -> set[str]:
    """Train, and return which parameters have moved and which required grad, in any batch."""
    before, trained = snapshot(net), set[str]()
    probe = Probe(lambda _, module: trained.update(name for name, p in module.named_parameters() if p.requires_grad))
    trainer(callbacks=[schedule, *others, probe], **{"max_epochs": 3, **options}).fit(net, loader())
    names = {name for name, _ in net.named_parameters()}
    changed = moved(before, snapshot(net)) & names
    in_front_of_a_norm = {name for name in trained if name.endswith((".0.bias", ".4.bias"))}  # may get a zero gradient
    assert changed | in_front_of_a_norm == trained
    return trained


@pytest.mark.parametrize("gives", ["all", "trainable", "two"])
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize(
    "phases",
    [
        [Phase("*")],
        [Phase("head", epochs=1), Phase("*")],
        [Phase("head", epochs=1), Phase(["*", "!backbone.0"], epochs=1), Phase("*", lr_scale={"backbone": 0.1})],
    ],
    ids=["one", "two", "three"],
)
def test_a_star_leaves_what_came_frozen(phases: list[Phase], make: Any, gives: str) -> None:
    net = Frozen(make, gives)
    before = snapshot(net)
    trained = fit(net, FreezeSchedule(phases, verbose=False))
    came = named(net, *Frozen.came)
    assert trained == {name for name, _ in net.named_parameters()} - came
    # Statistics too: a frozen teacher is in eval mode.
    assert {name for name in moved(before, snapshot(net)) if name.startswith(Frozen.came)} == set()
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == came


@pytest.mark.parametrize("beside", ["batchnorm first", "schedule first"])
def test_beside_other_holders(beside: str) -> None:
    net = Frozen()
    callbacks: list[Any] = [FreezeBatchNorm("backbone"), FreezeSchedule([Phase("*")], verbose=False)]
    before = snapshot(net)
    trainer(callbacks=callbacks[:: 1 if beside == "batchnorm first" else -1], max_epochs=2).fit(net, loader())
    norms = {f"backbone.{layer}.{name}" for layer in (1, 5) for name in ("weight", "bias")}
    names = {name for name, _ in net.named_parameters()}
    changed = moved(before, snapshot(net)) & names
    assert names - named(net, *Frozen.came) - norms - {"backbone.0.bias", "backbone.4.bias"} <= changed
    assert changed & (named(net, *Frozen.came) | norms) == set()


@pytest.mark.parametrize("gives", ["all", "trainable"])
@pytest.mark.parametrize(
    ("phases", "woken"),
    [
        ([Phase("head", epochs=1), Phase("backbone", epochs=1), Phase("*")], ["backbone."]),
        ([Phase("*", epochs=1), Phase("backbone.4")], ["backbone.4."]),
        ([Phase(["*", "backbone"])], ["backbone."]),
        ([Phase("head", epochs=1), Phase(["backbone.*", "neck"])], ["backbone."]),
        ([Phase("*", epochs=1), Phase("type:BatchNorm2d")], ["backbone.1.", "backbone.5."]),
        ([Phase(["*", "!backbone"], epochs=1), Phase("*")], []),
    ],
    ids=["named, then star", "a part, after a star", "beside a star", "a glob", "a type", "only taken away"],
)
def test_a_backbone_frozen_by_hand_trains_where_a_phase_names_it(
    phases: list[Phase], woken: list[str], gives: str
) -> None:
    class ByHand(Even):
        def configure_optimizers(self) -> Any:
            return self.make_optimizer([p for p in self.parameters() if gives == "all" or p.requires_grad])

    net = ByHand(optimizer=sgd)
    net.backbone.requires_grad_(False)
    last: dict[int, set[str]] = {}
    schedule = FreezeSchedule(phases, verbose=False)

    def note(_: Any, module: Any) -> None:
        last[schedule.phase_index] = {name for name, p in module.named_parameters() if p.requires_grad}

    trained = fit(net, schedule, Probe(note))
    asleep = named(net, "backbone.") - (named(net, *woken) if woken else set())
    assert trained == {name for name, _ in net.named_parameters()} - asleep
    for index, phase in enumerate(phases):
        if phase.train == "*":
            assert last[index] == trained  # also before the phase that names it


def said(caplog: pytest.LogCaptureFixture, net: Net, phases: list[Phase], **options: Any) -> list[str]:
    caplog.clear()
    schedule: type[FreezeSchedule] = options.pop("kind", FreezeSchedule)
    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        trainer(callbacks=[schedule(phases)], max_epochs=2, **options).fit(net, loader())
    return [record.getMessage() for record in caplog.records]


class Special(FreezeSchedule):
    """A subclass has a state key of its own."""


@pytest.mark.parametrize("kind", [FreezeSchedule, Special])
def test_one_warning_with_the_line_for_the_other_choice(caplog: pytest.LogCaptureFixture, kind: Any) -> None:
    def partly() -> Net:
        net = Frozen()
        net.backbone[4].requires_grad_(False)
        return net

    (message,) = said(caplog, partly(), [Phase("head", epochs=1), Phase("*")], kind=kind)
    assert message.startswith('"*" is what was trainable when the fit began, so these stay frozen: backbone.4 (148 ')
    for name in ("teacher", "perceptual"):
        assert f"{name} (" in message
    assert 'name them: Phase(["*", "backbone.4", "neck.base", "teacher", …])' in message
    (message,) = said(caplog, partly(), [Phase("head", epochs=1), Phase(["backbone", "teacher"])], kind=kind)
    assert message.startswith(
        "these came frozen and train where a phase names them: backbone.4 (148 parameters), teach"
    )
    assert 'take them away: Phase(["*", "!backbone.4", "!teacher"])' in message
    (message,) = said(caplog, partly(), [Phase("head", epochs=1), Phase(["*", "teacher"])], kind=kind)
    assert "so these stay frozen: backbone.4" in message
    assert "train where a phase names them: teacher (" in message
    assert said(caplog, Net(), [Phase("head", epochs=1), Phase("*")], kind=kind) == []


def test_what_the_user_left_out_is_said_with_the_line_that_leaves_it_out(caplog: pytest.LogCaptureFixture) -> None:
    """A loss network or an EMA copy that requires grad and that no optimizer was given: a filter would have kept it."""

    def left_out() -> Net:
        net = Net()
        net.perceptual = nn.Linear(3, 2)
        net.make_optimizer = lambda _: sgd([p for name, p in net.named_parameters() if "perceptual" not in name])
        return net

    (message,) = said(caplog, left_out(), [Phase("head", epochs=1), Phase("*")])
    assert "2 parameters that the optimizer was not given" in message
    phase = written_in(message, "take them away: ")
    net = left_out()
    before = snapshot(net)
    assert said(caplog, net, [Phase("head", epochs=1), phase]) == []
    assert not any("perceptual" in name for name in moved(before, snapshot(net)))


def written_in(message: str, after: str) -> Phase:
    """The phase that a warning tells the user to write."""
    line = re.fullmatch(r"Phase\((.*)\)\.", message.partition(after)[2])
    assert line is not None
    return Phase(ast.literal_eval(line[1]))


def test_the_lines_that_the_warning_gives_do_what_they_say(caplog: pytest.LogCaptureFixture) -> None:
    def half() -> Net:
        net = Even(optimizer=sgd)
        net.backbone.requires_grad_(False)
        return net

    everything, upper = {name for name, _ in half().named_parameters()}, named(half(), "head.", "neck.")

    (message,) = said(caplog, half(), [Phase("*")])
    assert fit(half(), FreezeSchedule([written_in(message, "name them: ")])) == everything
    (message,) = said(caplog, half(), [Phase(["*", "backbone"])])
    assert fit(half(), FreezeSchedule([written_in(message, "take them away: ")])) == upper


def test_everything_came_frozen() -> None:
    net = Net().requires_grad_(False)
    with pytest.raises(ValueError, match=r"came frozen, which '\*' leaves alone. Name what shall train"):
        trainer(callbacks=[FreezeSchedule([Phase("*")])]).fit(net, loader())
    assert fit(net, FreezeSchedule([Phase("head", epochs=1), Phase(["neck", "head"])])) == named(net, "head.", "neck.")


NAMES = [name for name, _ in Net().named_parameters()]
LAYERS = ["backbone.0", "backbone.1", "backbone.4", "backbone.5", "neck", "head"]


@settings(max_examples=25, deadline=None)
@given(
    frozen=st.sets(st.sampled_from(NAMES)),
    phases=st.lists(st.sets(st.sampled_from([*LAYERS, "*"]), min_size=1), min_size=1, max_size=3),
    makes=st.sampled_from([sgd, adamw]),
    filtered=st.booleans(),
)
def test_of_any_subset_that_came_frozen(frozen: set[str], phases: list[set[str]], makes: Any, filtered: bool) -> None:
    """What no phase names stays to the bit; what trains in a phase is what it names, and its star."""
    selectors = [sorted(selected) for selected in phases]
    woken = {name for name in NAMES for one in selectors if any(name.startswith(f"{layer}.") for layer in one)}
    star = {name for name in NAMES if name not in frozen or name in woken}
    trains = [
        {name for name in NAMES if any(name.startswith(f"{layer}.") for layer in one)} | (star if "*" in one else set())
        for one in selectors
    ]
    if not all(trains):
        return

    class Some(Even):
        def configure_optimizers(self) -> Any:
            given = [p for p in self.parameters() if p.requires_grad or not filtered]
            return self.make_optimizer(given or [self.head.weight])

    net = Some(optimizer=makes)
    for name, p in net.named_parameters():
        p.requires_grad = name not in frozen
    seen: dict[int, set[str]] = {}
    built = [Phase(one, steps=2 if index < len(selectors) - 1 else None) for index, one in enumerate(selectors)]
    schedule = FreezeSchedule(built, verbose=False)
    before = snapshot(net)

    def note(_: Any, module: Any) -> None:
        seen[schedule.phase_index] = {name for name, p in module.named_parameters() if p.requires_grad}

    trainer(callbacks=[schedule, Probe(note)], max_epochs=1).fit(net, loader())
    assert [seen[index] for index in range(len(built))] == trains
    assert moved(before, snapshot(net)) & set(NAMES) <= set().union(*trains)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == frozen


def on_this_rank() -> list[Any]:
    found = []
    for gives in ("all", "trainable", "two"):
        torch.manual_seed(0)
        net = Frozen(sgd, gives)
        before = snapshot(net)
        schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")], verbose=False)
        options = {"strategy": "ddp", "devices": WORLD, "use_distributed_sampler": False, "max_epochs": 2}
        trainer(callbacks=[schedule], **options).fit(net, share())  # type: ignore[arg-type]
        found.append([sorted(moved(before, snapshot(net))), differing(dict(net.named_parameters()))])
    return found


def test_under_ddp_without_find_unused_parameters(tmp_path: Any) -> None:
    for rank in on_two_processes(on_this_rank, tmp_path):
        for changed, differ in rank:
            assert differ == []
            assert {"backbone.0.weight", "neck.lora_b", "head.weight"} <= set(changed)
            assert [name for name in changed if name.startswith(Frozen.came)] == []
