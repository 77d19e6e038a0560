"""Law 3, rates that a phase says: ramps, and schedulers of its own, give each step the rate that a loop would set."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader

from lightning_freeze import FreezeSchedule, Phase, Ramp
from tests.laws.test_law5_resume_is_exact import Duel, SeededNet
from tests.nets import Net, Probe, adamw, data, loader, same, sgd, trainer
from tests.phased import rates_in_steps

STEPS = 6


def tensor_lr(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=torch.tensor(1e-2))


SCHEDULERS: dict[str, Any] = {
    "none": None,
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 30),
    "warm-up": lambda o: lrs.LinearLR(o, 0.1, total_iters=9),
}
RAMPS = {"backbone": Ramp(0.0, 0.5, steps=7, shape="cosine"), "neck": Ramp(0.1, epochs=1.5, shape="exponential")}


def loop(net: Net, phases: list[Phase], *, accumulate: int, epochs: int) -> dict[str, Any]:
    """Train as people do by hand: a group for each part, whose rate is multiplied around each step."""
    net.train()
    parts = [net.backbone, net.neck, net.head]
    optimizer = net.make_optimizer([{"params": list(part.parameters())} for part in parts])
    scheduler = net.make_scheduler(optimizer) if net.make_scheduler else None
    number = done = 0
    for epoch in range(epochs):
        phase = phases[min(epoch, 1)]
        done = 0 if epoch == 1 else done
        scales = [phase.scales.get(name, phase.scales.get("*", 1.0)) for name in ("backbone", "neck", "head")]
        lengths = [getattr(scale, "steps", None) or 1.5 * STEPS // accumulate for scale in scales]
        for part in parts:
            part.requires_grad_(phase.train == "*" or part is net.head)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(phase.train == "*")
        for place, (images, labels) in enumerate(DataLoader(data(), 4)):
            torch.manual_seed(number)
            number += 1
            (nn.functional.cross_entropy(net(images), labels) / accumulate).backward()
            if (place + 1) % accumulate:
                continue
            rates = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]
            for group, rate, scale, length in zip(optimizer.param_groups, rates, scales, lengths, strict=True):
                factor = scale.at(done / length) if isinstance(scale, Ramp) else scale
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if scheduler:
                scheduler.step()
    return net.state_dict()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", [adamw, sgd, tensor_lr])
def test_a_ramp_gives_the_weights_of_a_loop_that_sets_each_rate(
    optimizer: Any, scheduler: str, accumulate: int
) -> None:
    phases = [Phase("head", epochs=1, lr_scale=Ramp(0.5, steps=3)), Phase("*", lr_scale=RAMPS)]
    torch.manual_seed(0)
    net = SeededNet(optimizer, SCHEDULERS[scheduler], interval="step")
    expected = loop(copy.deepcopy(net), phases, accumulate=accumulate, epochs=4)
    run = trainer(callbacks=[FreezeSchedule(phases)], max_epochs=4, accumulate_grad_batches=accumulate)
    run.fit(net, loader())
    assert same(net.state_dict(), expected)


def factors(phases: list[Phase], part: str, *, net: Net | None = None, **options: Any) -> list[float]:
    """Return the factor of each step, of a fit at a rate of 1."""
    net = net or Net(lambda params: torch.optim.SGD(params, lr=1.0))
    with rates_in_steps(net) as rates:
        trainer(callbacks=[FreezeSchedule(phases)], **options).fit(net, loader(), loader())
    return [next(rate for name, rate in row.items() if name.startswith(part)) for row in rates]


def test_a_ramp_takes_its_phase_unless_it_says_how_long() -> None:
    head = Phase("head", steps=8)  # it ends in mid-epoch
    for phase, length in (
        (Phase("*", lr_scale=Ramp(0.0)), 2 * STEPS - 8),
        (Phase("*", epochs=1, lr_scale=Ramp(0.0)), STEPS - 2),
        (Phase("*", steps=3, lr_scale=Ramp(0.0)), 3),
        (Phase("*", lr_scale=Ramp(0.0, epochs=0.5)), STEPS / 2),
    ):
        seen = factors([head, phase, *([Phase("*")] if phase.has_end else [])], "neck", max_epochs=2)
        assert seen[8:] == [min(1.0, step / length) for step in range(4)]
    assert factors([Phase("*", lr_scale=Ramp(0.5))], "neck", max_epochs=9, max_steps=4) == [0.5, 0.625, 0.75, 0.875]


def test_a_ramp_takes_in_what_the_optimizer_was_not_given() -> None:
    net = Net(lambda params: torch.optim.SGD(list(params)[-2:], lr=1.0))
    phases = [Phase("head", steps=2), Phase("*", lr_scale={"backbone": Ramp(0.0, steps=4)})]
    assert factors(phases, "backbone", net=net, max_epochs=1)[2:] == [0.0, 0.25, 0.5, 0.75]


def test_a_ramp_counts_each_optimizers_steps() -> None:
    net = Duel()
    with rates_in_steps(net) as rates:
        phases = [Phase("*", steps=4), Phase("*", lr_scale=Ramp(0.0, steps=4))]
        trainer(callbacks=[FreezeSchedule(phases)], max_epochs=1).fit(net, loader())
    seen = [next(iter(row.values())) / (0.01 * 0.95 ** (step // 2)) for step, row in enumerate(rates)]
    assert seen == pytest.approx([1, 1, 1, 1, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_logged_rates_follow_the_ramp(tmp_path: Path) -> None:
    phases = [Phase("*", lr_scale={"neck": Ramp(0.0, steps=4)})]
    net = Net(lambda params: torch.optim.SGD(params, lr=1.0))
    logger = CSVLogger(tmp_path)
    trainer(callbacks=[FreezeSchedule(phases)], max_epochs=1, logger=logger, log_every_n_steps=1).fit(net, loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row["freeze/lr/neck"] for row in csv.DictReader(file)]
    assert [float(row) for row in rows if row] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


# Lightning's, of BatchNorm, which it does not freeze
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_the_line_for_what_backbonefinetuning_does(tmp_path: Path) -> None:
    """The factors when an epoch begins, as docs/migrating.md has them."""

    class Theirs(Net):
        def configure_optimizers(self) -> Any:
            return sgd(filter(lambda p: p.requires_grad, self.parameters()))

    theirs: list[float] = []

    def note(run: Trainer, _: Any) -> None:
        rates = [group["lr"] for group in run.optimizers[0].param_groups]
        theirs.append(rates[-1] / rates[0])

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1)
    trainer(callbacks=[finetuning, Probe(note)], max_epochs=6).fit(Theirs(sgd), loader())
    phases = [Phase("head", epochs=1), Phase("*", lr_scale={"backbone": Ramp(0.1, epochs=3.322, shape="exponential")})]
    assert factors(phases, "backbone", max_epochs=6)[STEPS::STEPS] == pytest.approx(theirs[STEPS::STEPS], rel=1e-3)
