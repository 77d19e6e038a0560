from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase
from lightning_freeze.freezing.callback import refuse_new_statistics
from tests.nets import Net, Probe, averaging, loader, moved, sgd, snapshot, trainer

AFFINE = {f"backbone.{layer}.{name}" for layer in (1, 5) for name in ("weight", "bias")}
STATISTICS = {
    f"backbone.{layer}.{name}" for layer in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")
}


@pytest.mark.parametrize("train_affine", [False, True])
@pytest.mark.parametrize(
    "select", ["*", "backbone", "type:BatchNorm2d", ["backbone", "!backbone.5"], "backbone.5"], ids=str
)
def test_only_selected_layers_keep_their_statistics_and_affine_parameters(select: Any, train_affine: bool) -> None:
    net = Net(sgd)
    before = snapshot(net)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    layers = {"backbone.1": [1], "backbone.5": [5]}.get(str(select), [1] if isinstance(select, list) else [1, 5])
    held = tuple(f"backbone.{layer}." for layer in layers)
    seen = []
    probe = Probe(lambda _, module: (module.train(), seen.append([m.training for m in module.backbone])))
    callback = FreezeBatchNorm(select, train_affine=train_affine)
    trainer(callbacks=[callback, probe], max_epochs=2).fit(net, loader(), loader())
    changed = moved(before, snapshot(net))
    assert {name for name in STATISTICS if name not in changed} == {n for n in STATISTICS if n.startswith(held)}
    still = set() if train_affine else {name for name in AFFINE if name.startswith(held)}
    assert AFFINE - changed == still
    assert seen == [[layer not in layers for layer in range(8)]] * 12
    assert flags == {name: p.requires_grad for name, p in net.named_parameters()}
    assert all(module.training and "train" not in module.__dict__ for module in net.modules())


def test_two_freeze_batchnorms_freeze_what_either_selects() -> None:
    net = Net(sgd)
    before = snapshot(net)
    callbacks = [FreezeBatchNorm("backbone.1"), FreezeBatchNorm("backbone", train_affine=True)]
    trainer(callbacks=callbacks, max_epochs=2).fit(net, loader())
    changed = moved(before, snapshot(net))
    assert not STATISTICS & changed
    assert AFFINE - changed == {"backbone.1.weight", "backbone.1.bias"}
    assert all(p.requires_grad for p in net.parameters())


class Failing(Net):
    """Raises in the sanity validation or in mid-fit."""

    fails: str | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails == "in mid-fit" and (self.current_epoch, batch_idx) == (1, 2):
            raise RuntimeError(self.fails)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fails == "in validation":
            raise RuntimeError(self.fails)


@pytest.mark.parametrize("fails", [None, "in mid-fit", "in validation"])
@pytest.mark.parametrize("phases", [["*", "head"], ["head", "*"], ["*", ["*", "!backbone.1"]]], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_affine_parameters_frozen_by_hand_stay_frozen_under_a_schedule(
    swapped: bool, phases: Any, fails: str | None
) -> None:
    """Also where a phase selects them: neither order of the callbacks lets them train, in the fit or after it."""
    net = Failing(sgd)
    net.backbone[1].requires_grad_(False)
    net.backbone[5].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    before = snapshot(net)
    callbacks = [FreezeSchedule([Phase(phases[0], epochs=1), Phase(phases[1])]), FreezeBatchNorm("backbone")]
    for net.fails in (fails, None, fails):
        net.train()  # an error in validation leaves it in eval mode
        run = trainer(callbacks=callbacks[::-1] if swapped else callbacks, max_epochs=2, num_sanity_val_steps=1)
        if net.fails:
            with pytest.raises(RuntimeError, match=net.fails):
                run.fit(net, loader(), loader())
        else:
            run.fit(net, loader(), loader())
        assert flags == {name: p.requires_grad for name, p in net.named_parameters()}
        assert all("train" not in module.__dict__ for module in net.modules())
    assert not (AFFINE | STATISTICS) & moved(before, snapshot(net))


@pytest.mark.parametrize("swapped", [False, True])
def test_later_phase_of_frozen_layers_only_is_refused_at_fit_start(swapped: bool) -> None:
    callbacks = [FreezeSchedule([Phase("head", epochs=1), Phase("backbone.1", name="norm")]), FreezeBatchNorm()]
    run = trainer(callbacks=callbacks[::-1] if swapped else callbacks)
    with pytest.raises(ValueError, match=r"Phase 'norm' trains nothing: all it selects is .*train_affine=True"):
        run.fit(Net(), loader(), loader())
    assert run.global_step == 0


def test_empty_selector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"FreezeBatchNorm\(select=\[\]\) is an empty list"):
        FreezeBatchNorm([])


def test_selector_from_a_generator_works_twice() -> None:
    net = Net(sgd)
    callback = FreezeBatchNorm(name for name in ("backbone", "!backbone.5"))
    assert callback.select == ["backbone", "!backbone.5"]
    before = snapshot(net)
    trainer(callbacks=[callback], max_epochs=1).fit(net, loader())
    assert AFFINE - moved(before, snapshot(net)) == {"backbone.1.weight", "backbone.1.bias"}


def test_state_key_is_the_same_in_every_run() -> None:
    """The key by which a checkpoint knows the callback does not depend on the run."""
    callback = FreezeBatchNorm(["backbone", lambda name, _: True])
    assert callback.state_key == FreezeBatchNorm(["backbone", lambda name, _: True]).state_key
    assert "0x" not in callback.state_key


def test_fit_in_which_a_frozen_layer_is_replaced_ends_without_an_error() -> None:
    class Exchanging(Net):
        def on_train_end(self) -> None:
            self.backbone = nn.Identity()  # type: ignore[assignment]

    trainer(callbacks=[FreezeBatchNorm("backbone.1")], max_epochs=1).fit(Exchanging(), loader())


def test_model_without_batchnorm_trains() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(2, 4, 3)  # type: ignore[assignment]

    trainer(callbacks=[FreezeBatchNorm()], max_epochs=1).fit(Plain(), loader())


def test_training_equals_a_loop_with_layers_in_eval_mode_to_the_bit() -> None:
    """Frozen BatchNorm is BatchNorm in eval mode, to the bit."""
    torch.manual_seed(0)
    net = Net(sgd)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    other = copy.deepcopy(net)
    trainer(callbacks=[FreezeBatchNorm()], max_epochs=2).fit(net, loader())
    optimizer = other.configure_optimizers()
    for layer in (other.backbone[1], other.backbone[5]):
        layer.eval().requires_grad_(False)
    for _ in range(2):
        for images, labels in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(images), labels).backward()
            optimizer.step()
    assert not moved(snapshot(net), snapshot(other))


def test_weight_averaging_is_refused_only_where_it_resets_statistics() -> None:
    swa = trainer(callbacks=[StochasticWeightAveraging(0.1)])
    with pytest.raises(MisconfigurationException, match="has Me and StochasticWeightAveraging"):
        refuse_new_statistics(swa, nn.Sequential(nn.BatchNorm1d(2)), "Me")
    refuse_new_statistics(swa, nn.LayerNorm(2), "Me")
    refuse_new_statistics(trainer(callbacks=[averaging()()]), nn.BatchNorm1d(2), "Me")
