"""Uses the installed package where nothing but its own dependencies is installed: every public name, and a fit."""

import importlib.metadata

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_freeze

for name in lightning_freeze.__all__:
    getattr(lightning_freeze, name)
assert "site-packages" in lightning_freeze.__file__, lightning_freeze.__file__

model = BoringModel()
before = model.layer.bias.detach().clone()
schedule = lightning_freeze.FreezeSchedule([lightning_freeze.Phase("layer.weight")])
Trainer(
    max_epochs=1,
    limit_train_batches=2,
    limit_val_batches=0,
    accelerator="cpu",
    devices=1,
    callbacks=[schedule],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
).fit(model)
assert torch.equal(model.layer.bias, before)
version = importlib.metadata.version("lightning-freeze")
print(f"lightning-freeze {version}: {len(lightning_freeze.__all__)} names from {lightning_freeze.__file__}")
