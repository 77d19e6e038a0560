"""The small real networks, data and probes that the tests share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LOADS_ALL = "weights_only" not in inspect.signature(Trainer.fit).parameters  # Lightning 2.5
if LOADS_ALL:

    def _loads_all(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, weights_only=None, **kwargs: method(*args, **kwargs)

    for _name in ("fit", "validate", "test", "predict"):
        setattr(Trainer, _name, _loads_all(getattr(Trainer, _name)))

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1)


def half() -> MixedPrecision:
    """Float16 whose loss scale is too high at first, so that steps are skipped."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3))


class Backbone(nn.Sequential):
    """Convolution, BatchNorm and dropout, twice."""

    def __init__(self) -> None:
        layers = []
        for channels in (2, 4):
            layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1)]
        super().__init__(*layers)


class Net(LightningModule):
    """A classifier with a backbone, a neck and a head; says nothing about freezing."""

    def __init__(
        self,
        optimizer: OptimizerFactory = adamw,
        scheduler: SchedulerFactory | None = None,
        *,
        interval: str = "epoch",
        log_train: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.interval, self.log_train = interval, log_train

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.neck(self.backbone(x).mean((2, 3)))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.log_train:
            self.log(self.log_train, loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        config = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class WarmUp(Net):
    """Writes a rate that grows with every step into all groups, as Lightning's documentation does; notes the rates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates: list[list[float]] = []

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        (optimizer,) = self.trainer.optimizers
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.trainer.global_step + 1)
        super().optimizer_step(*args, **kwargs)
        self.rates.append([group["lr"] for group in optimizer.param_groups])


class Stops(torch.autograd.Function):
    """Its backward gives no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


#: Muon is new in torch 2.9.
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")

#: torch 2.6 has FSDP2 on GPUs only.
FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp2 = pytest.mark.skipif(not FSDP2_ON_CPU, reason="this torch has no FSDP2 on a CPU")


def averaging(name: str = "WeightAveraging") -> Any:
    """A class of Lightning's callbacks that is new in 2.6; before, the test is skipped."""
    return getattr(callbacks, name, None) or pytest.skip(f"this Lightning has no {name}")


def data(samples: int = 24, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 2, 5, 5, generator=generator)
    return TensorDataset(images, torch.randint(3, (samples,), generator=generator))


def loader(samples: int = 24, batch_size: int = 4, *, stateful: bool = False) -> DataLoader[Any]:
    if not stateful:
        return DataLoader(data(samples), batch_size=batch_size)
    from torchdata.stateful_dataloader import StatefulDataLoader  # `make gpu` does without

    return StatefulDataLoader(data(samples), batch_size=batch_size)


def trainer(tmp_path: Any = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 4,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **options})


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The names of tensors that are not bit-identical."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def members(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


class Probe(Callback):
    """Calls a function at each batch start and end, after all other callbacks' hooks."""

    def __init__(self, start: Callable[..., None] | None = None, end: Callable[..., None] | None = None) -> None:
        self.start, self.end = start, end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.start:
            self.start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.end:
            self.end(trainer, pl_module)


def same(a: Any, b: Any) -> bool:
    """Whether two nests of data are equal, tensors to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def fresh(net: LightningModule) -> LightningModule:
    return copy.deepcopy(net)
