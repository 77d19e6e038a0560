from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_freeze import (
    FeatureCache,
    FreezeBatchNorm,
    FreezeSchedule,
    GradientAudit,
    MetricLogger,
    NormLogger,
    Phase,
    TargetNetwork,
)
from tests.nets import Net, Probe, loader, trainer


class Both(Net):
    """Has what every callback wants: a target network, and a step that returns predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        preds = self(batch[0])
        return {"loss": nn.functional.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def __getstate__(self) -> dict[str, Any]:
        pytest.fail("the model was pickled with the callback")


CALLBACKS: dict[str, Callback] = {
    "schedule": FreezeSchedule([Phase("head", steps=2), Phase("*")]),
    "batchnorm": FreezeBatchNorm("backbone"),
    "metrics": MetricLogger({"accuracy": MulticlassAccuracy(3)}, stages=("train",)),
    "norms": NormLogger(every_n_steps=1),
    "target": TargetNetwork("head", "target", tau=0.1),
    "audit": GradientAudit(),
    "cache": FeatureCache("backbone"),
}


def test_every_public_callback_is_tested_for_pickling() -> None:
    import lightning_freeze

    public = {getattr(lightning_freeze, name) for name in lightning_freeze.__all__}
    assert {type(callback) for callback in CALLBACKS.values()} == {
        one for one in public if isinstance(one, type) and issubclass(one, Callback)
    }


@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_pickles_and_copies_without_the_model(name: str) -> None:
    callback = copy.deepcopy(CALLBACKS[name])

    def twice(run: Trainer, module: LightningModule) -> None:
        pickle.loads(pickle.dumps(callback))
        copy.deepcopy(callback)

    callbacks = [callback, Probe(start=twice, end=twice)]
    trainer(callbacks=callbacks, max_epochs=2, limit_val_batches=0).fit(Both(), loader())
    twin = pickle.loads(pickle.dumps(callback))
    trainer(callbacks=[twin], max_epochs=1, limit_val_batches=0).fit(Both(), loader())
