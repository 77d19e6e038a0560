"""Law 1: what is frozen is bit-identical at the end of a phase to its start."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase
from tests.nets import Net, Probe, adamw, loader, moved, sgd, snapshot, trainer

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Disobedient(Net):
    """Calls train() where people do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train()
        self.backbone.train()
        return super().training_step(batch, batch_idx)


def fit_and_compare(net: Net, schedule: FreezeSchedule, **options: Any) -> list[tuple[int, set[str], set[str]]]:
    """Give for each phase: its index, the names that trained by flag, and the names that moved."""
    found: list[tuple[int, set[str], set[str]]] = []
    before: dict[str, Any] = {}

    def start(_: Trainer, module: LightningModule) -> None:
        if not found or found[-1][0] != schedule.phase_index:
            before.clear()
            before.update(snapshot(module))
            trains = {name for name, p in module.named_parameters() if p.requires_grad}
            found.append((schedule.phase_index, trains, set()))

    def end(_: Trainer, module: LightningModule) -> None:
        found[-1][2].update(moved(before, snapshot(module)))

    trainer(callbacks=[schedule, *options.pop("callbacks", []), Probe(start, end)], **options).fit(
        net, loader(), loader()
    )
    return found


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("net_class", [Net, Disobedient])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_only_what_trains_moves(optimizer: Any, net_class: type[Net], options: dict[str, Any]) -> None:
    schedule = FreezeSchedule(
        [
            Phase("*", epochs=1),  # momentum and Adam's moments are there when the backbone freezes
            Phase("head", epochs=1),
            Phase(["head", "neck", "backbone.4"], epochs=1, lr_scale=0.5),
            Phase("*", epochs=1),
            Phase("neck.bias"),
        ]
    )
    phases = fit_and_compare(net_class(optimizer), schedule, max_epochs=5, **options)
    assert [index for index, _, _ in phases] == [0, 1, 2, 3, 4]
    statistics = {f"backbone.{layer}.{name}" for layer in (1, 5) for name in STATISTICS}
    for index, trains, changed in phases:
        expected = trains | (statistics if index in (0, 3) else set())
        # A convolution in front of a BatchNorm gets no gradient for its bias: it may or may not move.
        assert changed <= expected
        assert expected - changed <= {"backbone.0.bias", "backbone.4.bias"}


@pytest.mark.parametrize("first", [True, False], ids=["schedule first", "batchnorm first"])
@pytest.mark.parametrize("train_affine", [True, False])
def test_batchnorm_stays_frozen_beside_a_schedule(first: bool, train_affine: bool) -> None:
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*", epochs=1), Phase("head")])
    frozen = FreezeBatchNorm(train_affine=train_affine)
    net = Disobedient()
    before = snapshot(net)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    trainer(callbacks=[schedule, frozen] if first else [frozen, schedule], max_epochs=3).fit(net, loader())
    changed = moved(before, snapshot(net))
    affine = {f"backbone.{layer}.{name}" for layer in (1, 5) for name in ("weight", "bias")}
    assert not {name for name in changed if name.endswith(STATISTICS)}
    assert affine & changed == (affine if train_affine else set())
    assert flags == {name: p.requires_grad for name, p in net.named_parameters()}
    assert all(module.training and "train" not in module.__dict__ for module in net.modules())


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("train", set()), ("batchnorm", {"1", "5"}), ("eval", {"", *map(str, range(8))})],
)
def test_frozen_mode(mode: Any, expected: set[str]) -> None:
    schedule = FreezeSchedule([Phase(["head", "neck"])], frozen_mode=mode)
    seen = []

    def start(_: Trainer, module: LightningModule) -> None:
        seen.append({name for name, m in module.backbone.named_modules() if not m.training})  # type: ignore[union-attr]
        assert module.training
        assert module.neck.training  # type: ignore[union-attr]

    net = Disobedient()
    trainer(callbacks=[schedule, Probe(start)], max_epochs=2).fit(net, loader(), loader())
    assert seen == [expected] * 12
    assert all(module.training for module in net.modules())
