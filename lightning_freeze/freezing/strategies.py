"""What a strategy needs when the set of trainable parameters changes, and how its ranks come to one decision.

Everything here is for all ranks at the same step, or does nothing on one device.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, OptimStateKeyType
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_freeze._lightning import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
_UNSUPPORTED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which the trainable set cannot change exactly.

    Raises:
        MisconfigurationException: If the strategy is not for one device, DDP, FSDP or FSDP2, nor a subclass of those;
            if it is FSDP with ``use_orig_params=False``; or if it is one of the package ``pytorch_lightning``.
    """
    name = type(strategy).__name__
    if any(base.__module__.startswith("pytorch_lightning.") for base in type(strategy).__mro__):
        raise MisconfigurationException(
            f"{name} comes from the package pytorch_lightning, whose classes are not those of lightning.pytorch. "
            "Import Trainer and LightningModule from lightning.pytorch."
        )
    if not isinstance(strategy, _SUPPORTED) or isinstance(strategy, _UNSUPPORTED):
        raise MisconfigurationException(
            f"Parameters cannot freeze during a fit with {name} and stay exact. Use one device, strategy='ddp', "
            "ModelParallelStrategy (FSDP2) or FSDPStrategy; a strategy of your own that is a subclass of one of them "
            "works too."
        )
    if isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        raise MisconfigurationException(
            f"{name}(use_orig_params=False) makes one flat parameter of all in a unit, which cannot freeze in part. "
            f"Use {name}(use_orig_params=True)."
        )


def follow_trainable_set(strategy: Strategy, froze: Iterable[nn.Parameter] = ()) -> None:
    """Make the wrapper know what trains now. Under DDP every rank must call it at the same step.

    DDP's reducer only knows parameters that required grad when it was built; one that is unfrozen later would never be
    reduced and replicas would drift apart in silence. So the wrapper is built anew, without the broadcast of
    parameters: they are equal on all ranks, or are meant not to be between two steps of a model averager.

    Args:
        strategy: Any strategy that :func:`check_strategy` accepts.
        froze: What has just frozen. Between two steps of a model averager replicas differ; these are averaged now, as
            they will not be later.
    """
    if not (isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel)):
        return
    if not any(parameter.requires_grad for parameter in strategy.model.parameters()):
        return  # DDP cannot be built so; another callback unfreezes some, or backward says that nothing requires grad
    averager, frozen = strategy._model_averager, list(froze)
    if isinstance(averager, PeriodicModelAverager) and averager.step > averager.warmup_steps and frozen:
        average_parameters(iter(frozen), averager.process_group)
    _rebuild_ddp(strategy, strategy.model)


def reshard(strategy: Strategy, module: nn.Module) -> None:
    """Free what FSDP2 has gathered, so that a module's parameters are the sharded ones, always the same objects.

    After a step with frozen parameters FSDP2 leaves them gathered: tensors that it will throw away, and in which it
    does not look for flags.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


class CheckpointsByName:
    """Keeps optimizers whole while FSDP saves or loads their states, which it does by the names of their parameters.

    Those functions of torch look at the optimizer's groups also outside its own ``state_dict()``, and when they load,
    only at parameters that require grad. So both are set for the time of the call. A single file is read with the
    ``weights_only`` that Lightning is given. Other strategies are left alone.

    Args:
        strategy: Any strategy; a method or two of this one object are covered until :meth:`release`.
        whole: Gives, for the time of the context, every optimizer with all the parameters the user gave it.
        parameters: All parameters of the module, by name.
    """

    def __init__(
        self,
        strategy: Strategy,
        whole: Callable[[], AbstractContextManager[None]],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self._strategy: Any = strategy if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) else None
        self._whole = whole
        self._parameters = parameters
        if self._strategy is not None:
            vars(self._strategy).update(optimizer_state=self._optimizer_state, load_checkpoint=self._load_checkpoint)

    def release(self) -> None:
        """Uncover the strategy's own methods."""
        if self._strategy is not None:
            for name in ("optimizer_state", "load_checkpoint"):
                self._strategy.__dict__.pop(name, None)

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        reshard(self._strategy, self._strategy.lightning_module)
        with self._whole():
            state: dict[str, Any] = type(self._strategy).optimizer_state(self._strategy, optimizer)
        return state

    def _load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        reshard(self._strategy, self._strategy.lightning_module)
        flags = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        path = Path(self._strategy.broadcast(checkpoint_path))
        if path.is_dir():
            saved, have_state = None, {match[1] for match in _entries(path, r"optimizer_\d+\.state\.(.+)\.\w+")}
        else:
            saved = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)["optimizer_states"]
            have_state = _names_with_state(saved, list(self._parameters))
        try:
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(
                    name in have_state and (parameter.is_floating_point() or parameter.is_complex())
                )
            with self._whole():
                checkpoint = self._load(path, saved, weights_only)
        finally:
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(flags[name])
        return checkpoint

    def _load(self, path: Path, saved: list[dict[str, Any]] | None, weights_only: bool | None) -> dict[str, Any]:
        """Load as the strategy does, except where FSDP2 would fail at what was saved while something was frozen."""
        strategy = self._strategy
        optimizers, fsdp2 = strategy.optimizers, isinstance(strategy, ModelParallelStrategy)
        # Lightning's loop over the states in one file ends in an IndexError at an empty one.
        one_by_one = fsdp2 and saved is not None and not all(state["state"] for state in saved)
        if fsdp2 and saved is None:
            _hide_adopted(optimizers, path)
        try:
            strategy._optimizers = [] if one_by_one else optimizers
            checkpoint: dict[str, Any] = type(strategy).load_checkpoint(strategy, path, weights_only=weights_only)
        finally:
            strategy._optimizers = optimizers
        if one_by_one:
            for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
                _load_state(strategy, optimizer, state)
        return checkpoint


