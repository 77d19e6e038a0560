from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, Subset

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Plateau
from lightning_freeze.freezing.strategies import check_strategy
from lightning_freeze.ranks import mean_over_ranks
from tests.devices import Even, Hooked, Watch, share
from tests.nets import Net, Probe, data, loader, same, sgd, snapshot, trainer
from tests.replicas import WORLD, on_two_processes


def unbuilt(cls: type[Strategy]) -> Strategy:
    """A strategy whose library or hardware is not here; only its class matters."""
    strategy = object.__new__(cls)
    strategy.kwargs = {}  # type: ignore[attr-defined]
    return strategy


class OfMyOwn(Strategy):
    """Knows nothing."""


OfMyOwn.__abstractmethods__ = frozenset()


class MyDDP(DDPStrategy):
    """A strategy of a user, as an extension of one that is known."""


class MyDeepSpeed(DeepSpeedStrategy):
    """Of one that is not supported."""


@pytest.mark.parametrize("cls", [DeepSpeedStrategy, MyDeepSpeed, XLAStrategy, OfMyOwn])
def test_strategy_that_cannot_freeze_exactly_is_refused_by_name(cls: type[Strategy]) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{cls.__name__}.* Use one device, strategy='ddp', Model"):
        check_strategy(unbuilt(cls))


def test_strategy_of_pytorch_lightning_is_refused_with_the_right_import() -> None:
    theirs = type("DDPStrategy", (OfMyOwn,), {"__module__": "pytorch_lightning.strategies.ddp"})
    for cls in (theirs, type("MyDDP", (theirs,), {})):
        with pytest.raises(
            MisconfigurationException, match=r"Import Trainer and LightningModule from lightning\.pytorch"
        ):
            check_strategy(unbuilt(cls))


@pytest.mark.parametrize("cls", [SingleDeviceStrategy, DDPStrategy, MyDDP, FSDPStrategy, ModelParallelStrategy])
def test_supported_strategies_and_their_subclasses_are_accepted(cls: type[Strategy]) -> None:
    check_strategy(unbuilt(cls))


def test_fsdp_with_flat_parameters_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Use FSDPStrategy\(use_orig_params=True\)"):
        check_strategy(FSDPStrategy(use_orig_params=False))
    check_strategy(FSDPStrategy())


def test_unsupported_strategy_is_refused_at_fit_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for callback in (FreezeSchedule([Phase("head")]), FreezeBatchNorm()):
        run = trainer(callbacks=[callback])
        run.strategy.__class__ = type("XLAStrategy", (SingleDeviceStrategy, OfMyOwn), {})
        monkeypatch.setattr("lightning_freeze.freezing.strategies._UNSUPPORTED", (OfMyOwn,))
        with pytest.raises(MisconfigurationException, match="with XLAStrategy"):
            run.fit(Net(), loader())


