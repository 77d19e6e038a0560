"""The base of the callbacks that keep parameters frozen during a fit: they share one ledger."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_freeze._lightning import Callback, LightningModule, Trainer, callbacks_of
from lightning_freeze.freezing.ledger import Hold, Ledger
from lightning_freeze.freezing.strategies import check_strategy


class Holder(Callback):
    """A callback that keeps parameters frozen, and modules in eval mode, from fit start to the end of the fit.

    All holders of a Trainer share the fit's :class:`Ledger`, which the first one opens with what :meth:`holds` of each
    returns, and then keeps in line for all; so their order does not matter.
    """

    _ledger: Ledger | None = None
    _leads: Ledger | None = None  # the same, in the one callback that keeps it in line

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
        self._ledger = ledger_of(trainer)
        if self._ledger is None:
            holds = {holder.state_key: holder.holds(pl_module) for holder in _holders(trainer)}
            self._ledger = self._leads = Ledger(trainer.strategy, pl_module)
            for who, hold in holds.items():
                self._ledger.hold(who, hold)
            self._ledger.settle(modes=False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put modules in eval mode, of which Lightning warns before; put right what other code has switched."""
        if self._leads is not None:
            self._leads.settle()

    on_train_start = on_train_epoch_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put right what the module's own hooks have switched at the epoch's start."""
        if batch_idx == 0 and self._leads is not None:
            self._leads.look_again()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop gradients of what is frozen before they are clipped."""
        if self._leads is not None:
            self._leads.gradients.drop()
            optimizers = self._leads.strategy.optimizers
            if len(optimizers) > 1:  # one that is alone has something to train
                self._leads.gradients.lend(optimizers)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save modules among the hyperparameters as they are after the fit."""
        if self._ledger is not None:
            saved = checkpoint.get(pl_module.CHECKPOINT_HYPER_PARAMS_KEY, {})
            self._ledger.as_after_fit(saved, pl_module.hparams)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Restore flags and modes."""
        self._close(trainer)

    on_exception = teardown

    def _close(self, trainer: Trainer) -> None:
        ledger, self._ledger, self._leads = self._ledger, None, None
        if ledger is not None:
            ledger.close()


def ledger_of(trainer: Trainer) -> Ledger | None:
    """Return the ledger of the fit that runs, None if nothing holds anything."""
    return next((holder._ledger for holder in _holders(trainer) if holder._ledger is not None), None)


def _holders(trainer: Trainer) -> list[Holder]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Holder)]
