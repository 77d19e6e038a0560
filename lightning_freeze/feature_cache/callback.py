"""Outputs of a frozen module, computed once for each sample."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_freeze._lightning import (
    Callback,
    DeepSpeedStrategy,
    FSDPStrategy,
    LightningModule,
    ModelParallelStrategy,
    Trainer,
    without_fit,
)
from lightning_freeze.feature_cache.chain import FeatureChain, FeatureStats, Kept, sequential_links
from lightning_freeze.feature_cache.interceptor import is_compiled_around
from lightning_freeze.feature_cache.stores import Folder, available_memory
from lightning_freeze.logs import get_logger
from lightning_freeze.selectors import clean_name

_log = get_logger(__name__)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class FeatureCache(Callback):
    """Compute the outputs of a frozen module once for each sample, then take them from memory.

    While a module is wholly frozen and no layer in it is random or looks at the whole batch, its output for a sample
    depends on that sample alone. Each sample is recognised by a 128-bit hash of all its bytes, so nothing about data
    set, loader or shuffling has to change: samples that come back are answered from memory, others are computed. Losses
    and weights are those without the cache, bit for bit.

    Whether the conditions hold is looked up in every call, not assumed: a parameter that trains, a layer in train mode
    whose output is then random or depends on the batch, or another module, weight or buffer turns the cache off or
    empties it. So it works beside :class:`FreezeSchedule` and :class:`FreezeBatchNorm`, in any order, and beside
    ``requires_grad_(False)`` by hand. Weights written to in place, by ``load_state_dict`` or by an optimizer, are seen
    at the next call; a write through ``tensor.data``, which PyTorch does not count, at the first call of the next epoch
    or validation. A ``forward`` that is replaced is seen at the next call if it is the module's own or belongs to a
    graph of ``torch.fx``, such as torchvision's feature extractors, and with the next epoch or validation if it is that
    of another module inside. What a layer reads from plain attributes, such as ``layer.eps``, is not watched: call
    :meth:`clear` if you change it. A module that does more than give an output is found out in its second run, and not
    cached: one that draws random numbers, writes into its input or keeps tensors aside for others to read.

    The bits of an output can depend on the size of the batch, because kernels are chosen by shape. Features therefore
    serve batches of another size only after both were seen to give the same bits, and never where numbers are rounded
    to half precision, under autocast too: that hides most differences. The first samples that come back are computed a
    second time and compared, the first in another company, too, and ever fewer batches later on. A module that fails
    this is not cached. Should a kernel be seen to differ from itself by rounding, the cache says by how much, and
    ``stats.difference`` keeps the bound. A plain value in an output is taken for constant until it differs.

    Training, validation, test and prediction share what is kept, also in another call of the Trainer with the same
    weights; :meth:`clear` gives the memory back. If fewer than 2 % of the samples of an epoch come
    back, as with random augmentation, the cache switches itself off for that stage, and says so. While the input
    requires grad, under FSDP, before TorchScript, whose code cannot be looked into, and while somebody traces or
    exports the model, it steps aside.

    Calls of ``module(x)`` are answered, not those of ``module.forward(x)``. During the fit the module can be copied,
    pickled, exported, scripted and compiled as without the cache. Where the model, a module around this one or a method
    of them is compiled when the fit starts, this module runs apart from what is compiled. It is not cached where
    ``fullgraph=True`` forbids that, nor in a function that is compiled elsewhere or later; ``module.compile()`` is
    cached in any case.

    Args:
        module: The dotted name of the module, such as ``"backbone"``. If it is an ``nn.Sequential`` or
            ``nn.ModuleList``, or a list of names of modules that run one on the output of the other, such as
            ``["backbone.layer1", "backbone.layer2"]``, the cache reaches up to the deepest one that is still wholly
            frozen, and moves as phases do. Beside that output they may be given plain values and what the first of them
            was given, such as a transformer's masks. That each gets just this is checked; where something else reads
            what is between, that is computed.
        max_bytes: The most bytes to keep; what does not fit is computed. By default half of the memory that is
            available when the fit starts, shared by the processes on this machine. By default a folder may take half
            of the disk space that would be free without it, shared by all processes.
        storage: ``"memory"``, or a folder, which is mapped into memory and can be used by later runs. What lies there
            belongs to these very weights, buffers and kinds of layers, and is checked before it is used; files that
            are damaged are refused, as is a folder that holds something else or that another run uses. The ranks of a
            run share it. If it is full, or removed in mid-fit, what was there serves on and the rest is computed.
        dtype: Keep wider floating numbers in this dtype, such as ``torch.float16`` to halve the space. Outputs are then
            rounded to it, whether they come from memory or not.

    Attributes:
        stats: What was done so far, and whether the cache is active and why not: a :class:`FeatureStats`. Under
            ``ddp_spawn`` and ``ddp_fork`` it stays in the processes that train: use ``strategy="ddp"`` to read it.

    Logs, at the end of each training epoch: ``cache/hits`` and ``cache/misses`` of that epoch, ``cache/bytes`` and
    ``cache/seconds_saved`` so far.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or the folder holds something else; at fit start, if ``module``
            names no module.
        RuntimeError: At fit start, if another run uses the folder.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> cache = FeatureCache("backbone", max_bytes=2_000_000_000)
        >>> trainer = Trainer(callbacks=[cache], logger=False, enable_checkpointing=False)
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
        self.module = _check_module(module)
        self.max_bytes = _check_max_bytes(max_bytes)
        self.storage = _check_storage(storage)
        self.dtype = _check_dtype(dtype)
        self._chain: FeatureChain | None = None
        self._folder: Folder | None = None
        self._kept: Kept | None = None
        self._stats = FeatureStats()
        self._logged = (0, 0)
        self._has_trained = False

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer are told apart by their module."""
        return self._generate_state_key(module=self.module)

    @property
    def stats(self) -> FeatureStats:
        """What was done so far, and whether the cache is active and why not."""
        if self._chain is not None:
            self._stats = self._chain.stats()
        return self._stats

    def clear(self) -> None:
        """Forget all features, also those kept for another fit or test with the same weights; a folder stays."""
        if self._chain is not None:
            self._chain.close()
        elif self._kept is not None:
            for memory in self._kept.memories.values():
                memory.close()
        self._kept = None

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be used."""
        if isinstance(self.storage, Path) and self._folder is None:
            self._folder = Folder(self.storage, trainer.global_rank)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in front of the module."""
        self._begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Distrust the weights: what is written through ``tensor.data`` does not count as written."""
        self._has_trained = False
        self._refresh()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and judge whether the module is called and samples come back."""
        if self._chain is None:
            return
        if self._has_trained:
            self._chain.notice_idleness(trainer.current_epoch)
        counts = self._chain.end_epoch("train")
        stats = self.stats
        hits, misses = self._logged
        self._logged = counts.hits, counts.misses
        values = {
            "cache/hits": float(counts.hits - hits),
            "cache/misses": float(counts.misses - misses),
            "cache/bytes": float(stats.bytes),
            "cache/seconds_saved": stats.seconds_saved,
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in front of the module if that is not done, and distrust the weights."""
        self._begin(trainer, pl_module)
        self._refresh()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge whether samples come back, and distrust the weights: averaged ones may have been there meanwhile."""
        if self._chain is None:
            return
        if not trainer.sanity_checking:
            self._chain.end_epoch("validate")
        self._chain.suspect()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in front of the module."""
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in front of the module."""
        self._begin(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Distrust the weights that the optimizer is about to change."""
        if self._chain is not None:
            self._chain.suspect_step(optimizer)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Compute what the user keeps of what is between the modules of a chain."""
        if self._chain is not None:
            self._chain.settle()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Compute what the user keeps of what is between the modules of a chain."""
        self._has_trained = True
        self.on_validation_batch_end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Step aside."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Step aside."""
        self._end()

    # What

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._chain is not None:
            return
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            why = f"under {type(trainer.strategy).__name__} a process has only a part of the weights"
            self._stats = FeatureStats(why=why)
            self._say(trainer, f"{self.module}: off, because {why}.")
            return
        found = _modules(pl_module, self.module)
        whole = next(iter(found.items())) if isinstance(self.module, str) and len(found) == 1 else None
        links = found if whole is None else sequential_links(*whole)
        self._refuse_twice(trainer, found | links)
        self._chain = FeatureChain(
            whole,
            links,
            limit=self._limit(trainer),
            folder=self._folder,
            dtype=self.dtype,
            kept=self._kept,
            stage=lambda: str(trainer.state.stage.value) if trainer.state.stage is not None else "",
            say=lambda sentence: self._say(trainer, sentence),
            compiled_around=is_compiled_around(pl_module, found.values()),
        )
        self._chain.__enter__()

    def _refuse_twice(self, trainer: Trainer, modules: dict[str, nn.Module]) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, FeatureCache) and other._chain is not None:
                twice = [name for name, module in modules.items() if other._chain.stands_before(module)]
                if twice:
                    raise ValueError(
                        f"FeatureCache(module={other.module!r}) and FeatureCache(module={self.module!r}) would both "
                        f"remember what {twice[0]} gives. Leave one of them out; one with a list of modules caches as "
                        "many of them as are frozen."
                    )

    def _refresh(self) -> None:
        if self._chain is not None:
            self._chain.suspect()
            self._chain.exchange()

    def _limit(self, trainer: Trainer) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        if self._folder is not None:
            there = self._folder.size()
            free_without = shutil.disk_usage(self._folder.path).free + there
            return there + (free_without // 2 - there) // max(1, trainer.world_size)
        return available_memory() // 2 // max(1, trainer.num_devices)

    def _say(self, trainer: Trainer, sentence: str) -> None:
        if trainer.is_global_zero:
            _log.info("FeatureCache: %s", sentence)

    def _end(self) -> None:
        try:
            if self._chain is not None:
                self._chain.__exit__()
                self._stats = self._chain.stats()
                self._kept = self._chain.leave()
        finally:
            self._chain = None
            if self._folder is not None:
                self._folder.close()
                self._folder = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(self.__dict__, _chain=None, _folder=None, _kept=None)


def _modules(pl_module: LightningModule, names: str | list[str]) -> dict[str, nn.Module]:
    """Give modules by name, the outermost one where ``torch.compile`` put one around another."""
    modules: dict[str, nn.Module] = {}
    for path, module in pl_module.named_modules(remove_duplicate=False):
        modules.setdefault(clean_name(path), module)
    wanted = [names] if isinstance(names, str) else names
    for name in wanted:
        if not name or name not in modules:
            close = difflib.get_close_matches(name, [path for path in modules if path], n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            tops = ", ".join(top for top, _ in pl_module.named_children()) or "none"
            raise ValueError(
                f'FeatureCache(module="{name}") names no module of {type(pl_module).__name__}.{hint}\n'
                f"Top-level modules: {tops}."
            )
    found: dict[str, nn.Module] = {}
    for name in wanted:
        found |= _called(name, modules[name])
    if len(set(found.values())) < len(found):
        raise ValueError(f"FeatureCache(module={wanted!r}): two of these names are the same module. Name each once.")
    return found


def _called(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Give a module, or those in an ``nn.ModuleList``, which is not called itself."""
    if isinstance(module, nn.ModuleList) and len(module):
        return {below: m for i, child in enumerate(module) for below, m in _called(f"{name}.{i}", child).items()}
    # TorchScript's classes raise AttributeError.
    if getattr(type(module), "forward", None) is nn.Module.forward and "forward" not in vars(module):
        raise ValueError(
            f'FeatureCache(module="{name}") names a {type(module).__name__}, which is never called. Name the modules '
            "in it, in the order in which they run."
        )
    return {name: module}


def _check_module(module: Any) -> str | list[str]:
    if isinstance(module, str):
        return module
    if not isinstance(module, Sequence) or not all(isinstance(name, str) for name in module):
        raise TypeError(f'FeatureCache(module={module!r}): it is a dotted name such as "backbone", or a list of them.')
    names = list(module)
    if not names:
        raise ValueError('FeatureCache(module=[]) names nothing. Name a module, such as "backbone".')
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'FeatureCache(module={names!r}): "{name}" is there twice. Name each once.')
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f'FeatureCache(module={names!r}): "{name}" is inside "{outer}". Name modules that run one '
                "after the other."
            )
    return names


def _check_max_bytes(max_bytes: Any) -> int | None:
    if max_bytes is None:
        return None
    if isinstance(max_bytes, float) and max_bytes.is_integer():  # 4e9
        max_bytes = int(max_bytes)
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):
        raise TypeError(f"FeatureCache(max_bytes={max_bytes!r}): it is a number of bytes, such as 4_000_000_000.")
    if max_bytes < 1:
        raise ValueError(
            f"FeatureCache(max_bytes={max_bytes}): it is at least 1; leave the callback out to cache nothing."
        )
    return max_bytes


def _check_storage(storage: Any) -> str | Path:
    """Give a folder as a path that stays the same wherever the user goes."""
    if not isinstance(storage, str | Path):
        raise TypeError(f'FeatureCache(storage={storage!r}): it is "memory" or the path of a folder.')
    if storage == "":
        raise ValueError('FeatureCache(storage=""): it is "memory" or the path of a folder, such as "features".')
    return storage if storage == "memory" else Path(storage).expanduser().absolute()


def _check_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES:
        return dtype  # type: ignore[no-any-return]
    names = [str(one).removeprefix("torch.") for one in _DTYPES]
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in names:
        return _DTYPES[names.index(dtype.removeprefix("torch."))]
    if not isinstance(dtype, torch.dtype | str):
        raise TypeError(f"FeatureCache(dtype={dtype!r}): it is a dtype, such as torch.float16.")
    raise ValueError(f"FeatureCache(dtype={dtype!r}): it is one of {', '.join(map(str, _DTYPES))}, or None.")
