from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze import (
    FreezeBatchNorm,
    FreezeSchedule,
    Phase,
    Plateau,
    Ramp,
    TargetNetwork,
    freeze_batchnorm,
    gradual_unfreezing,
)
from lightning_freeze.schedule.plan import FitLength
from lightning_freeze.schedule.progress import walk
from lightning_freeze.tables import Table, in_bytes
from tests.nets import Net, Probe, adamw, loader, trainer

ends = st.tuples(st.none() | st.integers(1, 4), st.none() | st.integers(1, 17)).filter(any)
PHASES = [
    Phase("head", epochs=2),
    Phase(["head", "backbone.4"], steps=9, lr_scale={"backbone": 0.1}),
    Phase("neck", until=Plateau("val_loss")),
    Phase("*"),
]


def column(table: Table, name: str) -> list[str]:
    place = table.columns.index(name)
    return [str(row[place]) for row in table.rows]


@settings(max_examples=300, deadline=None)
@given(st.lists(ends, min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 8), st.sampled_from(["epoch", "step"]))
def test_preview_has_phases_begin_and_end_where_a_fit_does(
    lengths: Any, steps_per_epoch: int, max_epochs: int, unit: str
) -> None:
    phases = [Phase("*", epochs=e, steps=s) for e, s in lengths]
    steps = max_epochs * steps_per_epoch
    limits = (max_epochs, None) if unit == "epoch" else (None, steps)
    _, borders = FitLength.of(*limits, steps_per_epoch).planned(phases)
    begins = [step for _, step, _ in walk([*phases, Phase("*")], max_epochs - 1, steps - 1, steps_per_epoch)]
    assert borders == [*begins, *[steps] * (len(phases) + 1 - len(begins))]


def test_preview_table_equals_what_a_fit_does() -> None:
    net = Net()
    schedule = FreezeSchedule(PHASES[:2] + PHASES[3:], verbose=False)
    table = schedule.preview(net, 5, steps_per_epoch=6)
    seen: dict[int, tuple[int, int, set[int]]] = {}

    def start(run: Any, module: Any) -> None:
        trains = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(not m.training for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d))
        seen.setdefault(schedule.phase_index, (trains, frozen, set()))[2].add(run.current_epoch)

    trainer(callbacks=[schedule, Probe(start)], max_epochs=5).fit(net, loader())
    assert column(table, "phase") == ["1", "2", "3"]
    assert column(table, "parameters") == [str(trains) for trains, *_ in seen.values()]
    assert column(table, "share") == [f"{100 * trains / 275:.1f} %" for trains, *_ in seen.values()]
    assert column(table, "frozen BN") == [f"{held}/2" for _, held, _ in seen.values()]
    epochs = [f"{min(own)}-{max(own)}" if len(own) > 1 else f"{min(own)}" for *_, own in seen.values()]
    assert column(table, "epochs") == epochs


OPTIMIZERS: dict[str, Any] = {
    "AdamW": adamw,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum in one group": lambda p: torch.optim.SGD(
        [{"params": (own := list(p))[:4], "momentum": 0.9}, {"params": own[4:]}], lr=0.01
    ),
    "Adagrad, whose constructor makes the state": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adafactor, whose step reads values": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "only some parameters": lambda p: torch.optim.Adam(list(p)[:-2], lr=0.01),
}


@pytest.mark.parametrize("policy", ["keep", "drop", "offload"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_of_gradients_and_optimizer_state_is_that_of_the_fit(name: str, policy: Any) -> None:
    phases = [Phase("head", epochs=1), Phase(["neck", "backbone.4"], epochs=1, lr_scale=0.5), Phase("*")]
    schedule, net = FreezeSchedule(phases, optimizer_state=policy, verbose=False), Net(OPTIMIZERS[name])
    table = schedule.preview(net, 3)
    gradients, states = dict[int, int](), dict[int, int]()

    def end(run: Any, module: Any) -> None:
        gradients[schedule.phase_index] = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
        trains = [p for p in module.parameters() if p.requires_grad or policy == "keep"]
        kept = [run.optimizers[0].state.get(p, {}).values() for p in trains]
        states[schedule.phase_index] = sum(v.nbytes for state in kept for v in state if isinstance(v, torch.Tensor))

    trainer(callbacks=[schedule, Probe(end=end)], max_epochs=3).fit(net, loader())
    assert column(table, "gradients") == list(map(in_bytes, gradients.values()))
    assert column(table, "optimizer") == list(map(in_bytes, states.values()))


def test_preview_asks_an_optimizer_that_is_given_and_leaves_out_what_nobody_knows() -> None:
    schedule, plain = (
        FreezeSchedule([Phase("0", epochs=1), Phase("*")]),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)),
    )
    assert "optimizer" not in schedule.preview(plain, 3).columns
    made = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for optimizer in (made, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)):
        assert column(schedule.preview(plain, 3, optimizer=optimizer), "optimizer") == ["48 B", "64 B"]
    assert made.state == {}

    class NeedsTrainer(Net):
        def configure_optimizers(self) -> Any:
            self.neck.requires_grad_(False)
            return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)

    net = NeedsTrainer()
    assert "optimizer" not in FreezeSchedule([Phase("head")]).preview(net, 3).columns
    assert all(parameter.requires_grad for parameter in net.parameters())


