"""Law 7: after the fit, however it ended, the model is as it was, but for what it learned."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import FeatureCache, FreezeBatchNorm, FreezeSchedule, GradientAudit, NormLogger, Phase
from tests.nets import Net, loader, moved, snapshot, trainer


class Stopping(Net):
    """Raises in its third epoch, in the middle of a phase that freezes."""

    error: type[BaseException] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.error is not None and self.current_epoch == 2 and batch_idx == 3:
            raise self.error("in mid-epoch")
        return super().training_step(batch, batch_idx)


def anatomy(net: nn.Module) -> dict[str, Any]:
    """What could stay behind: flags, modes, instance attributes, hooks and classes of every module, fixed storages."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    modules = {
        name: (
            type(module),
            module.training,
            sorted(module.__dict__),
            [len(getattr(module, hook)) for hook in hooks],
        )
        for name, module in net.named_modules()
        if name
    }
    parameters = {
        name: (p.requires_grad, type(p), bool(p._backward_hooks), p.untyped_storage().resizable())
        for name, p in net.named_parameters()
    }
    return {"modules": modules, "parameters": parameters}


@pytest.mark.parametrize("mode", ["batchnorm", "eval"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("by_hand", [False, True], ids=["all trainable", "partly frozen by hand"])
def test_as_it_was(error: type[BaseException] | None, mode: Any, by_hand: bool) -> None:
    net = Stopping()
    if by_hand:
        net.neck.requires_grad_(False)
    before = anatomy(net)
    net.error = error
    schedule = FreezeSchedule([Phase("*", epochs=1), Phase("head")], frozen_mode=mode)
    observers = [NormLogger(every_n_steps=1), GradientAudit(), FeatureCache("backbone")]
    run = trainer(callbacks=[FreezeBatchNorm("backbone.1"), schedule, *observers], max_epochs=4)
    if error is None:
        run.fit(net, loader(), loader())
    else:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else RuntimeError):
            run.fit(net, loader(), loader())
    assert anatomy(net) == before
    for optimizer in run.optimizers:
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(net.parameters()))]
        assert not any(vars(optimizer)[name] for name in vars(optimizer) if name.endswith("_hooks"))

    x = torch.randn(2, 2, 5, 5)
    net.eval()
    expected = net(x)
    net.trainer = None  # type: ignore[assignment]
    net.error = None
    copied = copy.deepcopy(net)
    assert torch.equal(pickle.loads(pickle.dumps(net.backbone))(x), net.backbone(x))
    assert torch.equal(copied(x), expected)
    program = torch.export.export(net.backbone, (x,))
    assert torch.allclose(program.module()(x), net.backbone(x))

    net.train()
    weights = snapshot(net)
    trainer(max_epochs=1).fit(net, loader(), loader())
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    still = {"backbone.0.bias", "backbone.4.bias"}  # in front of a BatchNorm: gradients of rounding size
    assert learned - moved(weights, snapshot(net)) <= still
    trainer(callbacks=[schedule], max_epochs=1).fit(net, loader(), loader())
    assert anatomy(net) == before


def test_the_model_pickles_and_copies_in_the_middle_of_a_fit() -> None:
    """What averages or evaluates copies of the model during the fit can go on doing so."""
    outputs = []

    class Copying(Net):
        def on_train_epoch_end(self) -> None:
            x = torch.randn(2, 2, 5, 5)
            for twin in (copy.deepcopy(self.backbone), pickle.loads(pickle.dumps(self.backbone))):
                twin.train()
                frozen = [layer.training for layer in twin.modules() if isinstance(layer, nn.BatchNorm2d)]
                outputs.append((frozen, torch.equal(twin.eval()(x), copy.deepcopy(self.backbone).eval()(x))))

    trainer(callbacks=[FreezeSchedule([Phase("head")])], max_epochs=2).fit(Copying(), loader(), loader())
    assert outputs == [([False, False], True)] * 4


def test_the_callback_does_not_keep_the_model_alive() -> None:
    net = Net()
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    run = trainer(callbacks=[schedule], max_epochs=2)
    run.fit(net, loader(), loader())
    watches = [weakref.ref(net.backbone), weakref.ref(net.head.weight)]
    del net, run, schedule.log, schedule.log_dict  # Lightning lends every callback the model's log functions
    gc.collect()
    assert [watch() for watch in watches] == [None, None]
