"""The optimizers that people use, by package; a package that is not installed has none."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Make = Callable[[Any], Any]

# What a constructor cannot do without, or does better with, on a small net on a CPU; where it takes it.
OPTIONS: dict[str, Any] = {"momentum": 0.9, "num_data": 16, "num_iterations": 16, "triton": False}
# Bases of others, and what is no optimizer of parameters.
BASES = {"Optimizer", "BaseOptimizer", "PSGDBase", "SOAPBase", "_AdamW", "SplitOpt", "Lookahead", "SAMWrapper"}


def by_class(cls: Any) -> Make:
    """An optimizer of a class with its own defaults, and a rate and a momentum where it has none."""
    known = inspect.signature(cls).parameters
    without = (0, None, inspect.Parameter.empty)
    options = {key: value for key, value in OPTIONS.items() if key in known and known[key].default in without}
    if "lr" in known and known["lr"].default is inspect.Parameter.empty:
        options["lr"] = 1e-2
    return lambda params: cls(params, **options)


def classes(module: Any, names: Iterator[str] | list[str] | None = None) -> dict[str, Make]:
    """All optimizers that a module shows, or those of a list."""
    found = {}
    for name in names if names is not None else sorted(vars(module)):
        cls = getattr(module, name, None)
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in BASES:
            found[name] = by_class(cls)
    return found


def of_torch() -> dict[str, Make]:
    found = classes(torch.optim, [name for name in torch.optim.__all__ if name != "Optimizer"])
    found["AdamW(fused=True)"] = lambda params: torch.optim.AdamW(params, fused=True)
    found["AdamW(foreach=True, amsgrad=True)"] = lambda params: torch.optim.AdamW(params, foreach=True, amsgrad=True)
    found["SGD(nesterov=True, differentiable=False)"] = lambda params: torch.optim.SGD(
        params, lr=0.01, momentum=0.9, nesterov=True
    )
    return found


def of_timm() -> dict[str, Make]:
    timm = importlib.import_module("timm.optim")
    # A name with bnb or fused stands for bitsandbytes' or apex's optimizer.
    names = [name for name in timm.list_optimizers() if not name.startswith(("bnb", "fused"))]
    return {name: _timm(name) for name in [*names, "lookahead_adamw"]}


def _timm(name: str) -> Make:
    def make(params: Any) -> Any:
        timm = importlib.import_module("timm.optim")
        return timm.create_optimizer_v2(list(params), opt=name, lr=1e-2)

    return make


def of_pytorch_optimizer() -> dict[str, Make]:
    module = importlib.import_module("pytorch_optimizer")
    found = {}
    for name in module.get_supported_optimizers():
        cls = module.load_optimizer(name)
        found[cls.__name__] = by_class(cls)
    base = torch.optim.AdamW
    found["Lookahead"] = lambda params: module.Lookahead(base(params))
    found["OrthoGrad"] = lambda params: module.OrthoGrad(base(params))
    found["TRAC"] = lambda params: module.TRAC(base(params))
    found["SAM"] = lambda params: module.SAM(params, base, lr=1e-2)
    return found


def of_schedulefree() -> dict[str, Make]:
    module = importlib.import_module("schedulefree")
    found = classes(module, [name for name in vars(module) if "Free" in name and "Wrapper" not in name])
    found["ScheduleFreeWrapper"] = lambda params: module.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.01))
    return found


def of_heavyball() -> dict[str, Make]:
    module = importlib.import_module("heavyball")
    module.utils.compile_mode = None  # each would be compiled for a minute
    return classes(module, ["AdamW", "ADOPT", "LaProp", "Muon", "NAdam", "PSGDKron", "SFAdamW", "SGD", "SOAP"])


def of_torch_optimizer() -> dict[str, Make]:
    module = importlib.import_module("torch_optimizer")
    found = classes(module)
    found["Lookahead"] = lambda params: module.Lookahead(torch.optim.AdamW(params))
    return found


def of_bitsandbytes() -> dict[str, Make]:
    module = importlib.import_module("bitsandbytes.optim")
    return classes(module, ["AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion8bit", "SGD8bit"])


def shown(path: str, *names: str) -> Callable[[], dict[str, Make]]:
    return lambda: classes(importlib.import_module(path), list(names) if names else None)


#: The name of a package as pip knows it, and what finds its optimizers.
PACKAGES: Mapping[str, Callable[[], dict[str, Make]]] = {
    "torch": of_torch,
    "timm": of_timm,
    "pytorch-optimizer": of_pytorch_optimizer,
    "schedulefree": of_schedulefree,
    "prodigyopt": shown("prodigyopt"),
    "prodigy-plus-schedule-free": shown("prodigyplus", "ProdigyPlusScheduleFree"),
    "dadaptation": shown("dadaptation"),
    "lion-pytorch": shown("lion_pytorch"),
    "adabelief-pytorch": shown("adabelief_pytorch"),
    "adan-pytorch": shown("adan_pytorch"),
    "adam-atan2-pytorch": shown("adam_atan2_pytorch"),
    "adamp": shown("adamp"),
    "apollo-torch": shown("apollo_torch", "APOLLOAdamW"),
    "came-pytorch": shown("came_pytorch"),
    "galore-torch": shown("galore_torch", "GaLoreAdamW", "GaLoreAdafactor"),
    "grokadamw": shown("grokadamw"),
    "heavyball": of_heavyball,
    "kron-torch": shown("kron_torch", "Kron"),
    "madgrad": shown("madgrad"),
    "pytorch-lamb": shown("pytorch_lamb"),
    "pytorch-ranger": shown("pytorch_ranger"),
    "ranger-adabelief": shown("ranger_adabelief"),
    "sgd-sai": shown("sgd_sai"),
    "torch-optimi": shown("optimi"),
    "torch-optimizer": of_torch_optimizer,
    "torchao": shown("torchao.optim", "AdamW8bit", "AdamW4bit", "AdamWFp8"),
    "transformers": shown("transformers", "Adafactor"),
    "bitsandbytes": of_bitsandbytes,
}


@functools.cache
def of(package: str) -> dict[str, Make] | None:
    """The optimizers of a package by name, None if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return PACKAGES[package]()
        except ImportError:
            return None


def names(*packages: str) -> list[str]:
    """``package: name`` of all optimizers of packages that are installed."""
    return [f"{package}: {name}" for package in packages or PACKAGES for name in of(package) or ()]


def make(name: str) -> Make:
    """What builds the optimizer of such a name."""
    package, _, own = name.partition(": ")
    return (of(package) or {})[own]
