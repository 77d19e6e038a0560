"""The main jobs, on what is installed: ``python tests/main_job.py [lightning.pytorch|pytorch_lightning]``.

It needs the package and its dependencies, nothing else; it takes half a minute, and ends in an error if a job fails.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_freeze
from lightning_freeze import (
    FeatureCache,
    FreezeBatchNorm,
    FreezeSchedule,
    GradientAudit,
    MetricLogger,
    NormLogger,
    Phase,
    Plateau,
    TargetNetwork,
    freeze,
    freeze_batchnorm,
    frozen,
    gradual_unfreezing,
    parameter_groups,
    to_numpy,
    trainable_summary,
)

Weights = dict[str, Tensor]
TWO = [Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.1})]


def loader(samples: int = 24) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(samples, 2, 5, 5, generator=draw), torch.randint(3, (samples,), generator=draw)
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def weights(net: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def differ(one: Weights, other: Weights) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


class Jobs:
    """Each method without an underscore is one job: it fails by an exception, and may return weights.

    Args:
        namespace: ``lightning.pytorch`` or ``pytorch_lightning``.
        folder: Where checkpoints go.
    """

    def __init__(self, namespace: str, folder: Path) -> None:
        self._namespace, self._folder = namespace, folder
        self._pl: Any = import_module(namespace)
        self._callbacks: Any = import_module(f"{namespace}.callbacks")
        self._misconfiguration = import_module(f"{namespace}.utilities.exceptions").MisconfigurationException
        for logger in (namespace, "lightning_freeze"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        self._net = net_of(self._pl)

    def _trainer(self, *callbacks: Any, **options: Any) -> Any:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        one = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "max_epochs": 3}
        return self._pl.Trainer(callbacks=list(callbacks), default_root_dir=self._folder, **{**quiet, **one, **options})

    def _fit(self, *callbacks: Any, net: Any = None, **options: Any) -> Any:
        net = self._net() if net is None else net
        self._trainer(*callbacks, **options).fit(net, loader(), loader())
        return net

    def _error(self, *callbacks: Any, net: Any = None) -> str:
        """Return what the fit says that it cannot do."""
        try:
            self._fit(*callbacks, net=net)
        except self._misconfiguration as error:
            return str(error)
        raise AssertionError("nothing was refused")

    def public_names(self) -> None:
        for name in lightning_freeze.__all__:
            getattr(lightning_freeze, name)

    def what_is_frozen_stays_and_the_rest_trains(self) -> Weights:
        before = weights(self._net())
        after = weights(self._fit(FreezeSchedule([Phase("head")])))
        assert differ(before, after) == {"head.weight", "head.bias"}
        return after

    def what_unfreezes_trains(self) -> Weights:
        before, schedule = weights(self._net()), FreezeSchedule(TWO)
        net = self._fit(schedule)
        assert [row[2] for row in schedule.history] == [0, 1]
        assert differ(before, weights(net)) == set(before)
        return weights(net)

    def a_plateau_ends_a_phase(self) -> Weights:
        schedule = FreezeSchedule([Phase("head", until=Plateau("val_loss", 1, min_delta=10.0)), Phase("*")])
        net = self._fit(schedule, max_epochs=4)
        assert schedule.phase_index == 1
        return weights(net)

    def what_the_optimizer_was_not_given_is_adopted(self) -> Weights:
        net = self._net()
        net.backbone.requires_grad_(False)
        before = weights(net)
        self._fit(FreezeSchedule([Phase("head", epochs=1), Phase(["*", "backbone"])]), net=net)
        assert differ(before, weights(net)) == set(before)
        return weights(net)

    def the_optimizer_stays_the_users(self) -> None:
        net = self._fit(FreezeSchedule(TWO))
        (group,) = net.made.param_groups
        assert len(group["params"]) == len(list(net.parameters()))
        assert abs(group["lr"] - 1e-2 * 0.9**3) < 1e-9  # the scheduler has gone on

    def resume_is_exact(self) -> Weights:
        whole = weights(self._fit(FreezeSchedule(TWO), max_epochs=4))
        first = self._trainer(FreezeSchedule(TWO), max_epochs=2)
        first.fit(self._net(), loader(), loader())
        first.save_checkpoint(self._folder / "half.ckpt")
        net = self._net()
        self._trainer(FreezeSchedule(TWO), max_epochs=4).fit(
            net, loader(), loader(), ckpt_path=self._folder / "half.ckpt"
        )
        assert not differ(whole, weights(net))
        return whole

    def a_checkpoint_resumes_without_the_plugin(self) -> Weights:
        first = self._trainer(FreezeSchedule(TWO), max_epochs=2)
        first.fit(self._net(), loader(), loader())
        first.save_checkpoint(self._folder / "plain.ckpt")
        net = self._net()
        self._trainer(max_epochs=3).fit(net, loader(), loader(), ckpt_path=self._folder / "plain.ckpt")
        return weights(net)

    def frozen_batchnorm_keeps_its_statistics(self) -> Weights:
        before = weights(self._net())
        after = weights(self._fit(FreezeBatchNorm(train_affine=True)))
        assert {name for name in before if "running" in name} <= before.keys() - differ(before, after)
        assert "backbone.1.weight" in differ(before, after)
        return after

    def stochastic_weight_averaging_is_refused(self) -> None:
        swa = self._callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1)
        assert "StochasticWeightAveraging" in self._error(FreezeBatchNorm(train_affine=True), swa)

    def weight_averaging_goes_on(self) -> Weights | None:
        if not hasattr(self._callbacks, "WeightAveraging"):  # Lightning 2.5
            return None
        return weights(self._fit(FreezeSchedule([Phase("head")]), self._callbacks.WeightAveraging()))

    def another_schedule_is_refused(self) -> None:
        assert "BackboneFinetuning" in self._error(FreezeSchedule(TWO), self._callbacks.BackboneFinetuning())

    def metrics_are_those_of_the_epoch(self) -> None:
        accuracy = MetricLogger({"accuracy": MulticlassAccuracy(num_classes=3, average="micro")}, stages=("val",))
        trainer, net = self._trainer(accuracy), self._net()
        trainer.fit(net, loader(), loader())
        net.eval()
        right = sum((net(images).argmax(1) == labels).sum() for images, labels in loader())
        assert abs(trainer.callback_metrics["val/accuracy"] - right / 24) < 1e-6

    def norms_are_logged(self) -> None:
        trainer = self._trainer(FreezeSchedule([Phase("head")]), NormLogger(every_n_steps=1, per="module"))
        trainer.fit(self._net(), loader())
        logged = {name for name in trainer.callback_metrics if name.startswith("norm/")}
        assert "norm/update_ratio/head" in logged
        assert not [name for name in logged if "backbone" in name]

    def a_target_follows_and_never_trains(self) -> Weights:
        net = self._net()
        net.target = copy.deepcopy(net.head)
        before = weights(net.target)
        self._fit(TargetNetwork("head", "target", tau=0.1), FreezeSchedule([Phase("*")]), net=net)
        assert len(differ(before, weights(net.target)) & differ(weights(net.head), weights(net.target))) == 2
        return weights(net)

    def the_audit_finds_nothing_where_nothing_is(self) -> None:
        audit = GradientAudit(on_violation="raise")
        self._fit(FreezeSchedule(TWO), FreezeBatchNorm(), audit)
        assert audit.report.checks
        assert not audit.report

    def the_audit_finds_a_cut(self) -> None:
        net = self._net()
        net.forward = lambda x: net.head(net.backbone(x).detach())
        error = self._error(GradientAudit(on_violation="raise"), net=net)  # an AuditError, and in either package theirs
        assert ".detach()" in error
        assert "main_job.py" in error  # the line of the cut: what libraries are is known

    def cached_features_change_nothing(self) -> Weights:
        without = weights(self._fit(FreezeSchedule([Phase("head")]), max_epochs=8))
        for storage in ("memory", self._folder / "features"):
            cache = FeatureCache("backbone", storage=storage)
            assert not differ(without, weights(self._fit(FreezeSchedule([Phase("head")]), cache, max_epochs=8)))
            assert cache.stats.hits, cache.stats
        return without

    def manual_optimization_trains(self) -> Weights:
        net = self._net()
        net.automatic_optimization = False
        before = weights(net)
        self._fit(FreezeSchedule(TWO), net=net)
        assert differ(before, weights(net)) == set(before)
        return weights(net)

    def compiled_modules_train_when_they_unfreeze(self) -> Weights:
        net = self._net()
        before = weights(net)
        net.backbone.compile(backend="aot_eager")
        self._fit(FreezeSchedule(TWO), net=net)
        assert differ(before, weights(net)) == set(before)
        return weights(net)

    def two_processes_agree(self) -> None:
        if not torch.distributed.is_available() or "fork" not in multiprocessing.get_all_start_methods():
            return
        before = self._net()
        self._fit(FreezeSchedule(TWO), GradientAudit(on_violation="raise"), strategy="ddp_fork", devices=2, net=before)

    def nothing_stays_after_an_error(self) -> None:
        class Stop(self._callbacks.Callback):  # type: ignore[name-defined]
            def on_train_batch_end(self, *_: Any) -> None:
                raise ArithmeticError

        net = self._net()
        with contextlib.suppress(ArithmeticError):
            self._fit(FreezeSchedule([Phase("head")]), Stop(), net=net)
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert all(module.training for module in net.modules())

    def the_command_line_knows_callbacks(self) -> Weights | None:
        if find_spec("jsonargparse") is None:
            return None
        cli = import_module(f"{self._namespace}.cli").LightningCLI(
            type(self._net()),
            args={"trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False, "callbacks": [CONFIG]}},
            run=False,
            save_config_callback=None,
        )
        assert any(isinstance(callback, FreezeSchedule) for callback in cli.trainer.callbacks)
        return None

    def the_plan_can_be_seen(self) -> None:
        plan = str(
            FreezeSchedule(gradual_unfreezing(["head", "backbone"], epochs_per_phase=1)).preview(
                self._net(), max_epochs=2
            )
        )
        assert "head" in plan

    def functions_work_on_plain_modules(self) -> None:
        net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "head": nn.Linear(2, 1)})
        assert len(freeze(net, "body")) == 4
        assert trainable_summary(net).trainable == 3
        with frozen(net, "*"):
            assert not any(parameter.requires_grad for parameter in net.parameters())
        freeze_batchnorm(net)
        assert not net.train()["body"][1].training
        assert len(parameter_groups(net, {"head": {"lr": 0.1}})) >= 2
        assert to_numpy({"x": torch.zeros(2, dtype=torch.bfloat16)})["x"].shape == (2,)


CONFIG = {
    "class_path": "lightning_freeze.FreezeSchedule",
    "init_args": {"phases": [{"train": "head", "epochs": 1}, {"train": "*"}]},
}


def net_of(pl: Any) -> Callable[[], Any]:
    """Return the class of the jobs' network, of one of the two packages; each has the same weights."""

    class Net(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            self.backbone, self.head = nn.Sequential(*layers), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.backbone(x))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            scores = self(batch[0])
            loss = nn.functional.cross_entropy(scores, batch[1])
            if not self.automatic_optimization:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return {"loss": loss, "preds": scores.detach(), "target": batch[1]}

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            scores = self(batch[0])
            self.log("val_loss", nn.functional.cross_entropy(scores, batch[1]), sync_dist=True)
            return {"preds": scores, "target": batch[1]}

        def configure_optimizers(self) -> Any:
            given = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self.made = torch.optim.AdamW(given, lr=1e-2, weight_decay=0.1)
            return [self.made], [torch.optim.lr_scheduler.ExponentialLR(self.made, 0.9)]

    return Net


