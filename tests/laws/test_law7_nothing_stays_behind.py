"""Law 7: after the fit, however it ended, the model is as it was, but for what it learned."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_freeze import (
    FeatureCache,
    FreezeBatchNorm,
    FreezeSchedule,
    GradientAudit,
    NormLogger,
    Phase,
    freeze_batchnorm,
    unfreeze_batchnorm,
)
from lightning_freeze.freezing.eval_mode import is_held
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
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
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


def by_torch(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": by_torch,
    "a copy of a copy": lambda module: by_torch(copy.deepcopy(module)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("part", ["backbone", ""])
@pytest.mark.parametrize("mode", ["batchnorm", "eval"])
@pytest.mark.parametrize("by", ["schedule", "batchnorm"])
def test_a_copy_made_in_the_middle_of_a_fit(by: str, mode: Any, part: str, way: str) -> None:
    """It gives the same outputs, belongs to no fit, so that train() trains its BatchNorm, and leaves the fit alone."""
    copies = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            module = pl_module.get_submodule(part)
            twin = COPIES[way](module)
            assert [m.training for m in twin.modules()] == [m.training for m in module.modules()]
            x = torch.randn(2, 2, 5, 5)
            assert torch.equal(copy.deepcopy(twin).eval()(x), copy.deepcopy(module).eval()(x))
            assert not net.backbone[1].training
            copies.append(twin)

    net = Net()
    net.backbone[5].eval()
    callbacks = {
        "schedule": [FreezeSchedule([Phase("head", epochs=1), Phase(["head", "neck"])], frozen_mode=mode)],
        "batchnorm": [FreezeBatchNorm()],
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eval mode.*")
        trainer(callbacks=[*callbacks[by], Copies()], max_epochs=2, limit_train_batches=2).fit(net, loader())
    assert len(copies) == 4
    for twin in copies:
        assert not any(is_held(module) for module in twin.modules())
        assert all(module.training for module in twin.train().modules())
        assert not any(module.training for module in twin.eval().modules())
        before = snapshot(twin)
        twin.train()(torch.randn(2, 2, 5, 5))
        assert sum("running_mean" in name for name in moved(before, snapshot(twin))) == 2
        copy.deepcopy(twin), pickle.dumps(twin)


def test_a_copy_of_what_is_frozen_by_hand_stays_frozen() -> None:
    """The hold of a fit does not travel, that of freeze_batchnorm does, with the flags it found."""
    copies = []

    class Copying(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            copies.extend([copy.deepcopy(self.backbone), by_torch(self.backbone)])

    net = Copying()
    freeze_batchnorm(net, "backbone.1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eval mode.*")
        callbacks = [FreezeBatchNorm(), FreezeSchedule([Phase("*")])]
        trainer(callbacks=callbacks, max_epochs=1, limit_train_batches=1).fit(net, loader())
    for twin in copies:
        twin.train()
        assert [twin[1].training, twin[5].training] == [False, True]
        assert list(unfreeze_batchnorm(twin)) == ["1"]
        assert twin[1].training
        assert twin[1].weight.requires_grad


def test_the_callback_does_not_keep_the_model_alive() -> None:
    net = Net()
    schedule = FreezeSchedule([Phase("head", epochs=1), Phase("*")])
    run = trainer(callbacks=[schedule], max_epochs=2)
    run.fit(net, loader(), loader())
    watches = [weakref.ref(net.backbone), weakref.ref(net.head.weight)]
    del net, run, schedule.log, schedule.log_dict  # Lightning lends every callback the model's log functions
    gc.collect()
    assert [watch() for watch in watches] == [None, None]
