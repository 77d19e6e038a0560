"""What happens to the folder of a FeatureCache from outside does not end a fit, and changes no bit of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import FeatureCache
from tests.callbacks.test_feature_cache import Frozen
from tests.nets import loader, moved, snapshot, trainer

resource = pytest.importorskip("resource")


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_freeze")


class Narrow(Frozen):
    """Its features are narrower than their entries in the index, so that it is the index that outgrows a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 1, 5), nn.ReLU()).requires_grad_(False)
        self.neck = nn.Linear(1, 4)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system refuses to make a file longer, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fit(make: type[Frozen], callbacks: list[Any], samples: int = 24, epochs: int = 4, batch_size: int = 4) -> Frozen:
    torch.manual_seed(0)
    net = make()
    trainer(callbacks=callbacks, max_epochs=epochs).fit(net, loader(samples, batch_size))
    return net


def check_same(one: Frozen, other: Frozen) -> None:
    assert torch.equal(torch.stack(one.losses), torch.stack(other.losses))
    assert moved(snapshot(one), snapshot(other)) == set()


def sentences(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("FeatureCache")]


# A full disk


@pytest.mark.parametrize("end", [0, 30, 10_000, 20_000, 33_000, 70_000])
def test_a_full_disk_costs_speed_only(end: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rows take 16 kB, the index would take 131 kB."""
    options: dict[str, Any] = {"samples": 4096, "epochs": 3, "batch_size": 64}
    plain = fit(Narrow, [], **options)
    cache = FeatureCache("backbone", storage=tmp_path / "features")
    with files_end_at(end):
        cached = fit(Narrow, [cache], **options)
    check_same(plain, cached)
    said = [sentence for sentence in sentences(caplog) if "cannot be written to" in sentence]
    assert len(said) == 1
    assert "File too large" in said[0]
    if end >= 20_000:
        assert cache.stats.hits > end // 32 // 2
    else:
        assert "off, because the folder cannot be written to" in said[0]
    again = FeatureCache("backbone", storage=tmp_path / "features")
    check_same(plain, fit(Narrow, [again], **options))
    assert "refused" not in caplog.text
    assert again.stats.hits > 4096
