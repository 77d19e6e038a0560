"""One combination of optimizer, scheduler and Trainer options, under a schedule: does all that must hold, hold?"""

from __future__ import annotations

import functools
import itertools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeSchedule, Phase
from tests.compatibility.optimizers import make
from tests.compatibility.schedulers import SCHEDULERS
from tests.nets import Probe, snapshot, trainer


@dataclass(frozen=True)
class Case:
    """A combination; the defaults are the plainest."""

    optimizer: str = "torch: AdamW"
    scheduler: str = "none"
    precision: str = "32-true"
    accumulate: int = 1
    clip: str = "none"
    manual: bool = False
    schedule: str = "plain"

    def __str__(self) -> str:
        plain = Case()
        return ", ".join(
            f"{key}={value}" if not isinstance(value, str) else value
            for key, value in vars(self).items()
            if key == "optimizer" or value != getattr(plain, key)
        )


@dataclass(frozen=True)
class Outcome:
    """``works``; ``refused`` at fit start; ``itself``: it fails without us, too; ``fails``."""

    status: str
    reason: str = ""


class Convolutions(nn.ModuleDict):
    """Tensors of one to four dimensions, and BatchNorm; each gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self["backbone"] = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten()
        )
        self["neck"], self["head"] = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self["head"](torch.tanh(self["neck"](self["backbone"](images))))


class Matrices(Convolutions):
    """Nothing but matrices, for Muon and its like."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Flatten(), nn.Linear(50, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh()
        self["backbone"] = nn.Sequential(*layers)
        self["neck"], self["head"] = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)


class Sparse(Convolutions):
    """Gradients that are sparse."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("backbone", "neck", "head"):
            self[name] = nn.EmbeddingBag(8, 3, mode="sum", sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        words = images.flatten(1)[:, :4].float().mul(100).abs().long() % 8
        return self["head"](words) * (1 + torch.tanh(self["backbone"](words) + self["neck"](words)))


# Tried in this order, until the optimizer trains one without us: the net, and whether its backward makes a graph.
NETS: list[tuple[type[Convolutions], bool]] = [
    (Convolutions, False),
    (Convolutions, True),
    (Matrices, False),
    (Sparse, False),
]


class Script(LightningModule):
    """A user's training script."""

    def __init__(self, case: Case, net: type[Convolutions], graph: bool) -> None:
        super().__init__()
        self.net, self.case, self.graph = net(), case, graph
        self.make = make(case.optimizer)
        self.automatic_optimization = not case.manual

    def given(self) -> list[nn.Parameter]:
        return list(self.net["head"].parameters() if self.case.schedule == "adopted" else self.net.parameters())

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.make(self.given()), SCHEDULERS[self.case.scheduler]
        for group in optimizer.param_groups if self.case.precision == "bf16-true" else ():
            if isinstance(group.get("lr"), float) and group["lr"] <= 0.01:
                group["lr"] *= 10  # or most steps would be rounded away
        if scheduler is None:
            return optimizer
        interval = "epoch" if self.case.scheduler == "ReduceLROnPlateau" else "step"
        config = {"scheduler": scheduler(optimizer), "interval": interval, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step() if metric is None else scheduler.step(metric)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        if self.case.scheduler == "ReduceLROnPlateau":
            self.log("loss", loss, on_step=False, on_epoch=True)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.case.accumulate, create_graph=self.graph)
        if (batch_idx + 1) % self.case.accumulate == 0:
            self.step_by_hand()
        return None

    def step_by_hand(self) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        if self.case.clip != "none":
            self.clip_gradients(optimizer, 0.1, self.case.clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None and self.case.scheduler != "ReduceLROnPlateau":
            scheduler.step()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **{"create_graph": self.graph} | kwargs)

    def on_train_epoch_start(self) -> None:
        # Schedule-free optimizers are told that training begins.
        told = getattr(self.trainer.optimizers[0], "train", None)
        if callable(told):
            told()

    def on_train_epoch_end(self) -> None:
        if self.case.manual and self.case.scheduler == "ReduceLROnPlateau":
            self.lr_schedulers().step(self.trainer.callback_metrics["loss"])


