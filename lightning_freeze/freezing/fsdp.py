"""FSDP and FSDP2: sharded parameters, and checkpoints that go by the names of parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_freeze import _distributed as dist
from lightning_freeze._lightning import ModelParallelStrategy, Strategy
from lightning_freeze.functional import can_train, frozen


def reshard(strategy: Strategy, module: nn.Module) -> None:
    """Free what FSDP2 has gathered, so that a module's parameters are the sharded ones, always the same objects.

    After a step with frozen parameters it leaves them gathered: tensors that it throws away, with flags of their own.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    for child in module.modules():
        if isinstance(child, dist.FSDPModule):
            child.reshard()


class CheckpointsByName:
    """Lets FSDP save and load the states of optimizers while parameters are frozen.

    It does so by the names of parameters, and when it loads, only for those that require grad; so for the time of a
    load, those require grad that have a state in the file. A single file is read with the ``weights_only`` that
    Lightning was asked for. Two methods of the strategy are covered until :meth:`release`. ``paused`` returns a context
    in which steps are nobody's: torch takes one to make the states it fills.
    """

    def __init__(
        self,
        strategy: Strategy,
        parameters: Mapping[str, nn.Parameter],
        paused: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._strategy: Any = strategy
        self._parameters, self._paused = parameters, paused
        vars(strategy).update(optimizer_state=self._optimizer_state, load_checkpoint=self._load_checkpoint)

    def release(self) -> None:
        """Uncover the strategy's own methods."""
        for name in ("optimizer_state", "load_checkpoint"):
            vars(self._strategy).pop(name, None)

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        reshard(self._strategy, self._strategy.lightning_module)
        state: dict[str, Any] = type(self._strategy).optimizer_state(self._strategy, optimizer)
        return state

    def _load_checkpoint(self, checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        reshard(self._strategy, self._strategy.lightning_module)
        path = Path(self._strategy.broadcast(checkpoint_path))
        if path.is_dir():
            saved, entries = [], dist.FileSystemReader(path).read_metadata().state_dict_metadata
            found = (re.fullmatch(r"optimizer_\d+\.state\.(.+)\.\w+", entry) for entry in entries)
            have_state = {match[1] for match in found if match}
        else:
            # Lightning 2.5 has no such option, and loads whatever is in the file.
            read = torch.load(path, mmap=True, map_location="cpu", **({"weights_only": False} | options))
            saved = read["optimizer_states"]
            names = list(self._parameters)
            # The file has names of parameters, or numbers in the module's order.
            have_state = {names[key] if isinstance(key, int) else key for state in saved for key in state["state"]}
        with frozen(self._strategy.lightning_module), self._paused():
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(name in have_state and can_train(parameter))
            return self._load(path, saved, options)

    def _load(self, path: Path, saved: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        """Load as the strategy does, except where FSDP2 would fail at what was saved while something was frozen."""
        strategy = self._strategy
        load: Callable[[], dict[str, Any]] = partial(type(strategy).load_checkpoint, strategy, path, **options)
        # Lightning's loop over the states in one file ends in an IndexError at an empty one.
        if not isinstance(strategy, ModelParallelStrategy) or all(state["state"] for state in saved):
            return load()
        optimizers, strategy.optimizers = strategy.optimizers, []
        try:
            checkpoint = load()
        finally:
            strategy.optimizers = optimizers
        for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
            _load_state(strategy, optimizer, state)
        return checkpoint


def _load_state(strategy: Any, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load one optimizer's state as Lightning does, also if it has none."""
    if not state["state"]:
        optimizer.load_state_dict(state)
        return
    model, strict = strategy.model, strategy.lightning_module.strict_loading
    options = dist.StateDictOptions(broadcast_from_rank0=True, full_state_dict=True, strict=strict)
    named = dist.FullyShardedDataParallel.rekey_optim_state_dict(state, dist.OptimStateKeyType.PARAM_NAME, model)
    dist.set_optimizer_state_dict(model, optimizer, optim_state_dict=named, options=options)