def run(namespace: str, *, quiet: bool = False) -> tuple[dict[str, Weights], list[str]]:
    """Do all jobs.

    Returns:
        The weights that jobs came to, and the names of those that failed.
    """
    came_to, failed = dict[str, Weights](), list[str]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jobs = Jobs(namespace, Path(folder))
        for name in [name for name in vars(Jobs) if not name.startswith("_")]:
            torch.manual_seed(0)
            try:
                came_to[name] = getattr(jobs, name)() or {}
            except Exception:
                failed.append(name)
                traceback.print_exc()
            if not quiet:
                print("FAILED" if name in failed else "ok", name.replace("_", " "), flush=True)
    return came_to, failed


def main() -> None:
    """Do all jobs and print what came of them."""
    namespaces = ("lightning.pytorch", "pytorch_lightning")
    namespace = sys.argv[1] if len(sys.argv) > 1 else next(one for one in namespaces if find_spec(one.split(".")[0]))
    torch.set_num_threads(1)
    print(
        f"lightning-freeze {version('lightning-freeze')} at {Path(lightning_freeze.__file__).parent}, {namespace} "
        f"{import_module(namespace).__version__}, torch {torch.__version__}, torchmetrics {version('torchmetrics')}, "
        f"Python {sys.version.split()[0]}"
    )
    came_to, failed = run(namespace)
    print(f"{len(came_to)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