def loader(batches: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 * batches, 2, 5, 5, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(3, (4 * batches,), generator=generator)), batch_size=4)


@dataclass
class Seen:
    """What a fit has shown."""

    began: bool = False
    error: Exception | None = None
    phases: list[tuple[int, set[str], set[str]]] = field(default_factory=list)  # index, what trains, what moved
    first: set[str] = field(default_factory=set)  # what moved in the first epoch
    wrong: list[str] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)


def groups_of(optimizer: Any) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def hooks_of(optimizer: Any) -> dict[str, int]:
    return {name: len(hooks) for name, hooks in vars(optimizer).items() if name.endswith("_hooks") and hooks}


def phases(case: Case) -> list[Phase]:
    scale = {"net.backbone": 0.5} if case.schedule == "scaled" else None
    return [Phase("net.head", epochs=1), Phase("*", epochs=2, lr_scale=scale), Phase("net.neck")]


def fit(
    case: Case, net: type[Convolutions], graph: bool, folder: Path, *, ours: bool = True, resume: Path | None = None
) -> Seen:
    """Train four epochs, with the schedule or without, and return what was seen; errors too."""
    torch.manual_seed(0)
    seen, before = Seen(), {}
    try:
        script = Script(case if ours else replace(case, schedule="plain"), net, graph)
    except Exception as error:
        seen.error = error
        return seen
    schedule = FreezeSchedule(phases(case), verbose=False) if ours else None
    made: list[Any] = []
    configure = script.configure_optimizers

    def configured() -> Any:
        config = configure()
        optimizer = config["optimizer"] if isinstance(config, dict) else config
        made[:] = [groups_of(optimizer), hooks_of(optimizer)]
        return config

    script.configure_optimizers = configured  # type: ignore[method-assign]

    def start(run: Trainer, module: LightningModule) -> None:
        index = schedule.phase_index if schedule else 0
        if not seen.began or seen.phases[-1][0] != index:
            trains = {name for name, p in module.named_parameters() if p.requires_grad}
            seen.phases.append((index, trains, set()))
            before.clear()
            before.update(snapshot(module))
        seen.began = True

    def end(run: Trainer, module: LightningModule) -> None:
        now = snapshot(module)
        seen.phases[-1][2].update(name for name, old in before.items() if not equal(old, now[name]))
        if run.current_epoch == 0:
            seen.first |= seen.phases[-1][2]
        expected = made[0]
        if ours and case.schedule == "adopted":
            given = set(map(id, script.given()))
            added = [id(p) for p in module.parameters() if id(p) not in given]
            first, *others = made[0]
            expected = [[*first, *added], *others]
        if groups_of(run.optimizers[0]) != expected:
            seen.wrong.append("groups are not as the user made them")

    every = {"every_n_epochs": 2, "save_on_train_epoch_end": True, "save_top_k": -1}
    saver = [] if resume is not None else [ModelCheckpoint(folder, "{epoch}", **every)]
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": case.clip} if case.clip != "none" else {}
    run = trainer(
        folder,
        callbacks=[*([schedule] if schedule else []), Probe(start, end), *saver],
        enable_checkpointing=bool(saver),
        precision=case.precision,
        **({} if case.manual else {"accumulate_grad_batches": case.accumulate, **clip}),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(script, loader(2 * case.accumulate), ckpt_path=resume, weights_only=False)
    except Exception as error:
        seen.error = error
        return seen
    optimizer = run.optimizers[0]
    if groups_of(optimizer) != made[0] or hooks_of(optimizer) != made[1]:
        seen.wrong.append("the fit leaves something in the optimizer")
    if not all(p.requires_grad for p in script.parameters()) or not all(m.training for m in script.net.modules()):
        seen.wrong.append("the fit leaves flags or modes")
    seen.end = {
        "weights": snapshot(script),
        "optimizer state": optimizer.state_dict(),
        "scheduler state": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
    }
    return seen


def equal(a: Any, b: Any) -> bool:
    """Whether nests of data are the same to the bit; not-a-number equals itself, other objects are of one class."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(_same(a.detach(), b.detach()))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, str | int | float | bool | None):
        return bool(a == b or (a != a and b != b))
    return type(a) is type(b)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_sparse:
        return _same(a.to_dense(), b.to_dense())
    if type(a) is not Tensor:  # a quantized state
        a, b = a.dequantize(), b.dequantize()  # type: ignore[no-untyped-call]
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def sentence(error: BaseException | None) -> str:
    """The first line of an error, short enough for a table's footnote."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "…"


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this package, in words for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "lightning_freeze" in Path(trace.tb_frame.f_code.co_filename).parts


@functools.cache
def net_for(name: str) -> tuple[type[Convolutions], bool] | Exception:
    """The first net that an optimizer trains without us; or the error with which it leaves the first one."""
    errors: list[Exception] = []
    for manual, (net, graph) in itertools.product((False, True), NETS):
        with tempfile.TemporaryDirectory() as folder:
            seen = fit(Case(name, manual=manual), net, graph, Path(folder), ours=False)
        if seen.error is None:
            return net, graph
        errors.append(seen.error)
    return errors[0]


def check(case: Case) -> Outcome:
    """Run a combination with the schedule; without it only where something is wrong, to see whose fault it is."""
    found = net_for(case.optimizer)
    if isinstance(found, Exception):
        return Outcome("itself", sentence(found))
    with tempfile.TemporaryDirectory() as place:
        return _check(case, *found, Path(place))


def _check(case: Case, net: type[Convolutions], graph: bool, folder: Path) -> Outcome:
    ours = fit(case, net, graph, folder / "ours")
    bare: list[Seen] = []

    def without() -> Seen:
        if not bare:
            bare.append(fit(case, net, graph, folder / "bare", ours=False))
        return bare[0]

    if ours.error is not None:
        is_refusal = isinstance(ours.error, ValueError | MisconfigurationException) and is_ours(ours.error)
        if not ours.began and is_refusal and without().error is None:
            return Outcome("refused", sentence(ours.error))
        if without().error is not None:
            return Outcome("itself", sentence(without().error))
        return Outcome("fails", f"{type(ours.error).__name__}: {sentence(ours.error)}")
    if ours.wrong:
        return Outcome("fails", ours.wrong[0])
    if problem := movement(ours, without, rounds=case.precision == "bf16-true"):
        return Outcome("fails", problem)
    again = fit(case, net, graph, folder, resume=folder / "ours" / "epoch=1.ckpt")
    differ = differing(ours, again)
    if differ:
        other = without()
        if other.error is None:
            twice = fit(case, net, graph, folder, ours=False, resume=folder / "bare" / "epoch=1.ckpt")
            if differing(other, twice):
                return Outcome("itself", "a resumed run differs without the schedule, too")
        return Outcome("fails", f"a resumed run differs: {differ}")
    return Outcome("works")


def movement(ours: Seen, without: Callable[[], Seen], *, rounds: bool) -> str:
    """What moved although frozen, or stayed although trained."""
    if [index for index, *_ in ours.phases] != [0, 1, 2]:
        return f"phases began as {[index for index, *_ in ours.phases]}"
    for index, trains, changed in ours.phases:
        buffers = {name for name in changed if "running" in name or "num_batches" in name}
        if frozen := changed - trains - (buffers if index == 1 else set()):
            return f"moves although frozen in phase {index + 1}: {', '.join(sorted(frozen)[:3])}"
        # Single tensors may stay: small steps are rounded away, in bfloat16 all but the first; a whole part may not.
        parts = {name.split(".")[1] for name in trains} if index == 0 or not rounds else set()
        for part in parts - {name.split(".")[1] for name in trains & changed}:
            # Some optimizers do nothing in their first steps.
            anyway = without().first if index == 0 else {name for phase in without().phases for name in phase[2]}
            if any(name.split(".")[1] == part for name in anyway):
                return f"stays although trained in phase {index + 1}: {part}"
    return ""


def differing(whole: Seen, again: Seen) -> str:
    if again.error is not None:
        return f"{type(again.error).__name__}: {sentence(again.error)}"
    return ", ".join(key for key in whole.end if not equal(whole.end[key], again.end[key]))