def _names_with_state(saved: Iterable[dict[str, Any]], names: Sequence[str]) -> set[str]:
    """Give the parameters of which optimizers in a file have state; they are named or numbered as the module's are."""
    keys = [key for state in saved for key in state["state"]]
    return {names[key] if isinstance(key, int) else key for key in keys}


def _load_state(strategy: ModelParallelStrategy, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load one optimizer's state as Lightning does, also if it has none."""
    model = strategy.model
    assert model is not None
    assert strategy.lightning_module is not None
    if not state["state"]:
        optimizer.load_state_dict(state)
        return
    options = StateDictOptions(
        broadcast_from_rank0=True, full_state_dict=True, strict=strategy.lightning_module.strict_loading
    )
    named = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=named, options=options)


def _hide_adopted(optimizers: Iterable[Optimizer], path: Path) -> None:
    """Take the adopted parameters' group out if a sharded checkpoint has none: torch asks it for all that is there."""
    if not _entries(path, r"optimizer_\d+\.param_groups\.\d+\.adopted.*"):
        for optimizer in optimizers:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if "adopted" not in group]


def _entries(path: Path, pattern: str) -> list[re.Match[str]]:
    """Give the entries of a sharded checkpoint that match."""
    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    return [match for key in keys if (match := re.fullmatch(pattern, key))]


def _rebuild_ddp(strategy: DDPStrategy, old: DistributedDataParallel) -> None:
    # Whoever still refers to the old wrapper must not make its reducer take part in the next backward.
    old._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    _forget_buckets(strategy._ddp_comm_state)
    strategy.model = old.module
    if strategy.root_device.type == "cuda":
        torch.cuda.synchronize(strategy.root_device)  # Lightning builds the wrapper in a stream of its own
    with _without_initial_broadcast(strategy):
        strategy.configure_ddp()
    new = strategy.model
    assert isinstance(new, DistributedDataParallel)
    if not new._comm_hooks:  # those registered on the wrapper by hand; the strategy's own are there again
        for hook, state in old._comm_hooks:
            _forget_buckets(state)
            new.register_comm_hook(state, hook)
    if new.will_sync_module_buffers():  # type: ignore[no-untyped-call]
        # Statistics that freeze now were local since the last forward; from here on they are those of rank 0.
        new._sync_buffers()  # type: ignore[no-untyped-call]
    # Manual optimization with static_graph: Lightning flushes a reducer's first reduction by hand, once.
    if hasattr(strategy, "_pl_static_graph_delay_done"):
        strategy._pl_static_graph_delay_done = False


@contextmanager
def _without_initial_broadcast(strategy: DDPStrategy) -> Iterator[None]:
    kwargs = strategy._ddp_kwargs
    if "init_sync" in inspect.signature(DistributedDataParallel).parameters:
        strategy._ddp_kwargs = {**kwargs, "init_sync": False}
    try:
        yield
    finally:
        strategy._ddp_kwargs = kwargs


def _forget_buckets(state: Any) -> None:
    """Make PowerSGD begin anew: what it keeps is by bucket, and a new reducer has other buckets, twice.

    A reducer orders its buckets anew after its first step, so two steps are sent whole, as at the beginning.
    """
    if isinstance(state, PowerSGDState):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        state.iter = min(state.iter, max(state.start_powerSGD_iter - 2, 0))


def check_agreement(strategy: Strategy, **facts: Any) -> None:
    """Compare what the ranks are about to do. Every rank must call it.

    Args:
        strategy: Any strategy.
        facts: What must be the same everywhere, by what to call it; anything whose ``repr`` tells it.

    Raises:
        RuntimeError: On every rank, if one differs in a fact; it names the fact and what the ranks have.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return
    mine = torch.tensor([_digest(repr(fact)) for fact in facts.values()], device=strategy.root_device)
    greatest, least = strategy.reduce(torch.stack([mine, -mine]), reduce_op="max")
    differ = [name for name, same in zip(facts, (greatest == -least).tolist(), strict=True) if not same]
    if not differ:
        return
    shown = "; ".join(f"{name} = {facts[name]!r}"[:500] for name in differ)
    raise RuntimeError(
        f"The ranks do not agree on the schedule's next phase: they differ in {' and '.join(differ)}. Here, on rank "
        f"{strategy.global_rank} of {strategy.world_size}: {shown}. Every rank needs the same module, the same "
        "schedule and the same number of training batches."
    )


def mean_over_ranks(strategy: Strategy, value: float | None) -> float | None:
    """Give the mean of a value over the ranks that have one, the same on every rank. Every rank must call it.

    Args:
        strategy: Any strategy.
        value: This rank's value, None if it has none.

    Returns:
        The mean; None if no rank has a value.

    Example:
        >>> mean_over_ranks(SingleDeviceStrategy(device="cpu"), 0.5)
        0.5
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return value
    pair = torch.tensor([0.0 if value is None else value, value is not None], dtype=torch.float64)
    total, count = strategy.reduce(pair.to(strategy.root_device), reduce_op="sum").tolist()
    return total / count if count else None


def only_true(strategy: Strategy, fact: bool) -> bool:
    """Give whether a fact holds on every rank, the same on every rank. Every rank must call it."""
    return strategy.reduce_boolean_decision(fact, all=True)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
