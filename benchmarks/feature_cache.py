"""What a FeatureCache gains and costs: a frozen backbone and a linear head at 64 pixels, on this machine.

Side by side in one run, interleaved, so that whatever else the machine does hits all of them: training epochs without a
cache, the first and the later epochs with one, epochs on features that were extracted by hand before (the limit: what
people leave their training code for), the same while images are loaded, too (the limit for code that is not changed),
and epochs with random augmentation, where nothing ever comes back, with the cache and without: the cache tries that for
two epochs, then it is off. Ratios are minimum / median / maximum over the rounds. What ten epochs could gain at most is
that of extracting features in the first epoch and training on them by hand in the nine others.

Run it with `python benchmarks/feature_cache.py`; `--nets resnet18 --rounds 10` looks closer at one network, and
`--against 8f35310` times the FeatureCache of another commit beside this one: that is the last with 0.1.0's.

`--device cuda` is another measurement: ResNet-50 and ViT-B/16 at 224 pixels in float32 and in bf16, batches of 256 that
are already on the host, pinned, so that no loader hides what the cache costs: uncached, cached, by hand with images
copied to the device, too, and by hand without. The device is waited for at both ends of each epoch.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_freeze import FeatureCache
from lightning_freeze.feature_cache.hashing import Hash


def resnet(name: str) -> nn.Module:
    net = getattr(torchvision.models, name)()
    net.fc = nn.Identity()
    return net


def vit(pixels: int = 64) -> nn.Module:
    net = torchvision.models.vit_b_16(image_size=pixels)
    net.heads = nn.Identity()
    return net


def efficientnet() -> nn.Module:
    net = EfficientNet.from_name("efficientnet-lite0")
    net._fc = nn.Identity()
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: resnet("resnet18"), 512),
    "resnet50": (lambda: resnet("resnet50"), 2048),
    "ViT-B/16": (vit, 768),
    "ViT-Ti/16": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0), 192),
    "EfficientNet-Lite0": (efficientnet, 1280),
}


ON_DEVICE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (lambda: resnet("resnet50"), 2048),
    "ViT-B/16": (lambda: vit(224), 768),
}


class Classifier(LightningModule):
    """A frozen backbone and a head that trains; without a backbone, on features."""

    def __init__(self, backbone: nn.Module | None, width: int) -> None:
        super().__init__()
        self.backbone = None if backbone is None else backbone.eval().requires_grad_(False)
        self.head = nn.Linear(width, 10)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = batch[0] if self.backbone is None else self.backbone(batch[0])
        return nn.functional.cross_entropy(self.head(features), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-3)


class Augmented(Dataset[Any]):
    """Every image is another one each time."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        shift = torch.randint(64, (2,)).tolist()
        return (image.roll(shift, (1, 2)) * torch.rand(()).add(0.5), label)


