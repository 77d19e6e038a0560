"""DDP's wrapper, built anew where the set of trainable parameters changes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_freeze._distributed import PeriodicModelAverager, PowerSGDState, average_parameters
from lightning_freeze._lightning import DDPStrategy, Strategy


def follow_trainable_set(strategy: Strategy, froze: Sequence[nn.Parameter] = ()) -> None:
    """Build the wrapper of DDP for what trains now; other strategies need nothing. For all ranks at the same step.

    DDP's reducer only knows parameters that required grad when it was built; one that is unfrozen later would never be
    reduced and replicas would drift apart in silence. So the wrapper is built anew, without the broadcast of
    parameters. Between two steps of a model averager replicas differ; what just ``froze`` is averaged now.
    """
    if not (isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel)):
        return
    if not any(parameter.requires_grad for parameter in strategy.model.parameters()):
        return  # DDP cannot be built so; another callback unfreezes some, or backward says that nothing requires grad
    averager = strategy._model_averager
    if isinstance(averager, PeriodicModelAverager) and averager.step > averager.warmup_steps and froze:
        average_parameters(iter(froze), averager.process_group)
    _rebuild_ddp(strategy, strategy.model)


def _rebuild_ddp(strategy: DDPStrategy, old: DistributedDataParallel) -> None:
    # Whoever still refers to the old wrapper must not make its reducer take part in the next backward.
    old._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    _forget_buckets(strategy._ddp_comm_state)
    strategy.model = old.module
    if strategy.root_device.type == "cuda":
        torch.cuda.synchronize(strategy.root_device)  # Lightning builds the wrapper in a stream of its own
    kwargs = strategy._ddp_kwargs
    if "init_sync" in inspect.signature(DistributedDataParallel).parameters:
        strategy._ddp_kwargs = {**kwargs, "init_sync": False}
    try:
        strategy.configure_ddp()
    finally:  # a fit after an error begins with that broadcast
        strategy._ddp_kwargs = kwargs
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


def _forget_buckets(state: Any) -> None:
    """Make PowerSGD begin anew: what it keeps is by bucket, and a new reducer has other buckets, twice."""
    if isinstance(state, PowerSGDState):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        state.iter = min(state.iter, max(state.start_powerSGD_iter - 2, 0))
