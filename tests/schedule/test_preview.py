from __future__ import annotations

import contextlib
import copy
import importlib
import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Plateau, TargetNetwork, freeze_batchnorm
from lightning_freeze.schedule.plot import draw_schedule
from lightning_freeze.schedule.preview import Plan, phase_spans
from lightning_freeze.schedule.progress import walk
from tests.nets import Net, Probe, loader, trainer

ends = st.tuples(st.none() | st.integers(1, 4), st.none() | st.integers(1, 17)).filter(any)
PHASES = [
    Phase("head", epochs=2),
    Phase(["head", "backbone.4"], steps=9, lr_scale={"backbone": 0.1}),
    Phase("neck", until=Plateau("val_loss")),
    Phase("*"),
]


@settings(max_examples=300, deadline=None)
@example([(None, 1), (None, 3), (None, 6), (None, 2), (None, 1)], 3, 4)  # thirds that add up to four
@given(st.lists(ends, min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 8))
def test_preview_spans_equal_those_of_a_fit(lengths: Any, steps_per_epoch: int, max_epochs: int) -> None:
    phases = [Phase("*", epochs=e, steps=s) for e, s in lengths]
    spans = phase_spans(phases, max_epochs, steps_per_epoch)
    last = max_epochs * steps_per_epoch - 1
    walked = walk(phases, max_epochs - 1, last, steps_per_epoch)
    assert [round(span[0] * steps_per_epoch) for span in spans if span] == [step for _, step, _ in walked]
    reached = [span for span in spans if span is not None]
    assert reached == spans[: len(reached)]
    assert reached[0][0] == 0
    assert reached[-1][1] == max_epochs
    assert all(one[1] == other[0] for one, other in pairwise(reached))


def test_preview_table_equals_what_a_fit_does() -> None:
    net = Net()
    schedule = FreezeSchedule(PHASES[:2] + PHASES[3:], verbose=False)
    rows = schedule.preview(net, 5, steps_per_epoch=6).rows
    seen: dict[int, tuple[int, int, set[int]]] = {}

    def start(run: Any, module: Any) -> None:
        trains = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(not m.training for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d))
        seen.setdefault(schedule.phase_index, (trains, frozen, set()))[2].add(run.current_epoch)

    trainer(callbacks=[schedule, Probe(start)], max_epochs=5).fit(net, loader())
    for index, (number, _, epochs, trains, share, frozen, _) in enumerate(rows):
        expected, held, within = seen[index]
        assert number == index + 1
        assert trains == str(expected)
        assert share == f"{100 * expected / 275:.1f} %"
        assert frozen == f"{held}/2"
        assert epochs == (f"{min(within)}-{max(within)}" if len(within) > 1 else f"{min(within)}")


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
    table = FreezeSchedule([*PHASES[:3], Phase("*", name="all", epochs=1)]).preview(Net(), 8, steps_per_epoch=6)
    assert [row[1:3] for row in table.rows] == [
        ("head", "0-1"),
        ("head, backbone.4", "2-3"),
        ("neck", "3-5, or until val_loss plateaus"),
        ("all", "5-7"),
    ]
    assert [row[6] for row in table.rows] == ["1", "backbone: 0.1", "1", "1"]
    short = FreezeSchedule(PHASES).preview(Net(), 2, steps_per_epoch=6)
    assert [row[2] for row in short.rows] == ["0-1", "never", "never", "never"]


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


