"""Laws 2 and 3: what trains requires grad, gets a gradient and is in one group; the groups are the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from lightning_freeze import FreezeSchedule, Phase, Plateau
from tests.nets import Net, Probe, adamw, loader, members, sgd, trainer
from tests.phased import rates_in_steps

LOW = ["backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "backbone.4.weight"]
LAYERS = ["backbone.0", "backbone.1", "backbone.4", "backbone.5", "neck", "head"]


def named_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([(f"p{i}", p) for i, p in enumerate(params)], lr=0.01)


def two_groups(params: Any) -> torch.optim.Optimizer:
    params = list(params)
    groups = [{"params": params[: len(LOW)], "lr": 0.02, "name": "low"}, {"params": params[5:], "name": "high"}]
    return torch.optim.AdamW(groups, lr=0.01)


def head_only(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(params)[-2:], lr=0.01)


def scales_some(scale: dict[str, float], train: list[str]) -> bool:
    """Whether a phase trains something that its scale names; another one is refused."""
    return "*" in scale or any(layer.startswith(tuple(scale)) for layer in train)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    phases=st.lists(
        st.tuples(
            st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4, unique=True),
            st.integers(1, 7),
            st.sampled_from([None, 0.5, {"*": 0.1}, {"head": 2.0}, {"backbone": 0.1, "backbone.4": 0.3}]),
        ),
        min_size=2,
        max_size=5,
    ),
    optimizer=st.sampled_from([adamw, sgd, named_sgd, two_groups, head_only]),
    accumulate=st.sampled_from([1, 3]),
)
@example(phases=[(["head"], 2, None), (["neck", "backbone.1"], 3, 0.5)], optimizer=head_only, accumulate=1)
def test_at_every_step_of_any_schedule(phases: Any, optimizer: Any, accumulate: int) -> None:
    built = [
        Phase(train, steps=steps, lr_scale=None if isinstance(scale, dict) and not scales_some(scale, train) else scale)
        for train, steps, scale in phases
    ]
    schedule = FreezeSchedule(built, verbose=False)
    shapes, seen = set(), [0]

    def end(trainer: Trainer, module: LightningModule) -> None:
        wanted = {
            name
            for name, _ in module.named_parameters()
            if any(name.startswith(f"{layer}.") for layer in schedule.phase.train)
        }
        trains = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert set(trains) == wanted
        assert all(p.grad is not None for p in trains.values())
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
        (held,) = trainer.optimizers
        assert len(members(held)) == len(set(members(held)))
        assert set(map(id, trains.values())) <= set(members(held))
        groups = held.param_groups
        shapes.add(tuple((len(group["params"]), group.get("name"), group["lr"]) for group in groups))
        assert all(len(group["param_names"]) == len(group["params"]) for group in groups if "param_names" in group)
        for name in trains if len(rates) > seen[-1] else ():
            factor = 1.0
            for select, value in schedule.phase.scales.items():
                factor = value if select == "*" or name.startswith(f"{select}.") else factor
            base = 0.02 if optimizer is two_groups and name in LOW else 0.01
            assert rates[-1][name] == pytest.approx(base * factor)
        seen.append(len(rates))

    net = Net(optimizer)
    fit = trainer(callbacks=[schedule, Probe(end=end)], max_epochs=3, accumulate_grad_batches=accumulate)
    with rates_in_steps(net) as rates:
        fit.fit(net, loader(40))
    assert len(shapes) == 1  # number, order, members, names and rates of the groups never change


def test_a_plateau_seen_inside_an_accumulation_window_waits_for_its_end() -> None:
    schedule = FreezeSchedule([Phase("head", until=Plateau("val_loss", patience=1, min_delta=9.0)), Phase("*")])
    seen = []
    probe = Probe(lambda trainer, _: seen.append((trainer.global_step, schedule.phase_index)))
    options = {"accumulate_grad_batches": 4, "val_check_interval": 3}
    trainer(callbacks=[schedule, probe], max_epochs=1, **options).fit(Net(), loader(48), loader())
    # Validation runs after batches 3, 6 and 9; the second look ends the phase, and the window then ends at batch 8.
    assert seen == [(step, int(step >= 2)) for step in range(3) for _ in range(4)]


def test_a_step_phase_begins_between_optimizer_steps_only() -> None:
    schedule = FreezeSchedule([Phase("head", steps=3), Phase("*")])
    seen = []
    probe = Probe(lambda trainer, _: seen.append((trainer.global_step, schedule.phase_index)))
    trainer(callbacks=[schedule, probe], max_epochs=2, accumulate_grad_batches=4).fit(Net(), loader(40))
    assert seen == [(step, int(step >= 3)) for step in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5)]
    assert schedule.history == [(0, 0, 0), (1, 3, 1)]
