"""Gradient norms: how many times faster than the two ways that people have today.

Beside each other in one run, interleaved, so that whatever else the machine does hits all of them: this package,
`lightning.pytorch.utilities.grad_norm`, and the loop with `.item()` that people write. First the functions alone, ours
being those that `NormLogger` measures with; then logging in a Trainer, ours being a `NormLogger`, the others in
`on_before_optimizer_step` with `self.log` or `self.log_dict`, as Lightning's documentation shows it: what a logged step
takes longer than one that logs nothing. `NormLogger` gives more there: norms before and after clipping, and the
gradients that are not finite.
Prints the ratio of each alternative's time to ours: minimum, median and maximum over the repetitions.

Run it with `python benchmarks/norms.py`, on a GPU with `--device cuda`.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_freeze import NormLogger
from lightning_freeze.norms.core import gradients, measure, read
from lightning_freeze.selectors import named_unique_parameters

SIZES = {"bias-sized, 64": (64,), "small, 64x64": (64, 64), "large, 256x256": (256, 256)}


def model(tensors: int, shape: tuple[int, ...], device: str) -> nn.Module:
    """Parameters with gradients, nested as in a network: blocks of layers with a weight and a bias."""
    net = nn.Module()
    for index in range(tensors // 2):
        layer = nn.Module()
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.randn(shape, device=device))
            parameter.grad = torch.randn_like(parameter)
            layer.register_parameter(name, parameter)
        block = f"block{index // 10}"
        if not hasattr(net, block):
            net.add_module(block, nn.Module())
        net.get_submodule(block).add_module(f"layer{index}", layer)
    return net


def gradient_norms(net: nn.Module) -> dict[str, float]:
    (norms,) = read([measure(gradients(named_unique_parameters(net)))])
    return norms


def item_total(net: nn.Module) -> float:
    total = 0.0
    for parameter in net.parameters():
        if parameter.grad is not None:
            total += parameter.grad.norm(2).item() ** 2
    return total**0.5


def item_each(net: nn.Module) -> dict[str, float]:
    return {name: p.grad.norm(2).item() for name, p in net.named_parameters() if p.grad is not None}


def lightning_each(net: nn.Module) -> dict[str, float]:
    """As numbers, which is what a logger makes of them."""
    return {name: float(norm) for name, norm in grad_norm(net, 2).items()}


def clock(device: str) -> float:
    """On the CPU, this process's own time: what else the machine does is not counted."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def seconds(function: Callable[[], object], device: str) -> float:
    start = clock(device)
    function()
    return clock(device) - start


def report(label: str, ours: Sequence[float], ratios: dict[str, list[float]]) -> None:
    for name, values in ratios.items():
        print(
            f"  {label:<9}  ours {1e3 * statistics.median(ours):8.2f} ms   {name:<12} takes "
            f"{min(values):5.2f} / {statistics.median(values):5.2f} / {max(values):5.2f} times as long",
            flush=True,
        )


def compare(net: nn.Module, repetitions: int, device: str) -> None:
    # Lightning has no function for the total alone: people take it from all of them.
    cases: dict[str, tuple[Callable[[], object], dict[str, Callable[[], object]]]] = {
        "total": (
            lambda: math.hypot(*gradient_norms(net).values()),
            {
                "grad_norm": lambda: float(grad_norm(net, 2)["grad_2.0_norm_total"]),
                ".item() loop": lambda: item_total(net),
            },
        ),
        "parameter": (
            lambda: gradient_norms(net),
            {"grad_norm": lambda: lightning_each(net), ".item() loop": lambda: item_each(net)},
        ),
    }
    for what, (ours, others) in cases.items():
        for function in (ours, *others.values()):
            function()
        mine: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in others}
        for _ in range(repetitions):
            mine.append(seconds(ours, device))
            for name, function in others.items():
                ratios[name].append(seconds(function, device) / mine[-1])
        report(what, mine, ratios)


class Logs(LightningModule):
    """Trains parameters, and logs norms in one of the ways that people have."""

    def __init__(self, net: nn.Module, way: str) -> None:
        super().__init__()
        self.net = net
        self.way = way

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.cat([parameter.view(-1) for parameter in self.net.parameters()]).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.way == "grad_norm, total":
            self.log("norm", grad_norm(self.net, 2)["grad_2.0_norm_total"])
        elif self.way == "grad_norm, parameter":
            self.log_dict(grad_norm(self.net, 2))
        elif self.way == ".item() loop, total":
            self.log("norm", item_total(self.net))
        elif self.way == ".item() loop, parameter":
            self.log_dict(item_each(self.net))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class StepTimes(Callback):
    """When each step began."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.times.append(clock(self.device))


def step_seconds(net: nn.Module, way: str, callbacks: list[Callback], device: str) -> float:
    """Train with a log in every step, and give the median time of a step."""
    steps = StepTimes(device)
    trainer = Trainer(
        max_steps=12,
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        callbacks=[*callbacks, steps],
        logger=DummyLogger(),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logs(net, way), DataLoader(torch.zeros(12, 1)))  # type: ignore[arg-type]
    return statistics.median(after - before for before, after in pairwise(steps.times[1:]))


def compare_in_trainer(net: nn.Module, rounds: int, device: str) -> None:
    for what in ("total", "parameter"):
        times: dict[str, list[float]] = {"bare": [], "ours": [], "grad_norm": [], ".item() loop": []}
        for _ in range(rounds):
            for way, values in times.items():
                callbacks = [NormLogger(per=what, what=("grad",), every_n_steps=1)] if way == "ours" else []
                values.append(step_seconds(net, f"{way}, {what}", callbacks, device))
        bare = statistics.median(times.pop("bare"))
        costs = {way: [value - bare for value in values] for way, values in times.items()}
        mine = costs.pop("ours")
        ours = statistics.median(mine)
        report(what, mine, {way: [value / ours for value in values] for way, values in costs.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--rounds", type=int, default=5, help="how often to train in each way")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; ratios: min / median / max")
    for tensors in (160, 1000):
        for label, shape in SIZES.items():
            print(f"{tensors} tensors ({label})")
            compare(model(tensors, shape, options.device), options.repetitions, options.device)
    for tensors in (160, 1000):
        label, shape = next(iter(SIZES.items()))  # beside the step of larger ones nothing else shows
        print(f"logged in a Trainer, {tensors} tensors ({label})")
        compare_in_trainer(model(tensors, shape, options.device), options.rounds, options.device)


if __name__ == "__main__":
    main()