class Batches(Dataset[Any]):
    """Whole batches that are already on the host."""

    def __init__(self, batches: list[tuple[Tensor, ...]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.batches[index]


class EpochTimes(Callback):
    """When epochs began and the last one was over. First among the callbacks, so that the time of others counts."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    on_train_end = on_train_epoch_start


def epochs(
    net: LightningModule,
    data: Dataset[Any],
    count: int,
    batch: int | None,
    cache: type[Callback] | None = None,
    device: str = "cpu",
    precision: Any = "32-true",
) -> list[float]:
    """Train, and return the seconds of each epoch; ``batch`` is None for data that come in batches."""
    clock = EpochTimes()
    trainer = Trainer(
        max_epochs=count,
        accelerator=device,
        devices=1,
        precision=precision,
        callbacks=[clock, *([cache("backbone")] if cache else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    options = {} if batch is None else {"drop_last": True}
    trainer.fit(net, DataLoader(data, batch, shuffle=True, **options))
    return [after - before for before, after in pairwise(clock.times)]


def extracted(net: Classifier, data: TensorDataset, batch: int) -> TensorDataset:
    """Do by hand what the cache does."""
    assert net.backbone is not None
    with torch.no_grad():
        features = torch.cat([net.backbone(images) for images, _ in DataLoader(data, batch)])
    return TensorDataset(features, data.tensors[1])


def hashing(net: Classifier, images: Tensor, batch: int) -> float:
    """Return the seconds that the hashes of an epoch take alone: of its samples, and of all weights once."""
    assert net.backbone is not None
    begin = time.perf_counter()
    for part in images.split(batch):
        Hash().samples([part], [])
    Hash().tensors([*net.backbone.parameters(), *net.backbone.buffers()])
    return time.perf_counter() - begin


def cache_of(commit: str) -> type[Callback]:
    """Return the FeatureCache of another commit, whose package gets a name of its own."""
    folder = Path(tempfile.mkdtemp())
    packed = subprocess.run(["git", "archive", commit, "lightning_freeze"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    package = (folder / "lightning_freeze").rename(folder / "lightning_freeze_then")
    for file in package.rglob("*.py"):
        file.write_text(file.read_text().replace("lightning_freeze", package.name))
    sys.path.insert(0, str(folder))
    cache: type[Callback] = importlib.import_module(package.name).FeatureCache
    logging.getLogger(package.name).setLevel(logging.ERROR)
    return cache


def spread(values: Sequence[float]) -> str:
    return f"{min(values):7.2f} /{statistics.median(values):7.2f} /{max(values):7.2f}"


def measure(name: str, options: argparse.Namespace) -> None:
    make, width = NETS[name]
    net = Classifier(make(), width)
    images, labels = torch.randn(options.samples, 3, 64, 64), torch.randint(10, (options.samples,))
    data = TensorDataset(images, labels)
    by_hand = extracted(net, data, options.batch)
    with_images = TensorDataset(*by_hand.tensors, images)
    ratios: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    steps = options.samples // options.batch
    epochs(net, data, 1, options.batch)  # warm up
    for _ in range(options.rounds):
        uncached = epochs(net, data, 3, options.batch)
        first, second, *cached = epochs(net, data, 10, options.batch, cache=FeatureCache)
        then = None if options.then is None else sum(epochs(net, data, 10, options.batch, options.then))
        limit = epochs(Classifier(None, width), by_hand, 10, options.batch)[1:]
        loading = epochs(Classifier(None, width), with_images, 10, options.batch)[1:]
        augmented = Augmented(data)
        both = [
            epochs(net, augmented, 1, options.batch, cache=cache)[0]
            for cache in (None, FeatureCache, FeatureCache, None)
        ]
        middle = {
            "uncached": statistics.median(uncached),
            "cached, 1st": first,
            "cached, 2nd": second,
            "cached, 3rd-10th": statistics.median(cached),
            "by hand": statistics.median(limit),
            "by hand, images loaded": statistics.median(loading),
            "augmented, uncached": (both[0] + both[3]) / 2,
            "augmented, all-miss": (both[1] + both[2]) / 2,
        }
        for key, value in middle.items():
            times.setdefault(key, []).append(value)
        for key, value in {
            "a cached epoch is faster by": middle["uncached"] / middle["cached, 3rd-10th"],
            "ten epochs are faster by": 10 * middle["uncached"] / (first + second + sum(cached)),
            "ten epochs could at most be": 10 * middle["uncached"] / (middle["uncached"] + 9 * middle["by hand"]),
            "speed of the limit reached": middle["by hand"] / middle["cached, 3rd-10th"],
            "the same with images loaded": middle["by hand, images loaded"] / middle["cached, 3rd-10th"],
            "ms a step more than that": 1e3 * (middle["cached, 3rd-10th"] - middle["by hand, images loaded"]) / steps,
            "the hashes alone, ms a step": 1e3 * hashing(net, images, options.batch) / steps,
            "speed kept if nothing hits": middle["augmented, uncached"] / middle["augmented, all-miss"],
        }.items():
            ratios.setdefault(key, []).append(value)
        if then is not None:
            ratios.setdefault("ten epochs of then take as long", []).append(then / (first + second + sum(cached)))
    print(f"{name}")
    print("  ms an epoch: " + ", ".join(f"{key} {1e3 * statistics.median(value):.0f}" for key, value in times.items()))
    for key, values in ratios.items():
        print(f"  {key:<34}{spread(values)}", flush=True)


def measure_on(device: str, name: str, precision: Any, options: argparse.Namespace) -> None:
    make, width = ON_DEVICE[name]
    net = Classifier(make(), width).to(device)
    pinned = device == "cuda"
    batches, features, with_images = [], [], []
    for _ in range(options.batches):
        images, labels = torch.randn(options.batch, 3, 224, 224), torch.randint(10, (options.batch,))
        images = images.pin_memory() if pinned else images
        assert net.backbone is not None
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision != "32-true"):
            given = net.backbone(images.to(device)).cpu()
        given = given.pin_memory() if pinned else given
        batches.append((images, labels))
        features.append((given, labels))
        with_images.append((given, labels, images))
    ratios: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        common = {"batch": None, "device": device, "precision": precision}
        uncached = statistics.median(epochs(net, Batches(batches), 4, **common)[1:])
        cached = statistics.median(epochs(net, Batches(batches), 10, cache=FeatureCache, **common)[2:])
        hand = [
            statistics.median(epochs(Classifier(None, width), Batches(data), 10, **common)[2:])
            for data in (features, with_images)
        ]
        for key, value in {
            "ms a step: uncached": 1e3 * uncached / options.batches,
            "ms a step: cached": 1e3 * cached / options.batches,
            "ms a step: by hand, images loaded": 1e3 * hand[1] / options.batches,
            "ms a step: by hand": 1e3 * hand[0] / options.batches,
            "a cached epoch is faster by": uncached / cached,
            "speed of by hand, images loaded": hand[1] / cached,
        }.items():
            ratios.setdefault(key, []).append(value)
    print(f"{name}, {precision}")
    for key, values in ratios.items():
        print(f"  {key:<34}{spread(values)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nets", nargs="+", choices=list(NETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, help="32, and 256 on another device")
    parser.add_argument("--batches", type=int, default=16, help="on another device")
    parser.add_argument("--against", metavar="COMMIT", help="time its FeatureCache, too")
    options = parser.parse_args()
    options.then = cache_of(options.against) if options.against else None
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning_freeze"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    options.batch = options.batch or (32 if options.device == "cpu" else 256)
    if options.device != "cpu":
        card = torch.cuda.get_device_name() if options.device == "cuda" else options.device
        print(f"torch {torch.__version__}, {card}, {options.batches} batches of {options.batch} images at 224 pixels")
        for name in options.nets or ON_DEVICE:
            for precision in ("32-true", "bf16-mixed"):
                measure_on(options.device, name, precision, options)
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {options.samples} images in batches of {options.batch}")
    for name in options.nets or NETS:
        measure(name, options)


if __name__ == "__main__":
    main()
