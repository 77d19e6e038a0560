from __future__ import annotations

import math
import sys
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torchvision
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from torch import nn

from lightning_freeze import (
    FreezeBatchNorm,
    FreezeSchedule,
    Phase,
    Plateau,
    Ramp,
    TargetNetwork,
    chain_thaw,
    freeze,
    gradual_unfreezing,
    layerwise_sampling,
    linear_probe_then_finetune,
)
from lightning_freeze.schedule.plan import Plan
from lightning_freeze.schedule.plot import FROZEN, Colours, draw_schedule, rows_of
from lightning_freeze.schedule.preset import phases_for
from tests.nets import Net, adamw, loader, trainer


class Transformer(nn.Module):
    """An embedding, 24 blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.position = nn.Parameter(torch.zeros(1, 32, 64))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(64, 2, 128) for _ in range(24))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)


class Gan(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)) for _ in range(5)))
        self.discriminator = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(6)), nn.Linear(8, 1))


def detector() -> nn.Module:
    return torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)


RESNET = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
BLOCKS = [f"blocks.{number}" for number in range(24)]
STEM = [f"!backbone.body.{name}" for name in ("conv1", "bn1", "layer1")]
PICTURES: dict[str, tuple[Any, list[Phase], dict[str, Any]]] = {
    "LP-FT": (
        torchvision.models.resnet50,
        linear_probe_then_finetune("fc", probe_epochs=2, backbone_scale=0.1),
        {"max_epochs": 6},
    ),
    "gradual, ResNet-50": (
        torchvision.models.resnet50,
        gradual_unfreezing(RESNET, lr_decay=2.6),
        {"max_epochs": 10},
    ),
    "gradual, 24 blocks": (
        Transformer,
        gradual_unfreezing(["embed", *BLOCKS, "head"], lr_decay=1.2),
        {"max_epochs": 30},
    ),
    "chain-thaw": (torchvision.models.resnet50, chain_thaw(RESNET), {"max_epochs": 12}),
    "LISA": (
        Transformer,
        layerwise_sampling(BLOCKS, ["embed", "head"], total_steps=800),
        {"max_steps": 800},
    ),
    "detection": (
        detector,
        [
            Phase("roi_heads", epochs=1, name="the box head alone"),
            Phase(["roi_heads", "rpn", "backbone.fpn"], epochs=2, lr_scale={"backbone": 0.3}),
            Phase(["*", *STEM], name="all but the stem", lr_scale={"backbone.body": Ramp(0.01, 0.1, epochs=2)}),
        ],
        {"max_epochs": 8},
    ),
    "GAN": (
        Gan,
        [
            Phase("discriminator", epochs=1),
            Phase("*", until=Plateau("a metric with a long name"), lr_scale={"discriminator": 4.0}),
            Phase(["*", "!discriminator.0", "!discriminator.1"], name="freeze the discriminator's first layers"),
        ],
        {"max_epochs": 8},
    ),
}


@cache
def picture(name: str) -> Figure:
    make, phases, limits = PICTURES[name]
    with torch.device("meta"):
        model = make()
    return FreezeSchedule(phases).plot(model, **limits)


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_of_a_picture_lies_over_another(name: str) -> None:
    figure = picture(name)
    for inches in (9, 16):  # 900 and 1600 pixels
        figure.set_figwidth(inches)
        figure.draw_without_rendering()
        texts = [text for axes in figure.axes for text in texts_of(axes)]
        boxes = [text.get_window_extent() for text in texts]
        assert len(texts) > 8
        for (one, box), (other, beside) in combinations(zip(texts, boxes, strict=True), 2):
            assert not box.overlaps(beside), (inches, one.get_text(), other.get_text())
        for text, box in zip(texts, boxes, strict=True):
            inside = figure.bbox.padded(1)
            assert inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1), text.get_text()  # noqa: PT018


def test_names_for_which_there_is_no_room_are_left_out() -> None:
    names = [f"{number}" for number in range(4)]
    phases = layerwise_sampling(names, total_steps=4000, count=1)
    figure = FreezeSchedule(phases).plot(nn.Sequential(*(nn.Linear(1, 1) for _ in names)), max_steps=4000)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert 20 < len(boxes) < len(phases)
    assert all(one.x1 <= other.x0 for one, other in pairwise(boxes))


def texts_of(axes: Any) -> list[Any]:
    legend, found = axes.get_legend(), [*axes.texts, axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())  # no other tick is drawn
        found += [
            t for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high for t in (tick.label1, tick.label2)
        ]
    found += [text for child in axes.child_axes for text in texts_of(child)]
    found += legend.get_texts() if legend else []
    return [text for text in found if text.get_text() and text.get_visible()]


def test_layers_that_do_the_same_are_one_row() -> None:
    def labels(name: str) -> list[str]:
        return [label.get_text() for label in picture(name).axes[0].get_yticklabels()]

    assert labels("LP-FT") == ["conv1 … layer4", "fc"]
    assert labels("gradual, ResNet-50") == RESNET
    assert labels("gradual, 24 blocks") == ["position", "embed", *BLOCKS, "norm", "head"]
    assert labels("GAN") == ["generator", "discriminator[0:2]", "discriminator[2:7]"]
    assert labels("detection") == [
        "backbone.body.conv1 … layer1",
        "backbone.body.layer2…4",
        "backbone.fpn",
        "rpn",
        "roi_heads",
    ]


def test_rows_stay_few_where_every_layer_has_parts_that_differ() -> None:
    with torch.device("meta"):
        net = torchvision.models.resnet50()
    plan = Plan.of(FreezeSchedule([Phase("*")]), net, 3, callbacks=[FreezeBatchNorm("*")])
    rows = rows_of(plan)
    assert [row.label for row in rows] == ["conv1", "bn1", "layer1…4 (in parts)", "fc"]
    assert [len(row.courses) for row in rows] == [1, 1, 2, 1]
    plan = Plan.of(FreezeSchedule([Phase("*.bias")]), net, 3)
    assert [row.label for row in rows_of(plan)] == ["conv1", "bn1 … fc (in parts)"]
    gradual = FreezeSchedule([Phase(["layer4", "fc"], epochs=1), Phase("*")])
    rows = rows_of(Plan.of(gradual, net, 3, callbacks=[FreezeBatchNorm("*")]))
    assert [row.label for row in rows] == ["conv1", "bn1", "layer1…3 (in parts)", "layer4[0:3] (in parts)", "fc"]
    with torch.device("meta"):
        towers = nn.ModuleDict({name: nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))) for name in "ab"})
    phases = [Phase(["a.3", "b.3"], epochs=1), Phase(["a", "b"])]
    rows = rows_of(Plan.of(FreezeSchedule(phases), towers, 3))
    assert [row.label for row in rows] == ["a[0:3]", "a.3", "b[0:3]", "b.3"]


def colours_drawn(axes: Any, plan: Plan, name: str, position: float) -> set[str]:
    """The colours at a position in the band of a parameter."""
    row, courses = next(
        (place, list(row.courses))
        for place, row in enumerate(rows_of(plan))
        if any(name == layer or name.startswith(f"{layer}.") for layer in row.layers)
    )
    bands = [one for one in axes.collections if isinstance(one, PolyCollection)]
    bands = [band for band in bands if round(band.get_paths()[0].get_extents().y0 + 0.42) == row or len(courses) > 1]
    tops = sorted((one for one in bands if row - 0.5 < one.get_paths()[0].get_extents().y0 < row + 0.5), key=top)
    assert len(tops) == len(courses)
    band = tops[courses.index(plan.course(name))]
    found = zip(band.get_paths(), band.get_facecolors(), strict=True)
    return {to_hex(colour) for path, colour in found if path.get_extents().x0 <= position < path.get_extents().x1}


def top(band: PolyCollection) -> float:
    return float(band.get_paths()[0].get_extents().y0)


TRUTHS: dict[str, tuple[list[Phase], list[Any]]] = {
    "scales": (
        [
            Phase("head", epochs=1),
            Phase(["head", "neck", "backbone.4"], epochs=2, lr_scale={"backbone": 0.1, "neck": 0.3}),
            Phase("*", lr_scale={"*": 0.5, "head": 1.0}),
        ],
        [],
    ),
    "frozen again": ([Phase("*", epochs=1), Phase("neck", epochs=1, lr_scale=2.0), Phase(["*", "!*.bias"])], []),
    "steps": ([Phase("head", steps=4), Phase("neck", steps=5, lr_scale=0.2), Phase("*")], []),
    "plateau": ([Phase("head", until=Plateau("val_loss", patience=1, mode="max")), Phase("*", lr_scale=0.5)], []),
    "fractions": (
        [
            Phase("head", fraction=1 / 3),
            Phase("neck", fraction=0.1),
            Phase(["head", "neck"], fraction=0.3, lr_scale=0.3),
        ],
        [],
    ),
    "the last phase ends": ([Phase("head", epochs=1), Phase("*", epochs=2, lr_scale=0.5)], []),
    "ramps": (
        [
            Phase("head", epochs=1, lr_scale=Ramp(0.2)),
            Phase(["head", "neck"], epochs=2, lr_scale={"neck": Ramp(0.01, 0.5, epochs=1, shape="exponential")}),
            Phase("*", lr_scale={"*": Ramp(0.0, steps=3), "head": 1.0}),
        ],
        [],
    ),
    "BatchNorm": ([Phase("head", epochs=1), Phase("*")], [FreezeBatchNorm("*")]),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_colours_of_a_picture_are_what_the_fit_did(name: str) -> None:
    phases, callbacks = TRUTHS[name]
    net, did = Net(adamw), list[dict[str, float | None]]()

    def note(optimizer: Any, *_: Any) -> None:
        rates = {id(p): group["lr"] / 0.01 for group in optimizer.param_groups for p in group["params"]}
        did.append({n: rates[id(p)] if p.grad is not None else None for n, p in net.named_parameters()})

    configure = net.configure_optimizers
    net.configure_optimizers = lambda: hooked(configure(), note)  # type: ignore[method-assign]
    schedule = FreezeSchedule(phases, verbose=False)
    before = schedule.plot(net, 4, steps_per_epoch=6, callbacks=callbacks)
    plan = Plan.of(schedule, net, 4, None, 6, callbacks)
    trainer(callbacks=[schedule, *callbacks]).fit(net, loader(), loader(4))
    did = [step for step in did if any(step.values())]  # a throw-away optimizer tries what it is asked for
    assert len(did) == plan.end
    went, after = Plan.of(schedule, net, happened=True), schedule.plot(net)
    assert went.happened
    for figure, one, steps in ((before, plan, 6), (after, went, 1)):
        if one is plan and name == "plateau":  # nobody can foresee when it comes
            continue
        axes, colours = figure.axes[0], Colours.of(one)
        for step, rates in enumerate(did):
            for parameter, rate in rates.items():
                drawn = colours_drawn(axes, one, parameter, (step + 0.5) / steps)
                expected = colours(math.nan if rate is None else round(rate, 9))
                assert drawn == {expected}, (step, parameter, rate)
    assert after.axes[-1].get_xlabel() == "optimizer step, as the fit went"


def hooked(optimizer: torch.optim.Optimizer, hook: Any) -> torch.optim.Optimizer:
    optimizer.register_step_post_hook(hook)
    return optimizer


def test_the_faster_the_darker_and_frozen_is_none_of_these() -> None:
    colours = Colours([0.01, 1.0])
    light = [sum(to_rgb(colours(factor))) for factor in (0.0, 0.01, 0.1, 0.3, 1.0)]
    assert light[0] == light[1] > light[2] > light[3] > light[4]
    assert sum(to_rgb(FROZEN)) > light[0] + 0.5


def test_every_phase_has_its_name_above_it() -> None:
    for name, (make, phases, _) in PICTURES.items():
        with torch.device("meta"):
            phases = phases_for(phases, make(), ())
        names = [text.get_text().replace("\n", " ") for text in picture(name).axes[0].texts]
        assert len(names) == len(phases), name
        assert names[0].startswith(phases[0].label[:10])


def test_labels_of_the_legend_are_rates_that_there_are() -> None:
    legend = picture("GAN").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["lr ×4", "lr ×1", "frozen"]
    legend = picture("detection").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["lr ×1", "lr ×0.3", "lr ×0.1", "lr ×0.01", "frozen"]
    assert [text.get_text() for text in picture("LISA").axes[0].get_legend().get_texts()] == ["trains", "frozen"]


def test_the_curve_below_shows_a_ramp_of_the_optimizers_rate() -> None:
    net = Net()
    figure = FreezeSchedule([Phase("head", epochs=1), Phase("*", lr_scale={"backbone": Ramp(0.1, epochs=2)})]).plot(
        net, 5
    )
    _, rates = figure.axes
    points = [tuple(point) for line in rates.collections for path in line.get_paths() for point in path.vertices]
    assert {(1.0, 0.001), (3.0, 0.01), (5.0, 0.01)} <= {(round(x, 6), round(y, 6)) for x, y in points}
    middle = min(points, key=lambda point: abs(point[0] - 2.0))
    assert middle[1] == pytest.approx(0.0055, abs=0.0001)
    assert rates.get_ylabel() == "learning rate"
    figure = FreezeSchedule([Phase("*", lr_scale=Ramp(0.1))]).plot(net.backbone, 5)
    assert figure.axes[1].get_ylabel() == "factor on the\nlearning rate"  # no optimizer says on which


def test_the_curve_below_shows_what_schedulers_do() -> None:
    def halves(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    figure = FreezeSchedule([Phase("*")]).plot(Net(scheduler=halves), 3)
    points = [path.vertices for line in figure.axes[1].collections for path in line.get_paths()]
    seen = {(float(x), float(y)) for vertices in points for x, y in vertices}
    assert seen == {(0.0, 0.01), (1.0, 0.01), (1.0, 0.005), (2.0, 0.005), (2.0, 0.0025), (3.0, 0.0025)}


def test_a_picture_shows_in_a_notebook_without_pyplot() -> None:
    figure = FreezeSchedule([Phase("head")]).plot(Net(), 2)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    formatters = pytest.importorskip("IPython.core.formatters")
    assert formatters.DisplayFormatter().format(figure)[0]["image/png"].startswith(b"\x89PNG")


def test_plot_shows_dollar_signs_as_text() -> None:
    net = nn.ModuleDict({"a$x$": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    figure = FreezeSchedule([Phase([r"re:a.*\d$|a.*$", "re:b.*$"], until=Plateau("$\\loss$"))]).plot(net, 2)
    figure.canvas.draw()  # it raises for a formula that is none
    texts = [*figure.axes[0].texts, *figure.axes[0].get_yticklabels()]
    assert any("$" in text.get_text() for text in texts)
    assert not any(text.get_parse_math() for text in texts if "$" in text.get_text())


def test_plot_draws_into_axes_of_the_user() -> None:
    axes = Figure(figsize=(12, 3)).add_subplot()
    phases = [Phase("head", epochs=2), Phase("neck", until=Plateau("val_loss")), Phase("*", lr_scale=0.1)]
    draw_schedule(axes, Plan.of(FreezeSchedule(phases), Net(), 8))
    assert [text.get_text() for text in axes.texts] == ["head", "neck (until val_loss plateaus)", "*"]
    assert axes.get_xlim() == (0, 8)


def test_what_a_target_network_keeps_frozen_or_came_frozen_is_drawn_frozen() -> None:
    net = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("online", "target", "teacher")})
    freeze(net, "teacher")
    follow = TargetNetwork("online", "target", tau=0.1)
    plan = Plan.of(FreezeSchedule([Phase("*")]), net, 3, callbacks=[follow])
    assert [(row.label, list(row.courses)) for row in rows_of(plan)] == [
        ("online", [(1.0,)]),
        ("target, teacher", [(None,)]),
    ]
