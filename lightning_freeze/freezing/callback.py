"""BatchNorm that stays frozen during a fit."""

from __future__ import annotations

from torch import nn

from lightning_freeze._lightning import (
    LightningModule,
    MisconfigurationException,
    StochasticWeightAveraging,
    Trainer,
    callbacks_of,
)
from lightning_freeze.freezing.batchnorm import affine_parameters, batchnorm_layers, has_running_statistics
from lightning_freeze.freezing.holder import Holder
from lightning_freeze.freezing.ledger import Hold
from lightning_freeze.selectors import Selector, as_patterns, selector_text


class FreezeBatchNorm(Holder):
    """Keep BatchNorm layers frozen during ``fit``: their running statistics never move.

    Works beside a :class:`FreezeSchedule`, in any order: what is frozen here stays frozen in every phase. After the
    fit, modes and flags are as they were.

    Args:
        select: Which layers, see :func:`select_parameters`: 1d, 2d, 3d, SyncBatchNorm, and subclasses such as timm's.
        train_affine: Leave the affine parameters (``weight`` and ``bias``) trainable.

    Raises:
        TypeError: If ``select`` is no selector.
        ValueError: If ``select`` is an empty list; at fit start, if it matches nothing, or no layer with running
            statistics.
        MisconfigurationException: At fit start, if parameters cannot freeze with the Trainer's strategy, or if the
            Trainer also has Lightning's StochasticWeightAveraging.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FreezeBatchNorm("backbone")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, select: Selector = "*", *, train_affine: bool = False) -> None:
        patterns = as_patterns(select)
        if not patterns:
            raise ValueError('FreezeBatchNorm(select=[]) is an empty list. For every layer, leave it out or give "*".')
        self.select = select if isinstance(select, str) or callable(select) else patterns
        self.train_affine = train_affine

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer are told apart by what they select."""
        return self._generate_state_key(select=selector_text(self.select), train_affine=self.train_affine)

    def holds(self, module: nn.Module) -> Hold:
        """Return the layers and, unless they train, their affine parameters."""
        layers = tuple(batchnorm_layers(module, self.select, given="FreezeBatchNorm({})").values())
        affine = [] if self.train_affine else [p for layer in layers for p in affine_parameters(layer).values()]
        return Hold(frozenset(map(id, affine)), layers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy under which parameters cannot freeze."""
        if not self.train_affine:
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the layers before the first batch."""
        refuse_new_statistics(trainer, pl_module, type(self).__name__)
        super().on_fit_start(trainer, pl_module)


def refuse_new_statistics(trainer: Trainer, module: nn.Module, who: str) -> None:
    """Refuse a callback that computes the running statistics of every BatchNorm anew, also where ``who`` freezes it.

    In eval mode they would stay at what it resets them to, zero and one.
    """
    averages = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks_of(trainer))
    if averages and any(map(has_running_statistics, module.modules())):
        raise MisconfigurationException(
            f"The Trainer has {who} and StochasticWeightAveraging, which resets the running statistics of every "
            "BatchNorm to compute them anew; those of a frozen layer would be lost. Use Lightning's WeightAveraging "
            "instead, or FreezeSchedule(frozen_mode='train')."
        )
