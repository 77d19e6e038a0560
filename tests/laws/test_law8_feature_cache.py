"""Law 8: ten epochs with a FeatureCache give the losses and weights of ten epochs without, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FeatureCache, FreezeSchedule, Phase
from tests.nets import Probe, snapshot, trainer


def resnet18() -> nn.Module:
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    return net


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True, num_classes=0, depth=4)


def efficientnet() -> nn.Module:
    net = EfficientNet.from_name("efficientnet-lite0")
    net._fc = nn.Identity()
    return net


BACKBONES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (resnet18, 512),
    "vit": (vit, 192),
    "efficientnet-lite0": (efficientnet, 1280),
}


class Classifier(LightningModule):
    """Logs each loss of training and validation."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, 5)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        self.losses.append(loss.detach())
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loaders(samples: int, size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Shuffled training data whose last batch is smaller, and validation in batches of another size."""
    images = torch.randn(samples, 3, size, size)
    data = TensorDataset(images, torch.randint(5, (samples,)))
    order = torch.Generator().manual_seed(3)
    return DataLoader(data, 8, shuffle=True, generator=order), DataLoader(data, 20)


def fit(
    name: str, *, cached: bool, samples: int, size: int, epochs: int = 10, **options: Any
) -> tuple[Classifier, Trainer, FeatureCache]:
    torch.manual_seed(0)
    make, width = BACKBONES[name]
    net = Classifier(make(), width)
    callbacks: list[Callback] = [FreezeSchedule([Phase("head")], frozen_mode="eval", verbose=False)]
    cache = FeatureCache("backbone")
    if cached:
        callbacks.append(cache)
    run = trainer(callbacks=callbacks, max_epochs=epochs, **options)
    run.fit(net, *loaders(samples, size))
    return net, run, cache


def check(name: str, samples: int, size: int, **options: Any) -> FeatureCache:
    """Compare bits; numbers only, if the cache itself has said that the kernels' bits depend on a sample's place."""
    plain, _, _ = fit(name, cached=False, samples=samples, size=size, **options)
    cached, _, cache = fit(name, cached=True, samples=samples, size=size, **options)
    equal = torch.equal if cache.stats.difference == 0 else torch.allclose
    assert equal(torch.stack(plain.losses), torch.stack(cached.losses))
    before, after = snapshot(plain), snapshot(cached)
    assert before.keys() == after.keys()
    assert all(equal(before[key], after[key]) for key in before)
    return cache


@pytest.mark.parametrize("name", BACKBONES)
def test_losses_and_weights_are_the_same_to_the_bit(name: str) -> None:
    """Also where a kernel's bits depend on the batch size, as in a ResNet's: other sizes are then computed apart."""
    stats = check(name, samples=28, size=32).stats
    assert stats.difference == 0
    assert stats.hits > 0.7 * (stats.hits + stats.misses)


LAYERS = [f"backbone.layer{number}" for number in range(1, 5)]
GRADUAL = [
    Phase("head", epochs=3),
    Phase(["head", "backbone.layer4"], epochs=3),
    Phase(["head", "backbone.layer4", "backbone.layer3"], epochs=3),
    Phase("head"),
]


def thawed(
    make: Callable[[], tuple[Any, DataLoader[Any], DataLoader[Any]]], module: Any, epochs: int, **schedule: Any
) -> tuple[list[int], FeatureCache]:
    """Compare bits of a fit without and with a cache; give how many modules it covered after each batch, and it."""
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        net, *loaders = make()
        cache = FeatureCache(module)
        covers: list[int] = []
        callbacks: list[Callback] = [
            FreezeSchedule(verbose=False, **schedule),
            *([cache] if cached else []),
            Probe(end=lambda *_, seen=covers, of=cache: seen.append(len(of.stats.covers))),
        ]
        trainer(callbacks=callbacks, max_epochs=epochs).fit(net, *loaders)
        results.append((torch.stack(net.losses), snapshot(net)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])
    return covers, cache


def test_gradual_unfreezing_with_a_list_of_layers() -> None:
    def make() -> Any:
        net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=32)
        return Classifier(net, 32), *loaders(12, 32)

    covers, cache = thawed(make, LAYERS, 10, phases=GRADUAL)
    assert covers[::2] == [4, 4, 4, 3, 3, 3, 2, 2, 2, 4]
    assert cache.stats.hits > 40


class Reader(LightningModule):
    """A transformer that classifies texts of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=mask == 0)
        loss = nn.functional.cross_entropy(self.head(hidden[:, 0]), labels)
        self.losses.append(loss.detach())
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_gradual_unfreezing_of_a_transformer_whose_layers_share_a_mask() -> None:
    mask = (torch.arange(7) < torch.randint(2, 8, (24, 1))).long()
    data = TensorDataset(torch.randint(40, (24, 7)), mask, torch.randint(5, (24,)))
    phases = [
        Phase("head", epochs=4),
        Phase(["head", "encoder.layers.3"], epochs=4),
        Phase(["head", "encoder.layers.3", "encoder.layers.2"]),
    ]

    def make() -> Any:
        order = torch.Generator().manual_seed(3)
        return Reader(), DataLoader(data, 8, shuffle=True, generator=order), DataLoader(data, 8)

    covers, cache = thawed(make, "encoder.layers", 12, phases=phases, frozen_mode="eval")
    assert covers[::3] == [4] * 4 + [3] * 4 + [2] * 4
    assert cache.stats.hits > 3 * 24 * 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", BACKBONES)
def test_so_they_are_at_64_pixels(name: str, threads: int, precision: Any) -> None:
    """In double precision on two threads, bits of a ViT depend on a sample's place in its batch: that is found out."""
    torch.set_num_threads(threads)
    stats = check(name, samples=100, size=64, epochs=10, precision=precision).stats
    assert stats.difference <= (1e-14 if precision == "64-true" else 0)
    if stats.difference == 0:
        assert stats.hits > 0.7 * (stats.hits + stats.misses)
    else:
        assert "in other places of a batch differ by rounding" in str(stats.why)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"limit_train_batches": 3}]
)
@pytest.mark.parametrize("name", ["resnet18", "efficientnet-lite0"])
def test_so_they_are_with_other_loops(name: str, options: dict[str, Any]) -> None:
    check(name, samples=44, size=32, **options)
