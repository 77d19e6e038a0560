"""A FeatureCache whose module is never called says so once, and never where that is nobody's mistake."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_freeze import FeatureCache, FreezeSchedule, Phase
from tests.feature_cache.test_callback import Frozen
from tests.nets import Net, Probe, loader, trainer

Use = Callable[[nn.Module, Tensor], Tensor]


class Extractor(nn.Module):
    """Gives features under another name, too, as timm's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)


class User(Frozen):
    """Uses its backbone as told by the epoch."""

    def __init__(self, *uses: Use) -> None:
        super().__init__()
        self.backbone = Extractor().requires_grad_(False)
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        use = self.uses[min(self.current_epoch, len(self.uses) - 1)]
        return self.head(torch.relu(self.neck(use(self.backbone, x).mean((2, 3)))))


def itself(backbone: Any, x: Tensor) -> Tensor:
    return backbone(x)


def method(backbone: Any, x: Tensor) -> Tensor:
    return backbone.forward_features(x)


def children(backbone: Any, x: Tensor) -> Tensor:
    return torch.relu(backbone.norm(backbone.conv(x)))


def forward(backbone: Any, x: Tensor) -> Tensor:
    return backbone.forward(x)


def not_at_all(backbone: Any, x: Tensor) -> Tensor:
    return x.repeat(1, 2, 1, 1)


def run(
    caplog: pytest.LogCaptureFixture, net: Net, *callbacks: Callback, module: Any = "backbone", **options: Any
) -> tuple[FeatureCache, list[str]]:
    caplog.set_level(logging.INFO, "lightning_freeze")
    cache = FeatureCache(module)
    trainer(callbacks=[cache, *callbacks], **{"max_epochs": 3, **options}).fit(net, loader(), loader(8))
    return cache, [r.message for r in caplog.records if "never called" in r.message]


@pytest.mark.parametrize("use", [method, children, forward])
@pytest.mark.parametrize("module", ["backbone", ["backbone"]])
def test_a_module_that_is_used_and_never_called(use: Use, module: Any, caplog: pytest.LogCaptureFixture) -> None:
    at: list[int] = []
    probe = Probe(start=lambda trainer, _: at.extend([trainer.global_step] * ("never called" in caplog.text)))
    cache, said = run(caplog, User(use), probe, module=module)
    assert len(said) == 1
    assert "backbone" in said[0]
    assert "Name the modules that are called" in said[0]
    assert min(at) == 6  # the first step of the second epoch
    assert not cache.stats.active
    assert cache.stats.covers == ()
    assert "never called" in str(cache.stats.why)


def test_what_the_sentence_advises_helps(caplog: pytest.LogCaptureFixture) -> None:
    cache, said = run(caplog, User(children), module=["backbone.conv", "backbone.norm"], max_epochs=4)
    assert not said
    assert cache.stats.hits > 24


class Walking(Frozen):
    """Goes through an nn.Sequential by itself."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.backbone:
            x = layer(x)
        return self.head(torch.relu(self.neck(x.mean((2, 3)))))


def test_layers_of_a_sequential_that_are_called_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    cache, said = run(caplog, Walking(), max_epochs=4)
    assert not said
    assert cache.stats.hits > 24


def test_no_false_alarm_where_they_are_answered(caplog: pytest.LogCaptureFixture) -> None:
    schedule = FreezeSchedule([Phase(["head", "backbone.3"])], frozen_mode="eval", verbose=False)
    cache, said = run(caplog, Walking(), schedule, max_epochs=4)
    assert not said
    assert cache.stats.hits > 24


def test_a_module_that_is_called_later_is_cached_then(caplog: pytest.LogCaptureFixture) -> None:
    cache, said = run(caplog, User(not_at_all, itself), max_epochs=5)
    assert len(said) == 1
    assert cache.stats.active
    assert cache.stats.why is None
    assert cache.stats.hits > 24


@pytest.mark.parametrize(
    ("uses", "options"),
    [
        ([itself], {}),
        ([itself, not_at_all], {}),
        ([method], {"limit_train_batches": 0}),
        ([method], {"max_epochs": 0}),
    ],
)
def test_no_false_alarm(uses: list[Use], options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert not run(caplog, User(*uses), **options)[1]


def test_no_false_alarm_where_validation_alone_calls_it(caplog: pytest.LogCaptureFixture) -> None:
    class Judge(User):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.backbone(batch[0]).mean())

    cache, said = run(caplog, Judge(not_at_all), max_epochs=6)
    assert not said
    assert cache.stats.hits > 8


def test_no_false_alarm_from_validation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_freeze")
    cache = FeatureCache("backbone")
    for _ in range(3):
        trainer(callbacks=[cache]).validate(User(method), loader(8), verbose=False)
    assert "never called" not in caplog.text


def test_no_false_alarm_while_it_trains(caplog: pytest.LogCaptureFixture) -> None:
    net = User(method)
    cache, said = run(caplog, net, FreezeSchedule([Phase(["*", "backbone"])], verbose=False))
    assert not said
    assert cache.stats.why == "backbone.conv.weight trains"


def test_it_waits_until_it_is_frozen(caplog: pytest.LogCaptureFixture) -> None:
    schedule = FreezeSchedule([Phase("*", epochs=1), Phase("head")], frozen_mode="eval", verbose=False)
    assert len(run(caplog, User(method), schedule)[1]) == 1


def test_no_false_alarm_from_epochs_that_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    class Skips(User):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            return -1

    assert not run(caplog, Skips(method))[1]


def test_no_false_alarm_while_all_calls_are_watched(caplog: pytest.LogCaptureFixture) -> None:
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert not run(caplog, User(itself))[1]
    finally:
        handle.remove()
