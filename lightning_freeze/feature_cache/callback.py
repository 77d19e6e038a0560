"""Outputs of a frozen module, computed once for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_freeze._lightning import (
    SHARDED,
    Callback,
    LightningModule,
    Trainer,
    callbacks_of,
    log_values,
    without_fit,
)
from lightning_freeze.feature_cache.arguments import (
    check_dtype,
    check_max_bytes,
    check_module,
    check_storage,
    modules_by_name,
    sequential_links,
)
from lightning_freeze.feature_cache.chain import FeatureChain
from lightning_freeze.feature_cache.folder import FolderRows
from lightning_freeze.feature_cache.hashing import DeviceHash, Hash
from lightning_freeze.feature_cache.rows import MemoryRows, available_memory
from lightning_freeze.feature_cache.stats import Counts, FeatureStats, Stages
from lightning_freeze.logs import get_logger

_say = partial(get_logger(__name__).info, "FeatureCache: %s")
_ON_DEVICE = DeviceHash()  # what one fit has kept another finds by the same secrets


class FeatureCache(Callback):
    """Compute the outputs of a frozen module once for each sample, then take them from memory.

    While a module is wholly frozen and no layer in it is random or looks at the whole batch, its output for a sample
    depends on that sample alone. Everything it depends on is in the key: the bytes of the sample, the size of the
    batch, other arguments, modes and settings, and the module's weights, buffers and code. So data sets, loaders and
    shuffling stay as they are, and nothing becomes stale: what is not the same is not found. Losses and weights are
    those without the cache, bit for bit, whether :class:`FreezeSchedule` freezes the module or ``requires_grad_``.

    Weights written to in place are seen at the next call, and so are attributes; a write through ``tensor.data``, which
    PyTorch does not count, and attributes of torch's own layers, such as ``layer.eps``, at the first call of the next
    epoch or validation. What the module sets when it runs is set when its output comes from memory. What it reads from
    elsewhere, such as a global or a NumPy array, is not watched: call :meth:`clear` if you change it. The first batch
    that comes back is computed and compared, so is the first that is put together anew, and ever fewer later on.
    Features serve batches of another size only after a whole batch was seen to have the same bits in both, and never in
    half precision: there, a short last batch is computed in each epoch. Should a kernel differ from itself by rounding,
    ``stats.difference`` keeps by how much; if it does so only for samples in other places of a batch, only whole
    batches are answered.

    It is off, with a sentence that says why, for modules that are random, depend on the batch, write into their input,
    have forward hooks or keep tensors for others to read; where the input requires grad; for TorchScript, and weights
    that are more than their bytes, such as quantized ones; under FSDP and DeepSpeed; and in a stage of whose samples
    fewer than 2 % come back, as with random augmentation, or are answered because the rest does not fit: a batch is
    answered only if all of its samples are there. Calls of ``module(x)`` are answered, not of ``module.forward(x)``,
    nor any within something that ``torch.compile`` compiled around it: compile the module itself.

    Args:
        module: The dotted name of the module, such as ``"backbone"``. If it is an ``nn.Sequential`` or
            ``nn.ModuleList``, or a list of names of modules that run one on the output of the other, the cache reaches
            up to the deepest one that is still wholly frozen, and moves as phases do. They may be given other tensors,
            too, such as masks; where something else reads what is between, that is computed.
        max_bytes: The most bytes to keep; what does not fit is computed. By default half of the memory that is
            available when the fit starts, shared by the processes on this machine, or of the disk space that would be
            free without the folder. On a GPU rows stay there, in a quarter of what is free, then on the host.
        storage: ``"memory"``, or a folder, which later runs can use and the ranks of a run share. Damaged rows are
            computed anew; if it is full, or removed in mid-fit, what was there serves on.
        dtype: Keep wider floating numbers in this dtype, such as ``torch.float16`` to halve the space. Outputs are then
            rounded to it, whether they come from memory or not.

    Attributes:
        stats: What was done so far, and whether the cache is active and why not: a :class:`FeatureStats`. Under
            ``ddp_spawn`` and ``ddp_fork`` it stays in the processes that train: use ``strategy="ddp"`` to read it.

    Logs, after each training epoch: its ``cache/hits`` and ``cache/misses``, ``cache/bytes``, ``cache/seconds_saved``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range; at fit start, if ``module`` or ``storage`` names something else.
        RuntimeError: At fit start, if another run uses the folder.

    Example:
        >>> cache = FeatureCache("backbone", max_bytes=2_000_000_000)
        >>> cache.stats.active, cache.stats.why
        (False, 'it has not begun')
    """

    def __init__(
        self,
        module: str | Sequence[str],
        *,
        max_bytes: float | None = None,
        storage: str | Path = "memory",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        self.module = check_module(module)
        self.max_bytes = check_max_bytes(max_bytes)
        self.storage = check_storage(storage)
        self.dtype = check_dtype(dtype)
        self._chain: FeatureChain | None = None
        self._rows: MemoryRows | FolderRows | None = None
        self._stages = Stages(Counts)
        self._stats = FeatureStats()
        self._idle: str | None = None

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer have states of their own, by module."""
        return self._generate_state_key(module=self.module)

    @property
    def stats(self) -> FeatureStats:
        """What was done so far, and whether the cache is active and why not."""
        if self._chain is not None:
            self._stats = self._chain.stats()
            if self._idle is not None and not self._chain.was_called:
                self._stats = replace(self._stats, active=False, why=self._idle, covers=())
        return self._stats

    def clear(self) -> None:
        """Forget all features, also those kept for another fit or test with the same weights; a folder stays."""
        if self._chain is not None:
            self._chain.close()
        elif isinstance(self._rows, MemoryRows):
            self._rows = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the module's calls from now on, and read the weights anew."""
        self._begin(trainer, pl_module)
        if self._chain is not None:
            self._chain.recheck()

    # What is written through ``tensor.data`` does not count as written.
    on_validation_start = on_test_start = on_predict_start = on_train_epoch_start = on_fit_start

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read those weights anew that the optimizer is about to change: fused ones do not count what they write."""
        if self._chain is not None:
            self._chain.recheck(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Compute what the user keeps of what is between the modules of a chain."""
        if self._chain is not None:
            self._chain.settle()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge whether samples come back, and read the weights anew: averaged ones may have been there meanwhile."""
        if self._chain is not None:
            if not trainer.sanity_checking:
                self._chain.end_epoch("validate")
            self._chain.recheck()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and judge whether the module is called and samples come back."""
        if self._chain is None:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.current.completed:
            self._notice_idleness(trainer, self._chain)
        self._chain.end_epoch("train")
        (hits, misses), stats = self._stages["train"].last_epoch, self.stats
        values = {"hits": hits, "misses": misses, "bytes": stats.bytes, "seconds_saved": stats.seconds_saved}
        log_values(trainer, {f"cache/{name}": float(value) for name, value in values.items()})

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Let the module run by itself."""
        try:
            if self._chain is not None:
                self._chain.__exit__()
                self._stats = self.stats
        finally:
            self._chain = None
            if isinstance(self._rows, FolderRows):
                self._rows.close()
                self._rows = None

    on_exception = teardown

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._chain is not None:
            return
        if isinstance(trainer.strategy, SHARDED):
            why = f"under {type(trainer.strategy).__name__} a process has only a part of the weights"
            self._stats = FeatureStats(why=why)
            _say(f"{self.module}: off, because {why}.")
            return
        found = modules_by_name(pl_module, self.module)
        whole = next(iter(found.items())) if isinstance(self.module, str) and len(found) == 1 else None
        links = found if whole is None else sequential_links(*whole)
        for other in callbacks_of(trainer):
            if not isinstance(other, FeatureCache) or (chain := other._chain) is None:
                continue
            for name in [name for name, module in (found | links).items() if chain.answers_for(module)]:
                raise ValueError(
                    f"FeatureCache(module={other.module!r}) and FeatureCache(module={self.module!r}) would both "
                    f"remember what {name} gives. Leave one of them out; one with a list of modules caches as many of "
                    "them as are frozen."
                )
        if isinstance(self.storage, Path):
            rank, ranks = trainer.global_rank, trainer.world_size
            self._rows = FolderRows(self.storage, rank, max_bytes=self.max_bytes, ranks=ranks)
        elif self._rows is None:
            self._rows = MemoryRows(self.max_bytes or available_memory() // 2 // max(1, trainer.num_devices))
        is_on_device = isinstance(self._rows, MemoryRows) and pl_module.device.type == "cuda"
        hashing = _ON_DEVICE if is_on_device else Hash()
        self._stages.begin(lambda: str(trainer.state.stage.value) if trainer.state.stage is not None else "")
        options: dict[str, Any] = {"hashing": hashing, "dtype": self.dtype, "stages": self._stages, "say": _say}
        self._chain = FeatureChain(whole, links, rows=self._rows, **options).__enter__()

    def _notice_idleness(self, trainer: Trainer, chain: FeatureChain) -> None:
        if not chain.was_called and self._idle is None and chain.stats().covers:
            self._idle = f"it was never called in training epoch {trainer.current_epoch}"
            _say(
                f"{chain.name}: of no use, because {self._idle}: only calls of the module itself are answered, not of "
                "its other methods, of modules in it, nor any in code that is compiled around it. Name the modules "
                "that are called."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(self, _chain=None, _rows=None, _stages=Stages(Counts))