@settings(max_examples=20, deadline=None)
@given(st.lists(ends, min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 8))
def test_plot_bars_cover_the_whole_fit(lengths: Any, steps_per_epoch: int, max_epochs: int) -> None:
    pytest.importorskip("matplotlib")
    phases = [Phase("head", epochs=e, steps=s, lr_scale=0.5) for e, s in lengths]
    figure = FreezeSchedule(phases).plot(Net(), max_epochs, steps_per_epoch=steps_per_epoch)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["backbone", "neck", "head"]
    for row in range(3):
        pale = [bar for bar in axes.patches if round(bar.get_y() + 0.4) == row][::2]  # each with its dark one on it
        assert sum(bar.get_width() for bar in pale) == pytest.approx(max_epochs)
        dark = [bar for bar in axes.patches if round(bar.get_y() + 0.4) == row][1::2]
        assert {bar.get_alpha() for bar in dark} == {float(row == 2)}
    assert axes.get_xlim() == (0, max_epochs)
    assert {text.get_text() for text in axes.texts} >= {"lr ×0.5", "head"}
    figure.canvas.draw()


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize("train_affine", [False, True])
def test_preview_counts_batchnorm_frozen_by_hand_as_the_fit_does(
    train_affine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The table says what the fit's own lines say, and the picture shows it."""
    net = Net()
    freeze_batchnorm(net, "backbone.5", train_affine=train_affine)
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    rows = schedule.preview(net, 2).rows
    assert [row[5] for row in rows] == ["2/2", "1/2"]
    with caplog.at_level(logging.INFO, "lightning_freeze"):
        trainer(callbacks=[schedule], max_epochs=2).fit(net, loader())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("phase")]
    for row, line in zip(rows, lines, strict=True):
        assert f"trains {row[3]} of " in line
        assert line.endswith(f"{row[5].replace('/', ' of ')} BatchNorm frozen")
    pytest.importorskip("matplotlib")
    (axes,) = schedule.plot(net, 2).axes
    assert any("%" in text.get_text() for text in axes.texts) == (not train_affine)
    with pytest.raises(ValueError, match="trains nothing") if not train_affine else contextlib.nullcontext():
        FreezeSchedule([Phase("backbone.5")]).preview(net, 2)


def test_plot_shows_dollar_signs_as_text() -> None:
    pytest.importorskip("matplotlib")
    net = nn.ModuleDict({"a$x$": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    schedule = FreezeSchedule(
        [Phase([r"re:a.*\d$|a.*$", "re:b.*$"], name=None, until=Plateau("$\\loss$")), Phase("*")][:1]
    )
    figure = schedule.plot(net, 2)
    figure.canvas.draw()  # it raises for a formula that is none
    texts = [*figure.axes[0].texts, *figure.axes[0].get_yticklabels()]
    assert not any(text.get_parse_math() for text in texts if "$" in text.get_text())


def test_plot_draws_into_axes_of_the_user() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    axes = figure_module.Figure().add_subplot()
    draw_schedule(axes, Plan.of(PHASES, Net(), 8, 6, "batchnorm"))
    texts = {text.get_text() for text in axes.texts}
    assert "neck (until val_loss plateaus)" in texts
    assert any("%" in text and "lr ×0.1" in text for text in texts)


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
        found = [(int(row[3]), int(row[5].partition("/")[0])) for row in table.rows]
        assert found == [fitted[index] for index in range(3)]
    assert attached == [str(before)] * 3  # also asked in mid-fit
    pytest.importorskip("matplotlib")
    figure = schedule.plot(net, 3, callbacks=callbacks)
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    dark = [bar for bar in figure.axes[0].patches if round(bar.get_y() + 0.4) == rows.index("target")][1::2]
    shares = [bar.get_alpha() for bar in dark]
    assert shares[:2] == [0.0, 0.0]
    assert (shares[2] == 0.0) == ("TargetNetwork" in str(list(map(type, callbacks))))


def test_the_example_of_byol() -> None:
    pytest.importorskip("sklearn")
    byol = importlib.import_module("examples.momentum_encoder").BYOL()
    schedule = FreezeSchedule([Phase("predictor", epochs=1), Phase("*")], verbose=False)
    follow, counts = TargetNetwork("online", "target", tau=0.02), list[str]()
    rows = schedule.preview(byol, 2, callbacks=[follow]).rows
    probe = Probe(lambda _, m: counts.append(f"{sum(p.numel() for p in m.parameters() if p.requires_grad):,}"))
    images = torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8))
    run = trainer(callbacks=[schedule, follow, probe], max_epochs=2)
    run.fit(byol, torch.utils.data.DataLoader(images, batch_size=8))
    assert [row[3] for row in rows] == counts