def test_flags_and_modes_return_after_lightning_has_reverted_sync_batchnorm() -> None:
    """Lightning puts other layers in the place of SyncBatchNorm when the fit ends, before callbacks are torn down."""
    net, sync = Net(), TorchSyncBatchNorm()
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    callback = FreezeBatchNorm()
    run = trainer(callbacks=[callback])
    sync.apply(net)
    callback.on_fit_start(run, net)
    assert not net.backbone[1].weight.requires_grad
    sync.revert(net)
    callback.teardown(run, net, "fit")
    assert flags == {name: p.requires_grad for name, p in net.named_parameters()}
    assert all(module.training and "train" not in module.__dict__ for module in net.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning allows FSDPStrategy on a GPU only")
def test_fsdp_on_a_gpu_trains_as_one_device_does() -> None:
    results = []
    for strategy in ("auto", FSDPStrategy(auto_wrap_policy={torch.nn.Linear, torch.nn.Conv2d})):
        torch.manual_seed(0)
        net = Even()
        schedule = FreezeSchedule(
            [Phase("head", steps=3), Phase("*", steps=4), Phase(["neck.bias", "backbone"], steps=3), Phase("*")],
            verbose=False,
        )
        callbacks = [schedule, FreezeBatchNorm(train_affine=True)]
        trainer(callbacks=callbacks, strategy=strategy, accelerator="gpu", max_epochs=3).fit(net, loader())
        results.append(snapshot(net.cpu()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5)


# On two processes: every function below runs on both, in one pair of them; what it gives is checked after.


def fifty_rebuilds() -> dict[str, Any]:
    """Rebuild the wrapper between every two steps, while somebody holds on to the first one."""
    wrappers: list[Any] = []
    reducers: list[Any] = []
    alive: list[tuple[int, int, int]] = []
    views: list[bool] = []
    kept: list[Any] = []
    watch = Watch()

    def start(trainer: Trainer, module: LightningModule) -> None:
        # Gradients are views into the reducer's buckets: of the new one, which are not larger than what trains.
        sizes = [p.grad.untyped_storage().nbytes() for p in module.parameters() if p.grad is not None]
        views.extend(size > sum(p.nbytes for p in module.parameters() if p.requires_grad) for size in sizes)
        model = trainer.strategy.model
        wrappers.append(weakref.ref(model))
        reducers.append(weakref.ref(model.reducer))
        if not kept:
            kept.append(model)
        gc.collect()
        objects = sum(isinstance(thing, torch.Tensor | torch.nn.Module) for thing in gc.get_objects())
        alive.append((sum(ref() is not None for ref in wrappers), sum(ref() is not None for ref in reducers), objects))

    phases = [Phase("head" if index % 2 else "*", steps=1) for index in range(54)]
    strategy = Hooked(gradient_as_bucket_view=True)
    strategy.watch = watch
    schedule = FreezeSchedule(phases, verbose=False)
    run = trainer(
        callbacks=[schedule, watch, Probe(start)],
        strategy=strategy,
        devices=WORLD,
        max_epochs=9,
        use_distributed_sampler=False,
    )
    gc.collect()
    gc.freeze()  # what is there already need not be looked at in every step
    run.fit(Even(optimizer=sgd), share())
    gc.unfreeze()
    return {
        "alive": alive,
        "old views": any(views),
        "rebuilds": len(schedule.history),
        "doubled": watch.travelled != watch.trains,
        "differ": watch.differ,
    }


def by_hand() -> dict[str, Any]:
    """A hook that the user registered on the wrapper is on the next one too, and PowerSGD starts over."""
    calls: list[int] = []
    iters: list[int] = []

    def counted(state: Any, bucket: dist.GradBucket) -> Any:
        calls.append(state)
        return allreduce_hook(None, bucket)

    counted.__annotations__ = {"bucket": dist.GradBucket}

    class Registers(Even):
        def on_train_start(self) -> None:
            self.trainer.strategy.model.register_comm_hook(7, counted)

    phases = [Phase("head", steps=3), Phase("*", steps=5), Phase("neck")]
    options = {"devices": WORLD, "max_epochs": 2, "use_distributed_sampler": False}
    run = trainer(callbacks=[FreezeSchedule(phases, verbose=False)], strategy=DDPStrategy(), **options)
    run.fit(Registers(), share())
    state = PowerSGDState(None, 1, start_powerSGD_iter=3)
    strategy = Hooked(ddp_comm_state=state, ddp_comm_hook=powerSGD_hook)
    probe = Probe(lambda *_: iters.append(state.iter))
    trainer(callbacks=[FreezeSchedule(phases, verbose=False), probe], strategy=strategy, **options).fit(Even(), share())
    return {"calls": calls, "iters": iters}


class Reports(Even):
    """Logs in validation what differs between ranks, in the ways people do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.values: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.how == "in training":
            self.log("metric", self.value(), on_step=False, on_epoch=True)
        return loss

    def value(self) -> float:
        # On rank 0 it gets better and better, on rank 1 worse and twice as fast; the mean is worse in every epoch.
        epoch = float(self.current_epoch)
        self.values.append(-epoch if dist.get_rank() == 0 else 2 * epoch)
        return self.values[-1]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.how == "on rank zero" and dist.get_rank() != 0:
            return
        if self.how == "not a number" and dist.get_rank() == 1:
            self.log("metric", float("nan"))
        elif self.how == "rank_zero_only":
            self.log("metric", self.value(), rank_zero_only=True)
        elif self.how == "never":
            self.log("metrik", 0.0)
        elif self.how != "in training":
            self.log("metric", self.value(), sync_dist=self.how == "synchronised")


def plateaus(how: str) -> Any:
    schedule = FreezeSchedule(
        [Phase("head", until=Plateau("metric", patience=2)), Phase("*", until=Plateau("metric")), Phase("neck")],
        verbose=False,
    )
    watch = Watch()
    # Validation is longer on rank 0: three batches and one.
    validation = DataLoader(data(12 if dist.get_rank() == 0 else 4), batch_size=4)
    options = {"strategy": "ddp", "devices": WORLD, "max_epochs": 5, "use_distributed_sampler": False}
    run = trainer(callbacks=[schedule, watch], num_sanity_val_steps=1, **options)
    try:
        run.fit(Reports(how), share(), validation)
    except MisconfigurationException as error:
        return str(error)
    return {"history": schedule.history, "best": schedule.progress.plateau.best, "differ": watch.differ}


HOWS = ["unsynchronised", "synchronised", "on rank zero", "rank_zero_only", "not a number", "in training", "never"]


def uneven(**options: Any) -> Any:
    """Rank 0 has four batches an epoch, rank 1 has two."""
    watch = Watch()
    schedule = FreezeSchedule([Phase("head", steps=1), Phase("*", epochs=1), Phase("neck")], verbose=False)
    part = Subset(data(), range(16) if dist.get_rank() == 0 else range(16, 24))
    options |= {"strategy": "ddp", "devices": WORLD, "max_epochs": 3, "use_distributed_sampler": False}
    try:
        trainer(callbacks=[schedule, watch], **options).fit(Even(), DataLoader(part, batch_size=4))
    except MisconfigurationException as error:
        return str(error)
    return {"history": schedule.history, "differ": watch.differ}


def idle_in_validation() -> str:
    """Rank 1 has nothing to validate on, which Lightning allows if it is told so."""
    net = Reports("unsynchronised")
    net.allow_zero_length_dataloader_with_multiple_devices = True
    schedule = FreezeSchedule([Phase("head", until=Plateau("metric")), Phase("*")], verbose=False)
    validation = DataLoader(data(4), batch_size=4) if dist.get_rank() == 0 else DataLoader([])
    options = {"strategy": "ddp", "devices": WORLD, "max_epochs": 1, "use_distributed_sampler": False}
    try:
        trainer(callbacks=[schedule], **options).fit(net, share(), validation)
    except MisconfigurationException as error:
        return str(error)
    return ""


def disagreement(make: Callable[[], list[Phase]]) -> str:
    try:
        trainer(callbacks=[FreezeSchedule(make())], strategy="ddp", devices=WORLD).fit(Even(), loader())
    except RuntimeError as error:
        return str(error)
    return ""


def zero_redundancy() -> tuple[bool, str]:
    """Whether the weights are those of AdamW alone after four changes, and what is said of a scale."""

    def weights(optimizer: Any, phases: list[Phase]) -> dict[str, Any]:
        torch.manual_seed(0)
        net = Even(optimizer=optimizer)
        run = trainer(callbacks=[FreezeSchedule(phases, verbose=False)], strategy="ddp", devices=WORLD)
        try:
            run.fit(net, loader())
        except ValueError as error:
            refused.append(f"step {run.global_step}: {error}")
        return snapshot(net)

    def zero(params: Any) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=1e-2)

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2)

    refused: list[str] = []
    phases = [Phase("head", steps=2), Phase("*", steps=3), Phase("neck", steps=2), Phase(["head", "backbone"])]
    equal = same(weights(zero, phases), weights(adam, phases))
    weights(zero, [Phase("head", epochs=1), Phase("*", lr_scale={"neck": 0.1})])
    return equal, " ".join(refused)


def batchnorm_alone() -> dict[str, Any]:
    net, watch = Net(sgd), Watch()
    before = snapshot(net)
    strategy = Hooked()
    strategy.watch = watch
    callbacks = [FreezeBatchNorm("backbone.1"), FreezeBatchNorm("backbone.5", train_affine=True), watch]
    trainer(callbacks=callbacks, strategy=strategy, devices=WORLD, max_epochs=2).fit(net, loader())
    after = snapshot(net)
    return {
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
        "doubled": watch.travelled != watch.trains,
        "differ": watch.differ,
        "flags": [p.requires_grad for p in net.parameters()],
    }


def means() -> list[float | None]:
    rank = dist.get_rank()
    strategy = trainer(strategy="ddp", devices=WORLD).strategy
    strategy.setup_environment()
    values = [float(rank), 0.1, 5.0 if rank else None, None, float("nan") if rank else 1.0]
    return [mean_over_ranks(strategy, value) for value in values]


def everything() -> dict[str, Any]:
    torch.manual_seed(0)
    ranks = [Phase("head", epochs=1), Phase("*")], [Phase("head", epochs=2), Phase("*")]
    return {
        "rebuilds": fifty_rebuilds(),
        "by hand": by_hand(),
        "plateaus": {how: plateaus(how) for how in HOWS},
        "uneven": uneven(),
        "uneven, but stopped": uneven(max_steps=2),
        "uneven, but limited": uneven(limit_train_batches=2),
        "idle in validation": idle_in_validation(),
        "disagreement": disagreement(lambda: ranks[dist.get_rank()]),
        "zero redundancy": zero_redundancy(),
        "batchnorm": batchnorm_alone(),
        "means": means(),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(everything, tmp_path_factory.mktemp("devices"))


def test_fifty_rebuilds_of_ddp_leave_no_old_wrapper_in_memory(both: Any) -> None:
    for rank in both:
        found = rank["rebuilds"]
        assert found["rebuilds"] == 54
        assert {wrappers for wrappers, _, _ in found["alive"][2:]} == {2}  # the current one and the one we hold on to
        assert {reducers for _, reducers, _ in found["alive"][2:]} == {2}
        objects = [objects for _, _, objects in found["alive"][4:]]
        assert min(objects[25:]) <= min(objects[:25])  # what is alive for a moment differs, what stays must not
        assert not found["old views"]
        assert not found["doubled"]
        assert found["differ"] == [[]] * 55


def test_communication_hook_registered_by_hand_survives_a_rebuild(both: Any) -> None:
    for rank in both:
        assert rank["by hand"]["calls"] == [7] * 12


def test_power_sgd_sends_whole_gradients_while_buckets_change(both: Any) -> None:
    for rank in both:
        assert rank["by hand"]["iters"] == [0, 1, 2, 1, 2, 3, 4, 5, 1, 2, 3, 4]


@pytest.mark.parametrize("how", [how for how in HOWS if how != "never"])
def test_plateau_ends_by_the_mean_over_ranks_on_all_of_them(both: Any, how: str) -> None:
    first, second = (rank["plateaus"][how] for rank in both)
    assert first == second
    assert first["differ"] == [[]] * (len(first["history"]) + 1)
    # Rank 0 alone gets better and better, and so does Lightning's own mean, in which its three batches count thrice.
    # The mean of both ranks is at its best in epoch 0 and not better in 1 and 2; what is not a number never is.
    ends = {"on rank zero": None, "synchronised": None, "not a number": (2, 12, 1)}
    end = ends.get(how, (3, 18, 1))
    assert first["history"] == [(0, 0, 0), *([end] if end else [])]


def test_metric_that_no_rank_logs_is_an_error_on_all(both: Any) -> None:
    for rank in both:
        assert "Did you mean 'metrik'" in rank["plateaus"]["never"]


def test_uneven_training_data_is_refused_before_a_rank_waits_forever(both: Any) -> None:
    for batches, rank in zip((4, 2), both, strict=True):
        assert "limit_train_batches" in rank["uneven"]
        assert f"batches = {batches}" in rank["uneven"]


def test_uneven_training_data_is_accepted_where_limits_make_it_even(both: Any) -> None:
    for rank in both:
        assert rank["uneven, but stopped"] == {"history": [(0, 0, 0), (0, 1, 1)], "differ": [[]] * 3}
        assert rank["uneven, but limited"] == {"history": [(0, 0, 0), (0, 1, 1), (1, 2, 2)], "differ": [[]] * 4}


def test_rank_without_validation_is_refused_before_others_wait_forever(both: Any) -> None:
    for validates, rank in zip((True, False), both, strict=True):
        assert f"validates = {validates}" in rank["idle in validation"]


def test_ranks_with_different_schedules_are_refused(both: Any) -> None:
    for rank in both:
        assert "they differ in schedule" in rank["disagreement"]


def test_zero_redundancy_trains_as_its_inner_optimizer_and_refuses_scales(both: Any) -> None:
    for rank in both:
        equal, refused = rank["zero redundancy"]
        assert equal
        assert refused.startswith("step 0: ZeroRedundancyOptimizer deals its parameters out")


def test_freeze_batchnorm_without_a_schedule_keeps_replicas_equal_under_ddp(both: Any) -> None:
    for rank in both:
        found = rank["batchnorm"]
        assert not any(name.startswith("backbone.1.") or "running" in name for name in found["moved"])
        assert "backbone.5.weight" in found["moved"]
        assert not found["doubled"]
        assert found["differ"] == [[], []]
        assert all(found["flags"])


def test_mean_over_ranks_leaves_out_ranks_without_a_value(both: Any) -> None:
    for rank in both:
        *means, nan = rank["means"]
        assert means == [0.5, 0.1, 5.0, None]
        assert nan != nan
