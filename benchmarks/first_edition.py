"""Whether weights are those of version 0.1.0, bit for bit: the same fits with both editions of the package.

Optimizers × schedulers × what happens to gradients, under a schedule of four phases that freezes, unfreezes, scales and
freezes again. The tree of the first edition comes out of git into a temporary folder; each edition fits in a process of
its own. Clipping by norm is expected to differ where rates are scaled: 0.1.0 keeps parameter groups of its own then,
and Lightning sums the norm in the order of groups. Two columns show that it is this order and nothing else: clipping
without scales, and clipping with them in the order of ``self.parameters()``. What differs is the last bit of the norm;
in the bias in front of a BatchNorm, whose gradient is nothing but rounding, an adaptive optimizer makes much of it.

Run it with ``python benchmarks/first_edition.py``; ``--revision`` names another commit to compare with.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
FIRST = "0bb18dc"
EPOCHS, BATCHES = 4, 6

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "AdamW": lambda params: optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD, momentum": lambda params: optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda params: optim.Adagrad(params, lr=1e-2),
    "RMSprop": lambda params: optim.RMSprop(params, lr=1e-3, momentum=0.5),
    "AdamW, fused": lambda params: optim.AdamW(params, lr=1e-2, fused=True),
    "SGD, foreach": lambda params: optim.SGD(params, lr=1e-2, momentum=0.9, foreach=True),
    "AdamW, tensor lr": lambda params: optim.AdamW(params, lr=torch.tensor(1e-2)),
}
SCHEDULERS: dict[str, Callable[[optim.Optimizer], tuple[Any, str]] | None] = {
    "none": None,
    "OneCycleLR": lambda o: (
        lrs.OneCycleLR(o, 3e-2, total_steps=EPOCHS * BATCHES, cycle_momentum="alpha" not in o.defaults and cycles(o)),
        "step",
    ),
    "CosineAnnealingLR": lambda o: (lrs.CosineAnnealingLR(o, EPOCHS), "epoch"),
    "SequentialLR": lambda o: (
        lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=7), lrs.ExponentialLR(o, 0.95)], milestones=[7]),
        "step",
    ),
    "ReduceLROnPlateau": lambda o: (lrs.ReduceLROnPlateau(o, patience=0, threshold=0.1), "epoch"),
    "LambdaLR": lambda o: (lrs.LambdaLR(o, lambda step: 0.97**step), "step"),
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "clip by norm": {"gradient_clip_val": 0.05},
    "by norm, unscaled": {"gradient_clip_val": 0.05},
    "by norm, model's order": {"gradient_clip_val": 0.05},
}
EXPECTED = "clip by norm"  # to differ, in the last bits


def cycles(optimizer: optim.Optimizer) -> bool:
    return "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))


class Net(LightningModule):
    """A backbone with BatchNorm and dropout, a neck and a head."""

    def __init__(self, optimizer: str, mode: str, scheduler: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8))
        self.neck = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.names, self.in_own_order = (optimizer, scheduler), mode == "by norm, model's order"

    def loss(self, batch: list[Tensor]) -> Tensor:
        logits = self.head(torch.relu(self.neck(self.backbone(batch[0]))))
        return nn.functional.cross_entropy(logits, batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *args: Any, **kw: Any) -> None:
        if self.in_own_order:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, *args, **kw)

    def configure_optimizers(self) -> Any:
        optimizer, make = OPTIMIZERS[self.names[0]](self.parameters()), SCHEDULERS[self.names[1]]
        if make is None:
            return optimizer
        scheduler, interval = make(optimizer)
        config = {"scheduler": scheduler, "interval": interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def combinations() -> Iterator[tuple[str, str, str]]:
    for optimizer in OPTIMIZERS:
        for mode in MODES:
            for scheduler in SCHEDULERS:
                yield optimizer, mode, scheduler


def phases(scaled: bool) -> list[Any]:
    from lightning_freeze import Phase

    scales = {"backbone": 0.1, "head": 2.0} if scaled else None
    return [
        Phase("*", epochs=1),
        Phase("head", steps=4),
        Phase("*", epochs=1, lr_scale=scales),
        Phase(["neck", "head"]),
    ]


def weights(optimizer: str, mode: str, scheduler: str) -> dict[str, Tensor] | str:
    """Return what a fit learns, or the error that it ends in."""
    from lightning_freeze import FreezeSchedule

    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator))
    torch.manual_seed(0)
    net = Net(optimizer, mode, scheduler)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[FreezeSchedule(phases(mode != "by norm, unscaled"), verbose=False)],
        **MODES[mode],
    )  # fmt: skip
    try:
        trainer.fit(net, DataLoader(data, 4), DataLoader(data, 8))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return dict(net.state_dict())


def fit_all(file: Path) -> None:
    """Fit every combination with the edition that Python finds, and write what they learn."""
    import lightning_freeze

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_freeze"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {" | ".join(names): weights(*names) for names in combinations()}
    torch.save({"of": str(Path(lightning_freeze.__file__).parent), "found": found}, file)


def fitted(tree: Path, file: Path) -> dict[str, Any]:
    """Return what the edition in a tree learns."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--fit", str(file)]
    subprocess.run(command, env=environment, cwd=tree, check=True, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = torch.load(file, weights_only=True)
    if Path(result["of"]) != tree / "lightning_freeze":
        raise RuntimeError(f"{tree} was meant to be fitted with, and {result['of']} was.")
    found: dict[str, Any] = result["found"]
    return found


def unpack(revision: str, folder: Path) -> Path:
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def apart(one: Any, other: Any) -> tuple[float, str]:
    """Return the greatest difference, relative to the greatest weight of its tensor, and that tensor's name."""
    if isinstance(one, str) or isinstance(other, str):
        return (0.0 if one == other else float("inf")), "an error"
    unequal = [name for name in one if not torch.equal(one[name], other[name])]
    pairs = [(one[name].double(), other[name].double(), name) for name in unequal]
    return max((((a - b).abs().max() / a.abs().max()).item(), name) for a, b, name in pairs) if pairs else (0.0, "")


def show(first: dict[str, Any], now: dict[str, Any]) -> None:
    differences = {names: apart(first[names], now[names]) for names in first}
    print(f"bit-equal of {len(SCHEDULERS)} schedulers".ljust(26) + "".join(mode.rjust(24) for mode in MODES))
    for optimizer in OPTIMIZERS:
        row = optimizer.ljust(26)
        for mode in MODES:
            own = [d for names, (d, _) in differences.items() if names.split(" | ")[:2] == [optimizer, mode]]
            row += f"{sum(d == 0 for d in own)} of {len(own)}".rjust(24)
        print(row)
    unequal = {names: found for names, found in differences.items() if found[0]}
    errors = [f"{names}: {result}" for names, result in now.items() if isinstance(result, str)]
    print(f"\n{len(differences) - len(unequal)} of {len(differences)} bit-equal; {len(errors)} fits ended in an error")
    for line in errors:
        print(f"  error: {line}")
    for names, (difference, name) in unequal.items():
        said = "as expected" if names.split(" | ")[1] == EXPECTED else "DIFFERS"
        print(f"  {said}: {names}: by {difference:.1e} of the greatest weight, most in {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default=FIRST, help="the commit to compare with")
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit is not None:
        fit_all(args.fit)
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = unpack(args.revision, Path(folder).resolve() / "first")
        first = fitted(tree, Path(folder) / "first.pt")
        now = fitted(ROOT, Path(folder) / "now.pt")
    print(f"{args.revision} beside this tree: {EPOCHS} epochs of {BATCHES} batches, four phases\n")
    show(first, now)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