class Blocks(nn.Module):
    """Many layers, without memory."""

    def __init__(self, count: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed = nn.Embedding(1000, 64)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(64, 2, 128) for _ in range(count))
            self.norm = nn.LayerNorm(64)
            self.head = nn.Linear(64, 10)


def test_a_preview_of_forty_layers_in_forty_phases_fits_a_terminal() -> None:
    layers = ["embed", *(f"blocks.{number}" for number in range(39)), "head"]
    phases = gradual_unfreezing(layers, lr_decay=1.2)
    table = FreezeSchedule(phases).preview(Blocks(39), 50, optimizer=torch.optim.AdamW)
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 100
    assert column(table, "trains")[19] == "blocks[20:39], head"
    assert column(table, "trains")[-1] == "*"  # with the norm, which no layer names
    assert column(table, "lr scale")[-1] == "0.00057 … 1"


def test_preview_says_what_never_trains_and_what_the_fit_does_not_reach() -> None:
    phases = [Phase("head", epochs=2), Phase(["head", "backbone.4"], epochs=2), Phase("neck", epochs=1), Phase("*")]
    notes = FreezeSchedule(phases).preview(Net(), 3).notes
    assert notes == (
        "The fit ends before phase 3 to 4 would begin.",
        "Never trains: backbone[0:2, 5], neck (112 parameters).",
    )
    notes = FreezeSchedule(phases[:2]).preview(Net(), 9).notes
    assert notes[0] == "The fit ends with the last phase, after 4 of 9 epochs."


def test_preview_in_steps_and_by_fractions() -> None:
    phases = [Phase("head", fraction=0.1), Phase("neck", epochs=1), Phase("*")]
    table = FreezeSchedule(phases).preview(Net(), max_steps=100, steps_per_epoch=20)
    assert column(table, "steps") == ["0-9", "10-19", "20-99"]
    assert column(FreezeSchedule(phases).preview(Net(), 20), "epochs") == ["0-1", "2", "3-19"]
    thirds = FreezeSchedule([Phase("*", fraction=1 / 3) for _ in range(3)])  # together they are the fit
    assert column(thirds.preview(Net(), max_steps=10), "steps") == ["0-2", "3-6", "7-9"]
    # Phases that begin in one epoch would look alike in epochs.
    table = FreezeSchedule([Phase("head", steps=3), Phase("neck", steps=4), Phase("*")]).preview(
        Net(), 2, steps_per_epoch=10
    )
    assert column(table, "steps") == ["0-2", "3-6", "7-19"]
    assert column(FreezeSchedule([Phase("*")]).preview(Net(), 9, max_steps=25, steps_per_epoch=10), "epochs") == ["0-2"]


def test_preview_changes_nothing() -> None:
    net = Net()
    net.neck.requires_grad_(False)
    net.backbone.eval()
    before = [(p.requires_grad, m.training) for m in net.modules() for p in m.parameters()]
    schedule = FreezeSchedule(PHASES)
    schedule.preview(net, 9, steps_per_epoch=6)
    schedule.plot(net, 9, steps_per_epoch=6)
    assert before == [(p.requires_grad, m.training) for m in net.modules() for p in m.parameters()]
    assert schedule.history == []


def test_preview_table_words_epochs_plateaus_and_scales() -> None:
    schedule = FreezeSchedule([*PHASES[:3], Phase("*", name="all", epochs=1, lr_scale={"*": Ramp(0.1), "head": 1.0})])
    table = schedule.preview(Net(), 8, steps_per_epoch=6)
    assert column(table, "phase") == ["1", "2", "3", "4 all"]
    assert column(table, "trains") == ["head", "head, backbone.4", "neck", "*"]
    assert column(table, "epochs") == ["0-1", "2-3", "3-5 or until", "5"]
    assert column(table, "lr scale") == ["1", "0.1, 1", "1", "0.1→1, 1"]
    assert "Phase 3 lasts until val_loss plateaus: how long that takes is a guess." in table.notes
    short = FreezeSchedule(PHASES).preview(Net(), 2, steps_per_epoch=6)
    assert column(short, "epochs") == ["0-1", "never", "never", "never"]


