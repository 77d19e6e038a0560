"""The base of the callbacks that keep parameters frozen during a fit: they share one ledger."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, callbacks_of, without_fit
from lightning_freeze.freezing.ledger import Hold, Ledger, close_ledger, ledger_of, open_ledger
from lightning_freeze.freezing.strategies import check_strategy


class Holder(Callback):
    """A callback that keeps parameters frozen, and modules in eval mode, from fit start to the end of the fit.

    All holders of a Trainer share the fit's :class:`Ledger`, which the first one opens with what :meth:`holds` of each
    returns, and then keeps in line for all; so their order does not matter.
    """

    _ledger: Ledger | None = None
    _leads = False

    def holds(self, module: nn.Module) -> Hold:
        """Return what the callback keeps frozen in a module, also outside of a fit."""
        return Hold()

    @property
    def ledger(self) -> Ledger:
        """The ledger of the fit that runs."""
        assert self._ledger is not None
        return self._ledger

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy under which parameters cannot freeze."""
        if stage == "fit":
            check_strategy(trainer.strategy, manual=not pl_module.automatic_optimization)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze before anything is trained or restored."""
        self._ledger, self._leads = ledger_of(trainer), False
        if self._ledger is None:
            holders = [callback for callback in callbacks_of(trainer) if isinstance(callback, Holder)]
            holds = {holder.state_key: holder.holds(pl_module) for holder in holders}
            self._ledger, self._leads = open_ledger(trainer, pl_module, holds), True
            self._ledger.settle(modes=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put modules in eval mode; before, Lightning warns of them."""
        if self._leads:
            self.ledger.settle()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put right what other code has switched."""
        if self._leads:
            self.ledger.settle()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop gradients of what is frozen before they are clipped."""
        if self._leads:
            gradients = self.ledger.gradients
            gradients.drop()
            if len(trainer.optimizers) > 1:  # one that is alone has something to train
                gradients.lend(trainer.optimizers)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save modules among the hyperparameters as they are after the fit."""
        if self._ledger is not None:
            saved = checkpoint.get(pl_module.CHECKPOINT_HYPER_PARAMS_KEY, {})
            self._ledger.as_after_fit(saved, pl_module.hparams)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore flags and modes."""
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore flags and modes."""
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        self._ledger = None
        close_ledger(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one fit in one process."""
        return without_fit(self.__dict__, _ledger=None)
