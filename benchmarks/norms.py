"""Gradient norms: how many times faster than the two ways that people have today.

Beside each other in one run, interleaved, so that whatever else the machine does hits all of them: `gradient_norms` of
this package, `lightning.pytorch.utilities.grad_norm`, and the loop with `.item()` that people write. Prints the ratio
of each alternative's time to ours: minimum, median and maximum over the repetitions.

Run it with `python benchmarks/norms.py`, on a GPU with `--device cuda`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from lightning.pytorch.utilities import grad_norm
from torch import nn

from lightning_freeze.norms import gradient_norms

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


def seconds(function: Callable[[], object], device: str) -> float:
    """On the CPU, of this process's own time: what else the machine does is not counted."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    function()
    return clock() - start


def compare(net: nn.Module, repetitions: int, device: str) -> None:
    # Lightning has no function for the total alone: people take it from all of them.
    cases: dict[str, tuple[Callable[[], object], dict[str, Callable[[], object]]]] = {
        "total": (
            lambda: gradient_norms(net, per="total"),
            {
                "grad_norm": lambda: float(grad_norm(net, 2)["grad_2.0_norm_total"]),
                ".item() loop": lambda: item_total(net),
            },
        ),
        "parameter": (
            lambda: gradient_norms(net, per="parameter"),
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
        for name, values in ratios.items():
            print(
                f"  {what:<9}  ours {1e3 * statistics.median(mine):8.2f} ms   {name:<12} takes "
                f"{min(values):5.2f} / {statistics.median(values):5.2f} / {max(values):5.2f} times as long"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=31)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; ratios: min / median / max")
    for tensors in (160, 1000):
        for label, shape in SIZES.items():
            print(f"{tensors} tensors ({label})")
            compare(model(tensors, shape, options.device), options.repetitions, options.device)


if __name__ == "__main__":
    main()
