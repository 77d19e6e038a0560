"""Fits on a device, in the ways that a GPU has of its own, and all that is seen in them."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchmetrics.classification as tm
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_freeze import FreezeSchedule, GradientAudit, MetricLogger, NormLogger, Phase
from tests.nets import Net, Probe, loader, moved, snapshot, trainer

STEPS = 6  # in an epoch


class NotHereError(Exception):
    """A check that this device cannot do, with the reason."""


class Seeded(Net):
    """Draws its dropout from the step's number, and returns what a MetricLogger reads."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.manual_seed(self.trainer.fit_loop.total_batch_idx)
        preds = self(batch[0])
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}


class TwoOptimizers(Seeded):
    """Steps both in each batch, by hand; while the head alone trains, one of them is at rest."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        below = [*self.backbone.parameters(), *self.neck.parameters()]
        return [self.make_optimizer(self.head.parameters()), self.make_optimizer(below)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(outputs["loss"])
        for optimizer in self.optimizers():
            optimizer.step()
        return {**outputs, "loss": outputs["loss"].detach()}


@dataclass(frozen=True)
class Setting:
    """A way to train.

    Args:
        optimizer: From parameters, which are on the device by then.
        net: The module.
        policy: What becomes of the state of what freezes.
        options: The Trainer's, for a device.
        needs_cuda: Why it runs on a GPU only, if so.
        rounds: Small steps may be rounded away.
    """

    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    net: type[Seeded] = Seeded
    policy: Any = "keep"
    options: Callable[[str], dict[str, Any]] = lambda device: {}
    needs_cuda: str = ""
    rounds: bool = False


def adamw(**options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: torch.optim.AdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def sgd(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1)


def capturable(params: list[nn.Parameter]) -> Optimizer:
    params = list(params)
    return torch.optim.AdamW(params, lr=torch.tensor(1e-2, device=params[0].device), capturable=True)


def half(device: str) -> dict[str, Any]:
    """16-mixed with a scale so large that the first steps are skipped, and some later ones."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**17, growth_interval=3)
    return {"plugins": MixedPrecision("16-mixed", device, scaler)}


def clipped(device: str) -> dict[str, Any]:
    return {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}


SETTINGS: dict[str, Setting] = {
    "float32": Setting(adamw()),
    "float32, clipped and accumulated": Setting(sgd, options=clipped),
    "bf16-mixed": Setting(adamw(), options=lambda device: {"precision": "bf16-mixed"}),
    "bf16-true": Setting(adamw(lr=0.1), options=lambda device: {"precision": "bf16-true"}, rounds=True),
    "16-mixed": Setting(sgd, options=half),
    "16-mixed, an optimizer at rest": Setting(sgd, TwoOptimizers, options=half),
    "16-mixed, fused": Setting(adamw(fused=True), options=half),
    "fused": Setting(adamw(fused=True)),
    "foreach": Setting(adamw(foreach=True)),
    "capturable": Setting(capturable, needs_cuda="capturable optimizers need a GPU"),
    "state offloaded": Setting(adamw(), policy="offload"),
    "state offloaded, fused": Setting(adamw(fused=True), policy="offload"),
    "state dropped": Setting(adamw(), policy="drop"),
}


def schedule(setting: Setting) -> FreezeSchedule:
    """Everything first, so that moments are there when the backbone freezes."""
    phases = [
        Phase("*", epochs=1),
        Phase("head", epochs=1),
        Phase(["head", "neck", "backbone.4"], epochs=1, lr_scale=0.5),
        Phase("*", lr_scale={"backbone": 0.1}),
    ]
    return FreezeSchedule(phases, optimizer_state=setting.policy, verbose=False)


@dataclass
class Seen:
    """What a fit has shown."""

    phases: list[tuple[int, set[str], set[str]]] = field(default_factory=list)  # index, what trains, what moved
    gradients: list[set[str]] = field(default_factory=list)  # what trains without one, and what has one and is frozen
    groups: list[Any] = field(default_factory=list)
    state_devices: dict[int, set[tuple[bool, str]]] = field(default_factory=dict)  # by phase: trains, device
    end: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def trainer_on(device: str, folder: Path | None = None, **options: Any) -> Trainer:
    """As tests have it, on the device."""
    return trainer(folder, **{"accelerator": "gpu" if device == "cuda" else device, **options})


def anatomy(net: nn.Module) -> dict[str, Any]:
    """What a fit could leave behind."""
    modules = {name: (type(m), m.training, sorted(vars(m))) for name, m in net.named_modules() if name}
    return modules | {name: (p.requires_grad, bool(p._backward_hooks)) for name, p in net.named_parameters()}