@pytest.mark.parametrize(
    ("phases", "options", "match"),
    [
        (PHASES, {"max_epochs": 3}, "lasts 9 steps: give steps_per_epoch"),
        (PHASES, {"max_epochs": 0}, "max_epochs is at least 1"),
        (PHASES, {"max_epochs": 3, "steps_per_epoch": 0}, "steps_per_epoch is at least 1"),
        ([Phase("hed")], {"max_epochs": 3}, 'Did you mean "head"'),
        ([Phase("*", lr_scale={"hed": 0.1})], {"max_epochs": 3}, 'Did you mean "head"'),
    ],
)
def test_preview_and_plot_refuse_what_a_fit_refuses(phases: Any, options: Any, match: str) -> None:
    for give in (FreezeSchedule(phases).preview, FreezeSchedule(phases).plot):
        with pytest.raises(ValueError, match=match):
            give(Net(), **options)
        for value in (None, 1.5, "3"):
            with pytest.raises(TypeError, match="max_epochs is a whole number"):
                give(Net(), value)


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize("train_affine", [False, True])
def test_preview_counts_batchnorm_frozen_by_hand_as_the_fit_does(
    train_affine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The table says what the fit's own lines say, and the picture shows it."""
    net = Net()
    freeze_batchnorm(net, "backbone.5", train_affine=train_affine)
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    table = schedule.preview(net, 2)
    assert column(table, "frozen BN") == ["2/2", "1/2"]
    with caplog.at_level(logging.INFO, "lightning_freeze"):
        trainer(callbacks=[schedule], max_epochs=2).fit(net, loader())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("phase")]
    for count, frozen, line in zip(column(table, "parameters"), column(table, "frozen BN"), lines, strict=True):
        assert f"trains {count} of " in line
        assert line.endswith(f"{frozen.replace('/', ' of ')} BatchNorm frozen")
    with pytest.raises(ValueError, match="trains nothing") if not train_affine else contextlib.nullcontext():
        FreezeSchedule([Phase("backbone.5")]).preview(net, 2)


class Byol(Net):
    """An online network and its target, of the same architecture; the head predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.backbone)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + self.target(batch[0]).mean()


HELD: dict[str, Any] = {
    "target": lambda: [TargetNetwork("backbone", "target", tau=0.1)],
    "batchnorm": lambda: [FreezeBatchNorm("backbone")],
    "batchnorm, affine trains": lambda: [FreezeBatchNorm("backbone", train_affine=True)],
    "both": lambda: [FreezeBatchNorm("*"), TargetNetwork("backbone", "target", tau=0.1, eval_mode=True)],
    "neither": lambda: [],
}


@pytest.mark.parametrize("mode", ["batchnorm", "eval"])
@pytest.mark.parametrize("held", HELD)
def test_what_other_callbacks_hold_is_counted(held: str, mode: Any) -> None:
    """By argument, and by the Trainer that the model is attached to: as many as the fit trains."""
    phases = [Phase("head", epochs=1), Phase(["head", "backbone"], epochs=1), Phase("*")]
    schedule, net, callbacks = FreezeSchedule(phases, frozen_mode=mode, verbose=False), Byol(), HELD[held]()
    before = schedule.preview(net, 3, callbacks=callbacks)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    fitted: dict[int, tuple[int, int]] = {}
    attached = []

    def note(run: Any, module: Any) -> None:
        trains = sum(p.numel() for p in module.parameters() if p.requires_grad)
        fitted[schedule.phase_index] = (trains, sum(not layer.training for layer in norms))
        if len(attached) == schedule.phase_index:
            attached.append(str(schedule.preview(module, 3)))

    trainer(callbacks=[*callbacks, schedule, Probe(note)], max_epochs=3).fit(net, loader())
    for table in (before, schedule.preview(net, 3)):  # it is attached to its Trainer still
        frozen = [int(cell.partition("/")[0]) for cell in column(table, "frozen BN")]
        found = list(zip(map(int, column(table, "parameters")), frozen, strict=True))
        assert found == [fitted[index] for index in range(3)]
    assert attached == [str(before)] * 3  # also asked in mid-fit


def test_the_repr_of_a_schedule_is_the_code_that_makes_it() -> None:
    short = FreezeSchedule([Phase("head", epochs=2), Phase("*")], frozen_mode="eval")
    assert repr(short) == "FreezeSchedule([Phase(train='head', epochs=2), Phase(train='*')], frozen_mode='eval')"
    long = FreezeSchedule(
        [*PHASES[:3], Phase(["*", "!head"], name="all", lr_scale={"*": Ramp(0.1, epochs=2)})], optimizer_state="drop"
    )
    for schedule in (short, long):
        again = eval(repr(schedule))
        assert again.phases == schedule.phases
        assert (again.frozen_mode, again.optimizer_state) == (schedule.frozen_mode, schedule.optimizer_state)
    assert len(repr(long).splitlines()) == 6
