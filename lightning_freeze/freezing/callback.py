"""BatchNorm that stays frozen during a fit."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, without_fit
from lightning_freeze.freezing.averagers import refuse_new_statistics
from lightning_freeze.freezing.batchnorm import hold_batchnorm, release_layers
from lightning_freeze.freezing.hyperparameters import give_back_modules
from lightning_freeze.freezing.strategies import check_strategy, follow_trainable_set
from lightning_freeze.selectors import Selector, as_patterns, selector_text


class FreezeBatchNorm(Callback):
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
        MisconfigurationException: At fit start, if affine parameters cannot freeze with the Trainer's strategy, or if
            the Trainer also has Lightning's StochasticWeightAveraging.

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
        self._layers: dict[str, nn.Module] = {}

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer are told apart by what they select."""
        return self._generate_state_key(select=selector_text(self.select), train_affine=self.train_affine)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy under which parameters cannot freeze."""
        if stage == "fit" and not self.train_affine:
            check_strategy(trainer.strategy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the layers before the first batch."""
        self.hold(trainer, pl_module)

    def hold(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the layers, unless that is done; a schedule asks for it before it changes flags itself."""
        if self._layers:
            return
        refuse_new_statistics(trainer, pl_module, type(self).__name__)
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        modes = {layer: layer.training for layer in pl_module.modules()}
        self._layers = hold_batchnorm(
            pl_module,
            self.select,
            holder=self.state_key,
            train_affine=self.train_affine,
            given="FreezeBatchNorm({})",
        )
        # Lightning warns of modules in eval mode between here and on_train_start, where it no longer does.
        for layer in self._layers.values():
            layer.training = modes[layer]
        froze = [parameter for parameter in trained if not parameter.requires_grad]
        if froze:
            follow_trainable_set(trainer.strategy, froze)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the layers in eval mode."""
        for layer in self._layers.values():
            layer.training = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save modules among the hyperparameters as they are after the fit."""
        if self._layers:
            give_back_modules(checkpoint, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the layers back."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the layers back."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        if self._layers:
            # By object: Lightning has put other layers in the place of each SyncBatchNorm before this.
            release_layers(pl_module, self._layers.values(), holder=self.state_key)
            self._layers = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(self.__dict__, _layers={})