def fit(
    setting: Setting,
    device: str,
    folder: Path | None = None,
    *,
    frozen: bool = True,
    callbacks: tuple[Callback, ...] = (),
    resume: Path | None = None,
    **options: Any,
) -> Seen:
    """Train four epochs and return what was seen; save each epoch if there is a folder."""
    torch.manual_seed(0)
    net, seen, before = setting.net(optimizer=setting.optimizer), Seen(), dict[str, Tensor]()
    whole = anatomy(net)
    freezing = schedule(setting) if frozen else None

    def start(run: Trainer, module: LightningModule) -> None:
        index = freezing.phase_index if freezing else 0
        if not seen.phases or seen.phases[-1][0] != index:
            before.clear()
            before.update(snapshot(module))
            seen.phases.append((index, {name for name, p in module.named_parameters() if p.requires_grad}, set()))
            seen.state_devices[index] = {
                (p.requires_grad, value.device.type)
                for optimizer in run.optimizers
                for p, state in optimizer.state.items()
                for key, value in state.items()
                if isinstance(value, Tensor) and key != "step"
            }
        seen.groups.append(shapes(run))

    def end(run: Trainer, module: LightningModule) -> None:
        seen.phases[-1][2].update(moved(before, snapshot(module)))
        trains = {name for name, p in module.named_parameters() if p.requires_grad}
        # An accumulated window that has just ended has none.
        with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
        seen.gradients.append(trains ^ with_gradient)
        seen.groups.append(shapes(run))

    saver = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)] if folder else []
    every = [*([freezing] if freezing else []), *callbacks, Probe(start, end), *saver]
    run = trainer_on(
        device,
        callbacks=every,
        enable_checkpointing=bool(saver),
        log_every_n_steps=1,
        **setting.options(device) | options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(net, loader(), ckpt_path=resume, weights_only=False)
    seen.end = {
        "weights": snapshot(net),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "schedule": freezing.state_dict() if freezing else None,
        "scaler": run.precision_plugin.state_dict(),
        "steps": run.global_step,
    }
    seen.left = [
        f"{name} is {now}, was {was}"
        for (name, was), now in zip(whole.items(), anatomy(net).values(), strict=True)
        if was != now
    ]
    seen.left += [
        f"{name} of an optimizer"
        for o in run.optimizers
        for name, hooks in vars(o).items()
        if name.endswith("_hooks") and hooks
    ]
    seen.left += [
        f"state on {v.device}"
        for o in run.optimizers
        for p, s in o.state.items()
        for k, v in s.items()
        if isinstance(v, Tensor) and k != "step" and v.device != p.device
    ]
    seen.left += ["a hook around steps"] * len(_global_optimizer_pre_hooks)
    return seen


def shapes(run: Trainer) -> list[Any]:
    """Number, order, members and options of all groups."""
    return [
        [[(id(p)) for p in group["params"]], {key: str(value) for key, value in group.items() if key != "params"}]
        for optimizer in run.optimizers
        for group in optimizer.param_groups
    ]


@dataclass
class Evidence:
    """A setting's fits: with the schedule, without, resumed, and with observers."""

    whole: Seen
    plain: Seen
    resumed: dict[str, Seen]
    observed: Seen
    checkpoint: dict[str, Any]
    plain_checkpoint: dict[str, Any]


def evidence(name: str, device: str) -> Evidence:
    """Run a setting's fits, once.

    Raises:
        Exception: What a fit raised, for each check of the setting.
    """
    found = _evidence(name, device)
    if isinstance(found, Exception):
        raise found
    return found


@functools.cache
def _evidence(name: str, device: str) -> Evidence | Exception:
    try:
        return _run(name, device)
    except Exception as error:
        return error


def _run(name: str, device: str) -> Evidence:
    setting = SETTINGS[name]
    if setting.needs_cuda and device != "cuda":
        raise NotHereError(setting.needs_cuda)
    with tempfile.TemporaryDirectory() as place:
        ours, bare = Path(place, "ours"), Path(place, "bare")
        whole, plain = fit(setting, device, ours), fit(setting, device, bare, frozen=False)
        stops = [ours / f"epoch={epoch}.ckpt" for epoch in (0, 1, 2)]
        resumed = {stop.stem: fit(setting, device, resume=stop) for stop in stops}
        metrics = MetricLogger({"acc": tm.MulticlassAccuracy(3)}, stages=("train",))
        observers = (NormLogger(every_n_steps=1, per="parameter"), metrics, GradientAudit())
        observed = fit(setting, device, callbacks=observers)
        checkpoints = [torch.load(folder / "epoch=3.ckpt", weights_only=False) for folder in (ours, bare)]
    return Evidence(whole, plain, resumed, observed, *checkpoints)
