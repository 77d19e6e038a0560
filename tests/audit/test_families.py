"""No false alarm: the smallest member of every torchvision classification family, with a schedule, has no finding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model_builder, list_models

from lightning_freeze import FreezeSchedule, GradientAudit, Phase
from tests.nets import trainer

slow = pytest.mark.slow
WITHOUT_AUX = {"aux_logits": False, "init_weights": False}
# Name, the head, the smallest image it takes, options.
FAMILIES = [
    pytest.param("alexnet", "classifier", 64, {}, marks=slow),
    pytest.param("convnext_tiny", "classifier", 32, {}, marks=slow),
    pytest.param("densenet121", "classifier", 32, {}, marks=slow),
    pytest.param("efficientnet_b0", "classifier", 32, {}),
    pytest.param("googlenet", "fc", 32, WITHOUT_AUX),
    pytest.param("inception_v3", "fc", 75, WITHOUT_AUX, marks=slow),
    pytest.param("maxvit_t", "classifier", 224, {}, marks=slow),
    pytest.param("mnasnet0_5", "classifier", 32, {}),
    pytest.param("mobilenet_v2", "classifier", 32, {}),
    pytest.param("mobilenet_v3_small", "classifier", 32, {}),
    pytest.param("regnet_y_400mf", "fc", 32, {}),
    pytest.param("resnet18", "fc", 32, {}),
    pytest.param("shufflenet_v2_x0_5", "fc", 32, {}),
    pytest.param("squeezenet1_1", "classifier", 32, {}),
    pytest.param("swin_t", "head", 32, {}),
    pytest.param("vgg11", "classifier", 32, {}, marks=slow),
    pytest.param("vit_b_16", "heads", 32, {"image_size": 32}, marks=slow),
]


class Classifier(LightningModule):
    def __init__(self, net: nn.Module, *, aux: bool = False) -> None:
        super().__init__()
        self.net, self.aux = net, aux

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        outputs = self.net(batch[0])
        if isinstance(outputs, tuple):
            outputs = outputs if self.aux else outputs[:1]
            return sum(nn.functional.cross_entropy(output, batch[1]) for output in outputs)
        return nn.functional.cross_entropy(outputs, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)


def audited(net: LightningModule, head: str, size: int) -> GradientAudit:
    data = TensorDataset(torch.randn(6, 3, size, size), torch.tensor([0, 1, 2, 0, 1, 2]))
    audit = GradientAudit(first_n_steps=2)
    schedule = FreezeSchedule([Phase(f"net.{head}", epochs=1), Phase("*")])
    run = trainer(callbacks=[schedule, audit], max_epochs=2)
    run.fit(net, DataLoader(data, batch_size=2))
    return audit


@pytest.mark.parametrize(("name", "head", "size", "options"), FAMILIES)
def test_torchvision_model_has_no_finding(name: str, head: str, size: int, options: dict[str, Any]) -> None:
    net = torchvision.models.get_model(name, weights=None, num_classes=3, **options)
    audit = audited(Classifier(net), head, size)
    assert str(audit.report) == f"{audit.report.summary}"
    assert audit.report.summary.startswith("audit: no finding in 8 checks")
    assert audit.report.parameters == len(list(net.parameters()))


def test_every_family_of_torchvision_is_audited() -> None:
    families = {get_model_builder(name).__module__ for name in list_models(module=torchvision.models)}
    assert families == {get_model_builder(parameters.values[0]).__module__ for parameters in FAMILIES}


@pytest.mark.parametrize("aux", [False, True])
def test_auxiliary_head_that_the_loss_leaves_out_is_found(aux: bool) -> None:
    net = torchvision.models.googlenet(weights=None, num_classes=3, aux_logits=True, init_weights=False)
    audit = audited(Classifier(net, aux=aux), "*", 32)
    heads = {name for name, _ in net.named_parameters() if name.startswith("aux")}
    assert set(audit.report.of("no_gradient")) == (set() if aux else {f"net.{name}" for name in heads})
    assert len(audit.report) == (0 if aux else len(heads)), audit.report
    if not aux:
        assert all("the loss does not depend on what comes of it" in finding.cause for finding in audit.report)
