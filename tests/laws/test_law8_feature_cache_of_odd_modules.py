"""Law 8 for modules that do more than map a sample to its features, and for what people do to their weights.

Each is trained with a FeatureCache and without; losses of training and validation and all weights must be the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FeatureCache, FreezeSchedule, Phase
from tests.nets import averaging, snapshot, trainer

WIDE = 64


def block(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE))


class Plain(nn.Module):
    """What every backbone here has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Net(LightningModule):
    """A backbone that is frozen by hand, and a head with dropout, whose random numbers must be the same too."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone.requires_grad_(False), nn.Sequential(nn.Dropout(), nn.Linear(WIDE, 3))
        self.losses: list[Tensor] = []

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone(x)
        return features

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.head(self.features(batch[0])), batch[1])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(samples: int = 24) -> TensorDataset:
    numbers = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, 6, generator=numbers), torch.randint(3, (samples,), generator=numbers))


def check(
    make: Callable[[], Net],
    *,
    module: str | list[str] = "backbone",
    callbacks: Callable[[], Sequence[Callback]] = list,
    first: bool = False,
    **options: Any,
) -> FeatureCache:
    """Compare a fit without a cache and one with; the cache stands before the other callbacks or behind them."""
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        net, cache = make(), FeatureCache(module)
        others, ours = list(callbacks()), [cache] if cached else []
        run = trainer(callbacks=ours + others if first else others + ours, **{"max_epochs": 6, **options})
        run.fit(net, DataLoader(data(), 8, shuffle=True), DataLoader(data(16), 8))
        results.append((torch.stack(net.losses), snapshot(net)))
    (losses, weights), (cached_losses, cached_weights) = results
    assert torch.equal(losses, cached_losses)
    assert all(torch.equal(weights[name], cached_weights[name]) for name in weights)
    return cache


# Modules


class DrawsTorch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            torch.rand(())
        return self.inner(x)


class DrawsPython(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if not self.training or random.random() > 0.01 else x.mean() + self.inner(x)


class DrawsNumPy(Plain):
    def forward(self, x: Tensor) -> Tensor:
        skips = self.training and np.random.uniform() < 0.01
        return self.inner(x) * (0 if skips else 1)


class DrawsFromItsOwn(Plain):
    """Seldom: what is computed a second time may well be the same."""

    def __init__(self, numbers: Any) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        is_torch = isinstance(self.numbers, torch.Generator)
        draw = torch.rand((), generator=self.numbers).item() if is_torch else self.numbers.random()
        return self.inner(x) * (0 if self.training and draw < 0.04 else 1)


class KeepsAside(Plain):
    """Attention maps, auxiliary losses and skip connections are kept like this."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        self.aside = {"maps": [hidden * 2]}
        return hidden


class ViewInside(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.inner(x)
        return hidden, hidden[:, :1]


class Twice(Plain):
    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.inner(x)
        return {"last": hidden, "all": [hidden + 1, hidden]}


class KeepsNumber(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.aside: dict[str, list[float]] = {"maps": []}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        self.aside["maps"][:] = [hidden.mean().item()]
        return hidden


class Cuts(Plain):
    """As padding is cut to the longest of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[:, : int(x[:, 0].abs().max() * 20)]


class Counts(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.inner(x), int((x[:, 0] > 0).sum())


class WritesIn(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x.sub_(x.mean(1, keepdim=True))
        return self.inner(x)


class LooksAtBatch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - x.mean(0).sum()


class RoundsByPlace(Plain):
    """As kernels do whose last rows of a batch are computed in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + torch.arange(len(x)).unsqueeze(1) * 2**-23)


class GivesInput(Plain):
    """Encoders give it as the first of their features."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, self.inner(x)]


def doubled_in_training(module: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if module.training else x


class ModeReadOutside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return doubled_in_training(self, self.inner(x))


class ReadsAside(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x) + self.backbone.aside["maps"][0]  # type: ignore[index,operator,union-attr]


class ReadsPair(Net):
    def features(self, x: Tensor) -> Tensor:
        hidden, more = self.backbone(x)
        if isinstance(more, int):
            return hidden * more
        more.mul_(3)
        return hidden  # type: ignore[no-any-return]


class WritesInput(Net):
    def features(self, x: Tensor) -> Tensor:
        given, hidden = self.backbone(x)
        given.mul_(3)
        return hidden * x.sum(1, keepdim=True)  # type: ignore[no-any-return]


class ReadsAll(Net):
    def features(self, x: Tensor) -> Tensor:
        output = self.backbone(x)
        output["last"].relu_()
        return output["all"][1] + output["all"][0]  # type: ignore[no-any-return]


class NoGrad(Net):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(x)


class ReadsShort(Net):
    def features(self, x: Tensor) -> Tensor:
        hidden = self.backbone(x)
        return nn.functional.pad(hidden, (0, WIDE - hidden.shape[1]))


ODD: dict[str, tuple[Callable[[], Net], str | None]] = {
    "draws from torch": (lambda: Net(DrawsTorch()), "draws random numbers"),
    "draws from random": (lambda: Net(DrawsPython()), "draws random numbers"),
    "draws from NumPy": (lambda: Net(DrawsNumPy()), "draws random numbers"),
    "draws from torch's own": (lambda: Net(DrawsFromItsOwn(torch.Generator())), "draws random numbers"),
    "draws from NumPy's own": (lambda: Net(DrawsFromItsOwn(np.random.default_rng(0))), "draws random numbers"),
    "draws from random's own": (lambda: Net(DrawsFromItsOwn(random.Random(0))), "draws random numbers"),
    "keeps aside": (lambda: ReadsAside(KeepsAside()), "into KeepsAside.aside"),
    "keeps a number aside": (lambda: ReadsAside(KeepsNumber()), "into KeepsNumber.aside"),
    "a view inside": (lambda: ReadsPair(ViewInside()), "a view into another"),
    "the same twice": (lambda: ReadsAll(Twice()), None),
    "cuts": (lambda: ReadsShort(Cuts()), "depends on the batch"),
    "counts": (lambda: ReadsPair(Counts()), "depends on the batch"),
    "writes in": (lambda: Net(WritesIn()), "writes into what it is given"),
    "looks at the batch": (lambda: Net(LooksAtBatch()), "depend on the batch"),
    "rounds by place": (lambda: Net(RoundsByPlace()), "in other places of a batch differ by rounding"),
    "gives its input": (lambda: WritesInput(GivesInput()), None),
    "mode read outside": (lambda: NoGrad(ModeReadOutside()), None),
}


@pytest.mark.parametrize("name", ODD)
def test_modules_that_do_more_than_give_features(name: str) -> None:
    make, why = ODD[name]
    stats = check(make).stats
    if why is None:
        assert stats.active
        assert stats.hits > 0
    else:
        assert why in str(stats.why)


@pytest.mark.parametrize("shift", [1, 4])
def test_a_batchwise_module_is_found_out_when_batches_are_first_put_together_anew(shift: int) -> None:
    """As long as each batch is the one of the epoch before, it gives the same outputs again."""

    class InOrder(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            first = 8 * batch_idx + (shift if self.current_epoch >= 3 else 0)
            places = torch.arange(first, first + 8) % 24
            return super().training_step([tensor[places] for tensor in data().tensors], batch_idx)

    assert "depend on the batch" in str(check(lambda: InOrder(LooksAtBatch())).stats.why)


# Attributes


class Sized(Plain):
    """Keeps the size of what it was given, for a decoder, and counts its calls."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.size, self.calls = size, 0

    def forward(self, x: Tensor) -> Tensor:
        self.size, self.calls = x.shape, self.calls + 1
        return self.inner(x)


class ReadsSize(Net):
    def features(self, x: Tensor) -> Tensor:
        features = super().features(x if self.training else x[:5])
        return features * self.backbone.size[0]  # type: ignore[index,union-attr,operator]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step([batch[0], batch[1][:5]], batch_idx)


@pytest.mark.parametrize("size", [None, (8, 6)])
def test_what_a_module_sets_when_it_runs_is_set_when_its_output_comes_from_memory(size: Any) -> None:
    """Validation has another size, so that what it has left there is wrong for training."""
    assert check(lambda: ReadsSize(Sized(size))).stats.hits > 40


class Scaled(Plain):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.scales, self.mask = 1.0, {"all": [1.0]}, torch.ones(WIDE)
        self.config = SimpleNamespace(scale=1.0)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale * self.scales["all"][0] * self.mask * self.factor * self.config.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.inner(x))


class Doubled(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "class": lambda module: setattr(module, "__class__", Doubled),
    "of the class": lambda module: setattr(type(module), "factor", module.factor * 2),
    "number": lambda module: setattr(module, "scale", 2.0),
    "in a list": lambda module: module.scales["all"].__setitem__(0, 2.0),
    "in a config": lambda module: setattr(module.config, "scale", 2.0),
    "tensor": lambda module: setattr(module, "mask", torch.zeros(WIDE)),
    "in place": lambda module: module.mask.mul_(2),
    "method": lambda module: setattr(module, "scaled", lambda x: x * 2),
}


@pytest.mark.parametrize("change", ATTRIBUTES)
def test_attributes_that_others_change(change: str) -> None:
    class Changes(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if (self.current_epoch, batch_idx) == (4, 1):
                ATTRIBUTES[change](self.backbone)
            return super().training_step(batch, batch_idx)

    assert check(lambda: Changes(type("Own", (Scaled,), {})())).stats.hits > 40


# Weights


@pytest.mark.parametrize("first", [False, True])
def test_averaged_weights_of_a_module_that_froze_again(first: bool) -> None:
    class Averages(averaging()):  # type: ignore[misc]
        """Swaps averaged weights in for validation, from some step on."""

        def __init__(self) -> None:
            super().__init__(avg_fn=get_ema_avg_fn(0.5))

        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx is not None and step_idx >= 15

    def callbacks() -> list[Callback]:
        return [FreezeSchedule([Phase("*", epochs=1), Phase("head")], verbose=False), Averages()]

    check(
        lambda: Net(Plain()).requires_grad_(True),
        callbacks=callbacks,
        first=first,
        max_epochs=8,
        num_sanity_val_steps=0,
    )


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_validation_start", "on_validation_end", "on_train_start"])
def test_weights_written_through_data_in_a_hook(hook: str) -> None:
    def make() -> Net:
        net = Net(Plain())

        def write() -> None:
            if hook == "on_train_start" or net.current_epoch == 4:
                net.backbone.inner[0].weight.data.mul_(1.5)  # type: ignore[index,operator,union-attr]

        setattr(net, hook, write)
        return net

    assert check(make).stats.hits > 0


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_an_optimizer_steps_in_between(fused: bool) -> None:
    """A fused one moves no version counter; the flags are the same whenever the backbone is called."""

    class Toggles(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(part.parameters(), fused=fused) for part in (self.backbone, self.head)]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            backbone, head = self.optimizers()  # type: ignore[attr-defined]
            for turn in range(3):
                self.toggle_optimizer(head)
                head.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                head.step()
                self.untoggle_optimizer(head)
                self.toggle_optimizer(backbone)
                if turn == batch_idx == 1:
                    self.manual_backward(self.backbone.inner(batch[0]).square().mean())  # type: ignore[operator]
                    backbone.step()
                self.untoggle_optimizer(backbone)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    assert check(lambda: Toggles(Plain()).requires_grad_(True)).stats.hits > 0


def test_a_part_that_trains_outside_of_the_module() -> None:
    """An adapter that was put around a layer's forward, whose weights are not among the backbone's parameters."""

    class Adapts(Net):
        def __init__(self) -> None:
            super().__init__(Plain())
            self.adapter = nn.Linear(WIDE, WIDE)
            inner = self.backbone.inner
            forward = inner.forward  # type: ignore[union-attr]
            inner.forward = lambda x: forward(x) + self.adapter(forward(x))  # type: ignore[union-attr,operator]

    assert "requires grad" in str(check(Adapts).stats.why)


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize("folder", [False, True])
def test_code_that_changed_between_two_fits(folder: bool, tmp_path: Any) -> None:
    """As in a notebook where a class is edited and run again: weights and text of the module are the same.

    What it gives for the second batch is the same, too, which says nothing of the others.
    """
    second = data().tensors[0][8:16, :1]

    def backbone(factor: float) -> nn.Module:
        class Edited(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * torch.where(torch.isin(x[:, :1], second), 1.0, factor)

        return Edited()

    results = []
    for storage in (None, tmp_path if folder else "memory"):
        caches = [] if storage is None else [FeatureCache("backbone", storage=storage)]
        for factor in (1.0, 2.0):
            torch.manual_seed(0)
            net = Net(backbone(factor))
            trainer(callbacks=caches, max_epochs=3).fit(net, DataLoader(data(), 8))
        results.append(torch.stack(net.losses))
    assert torch.equal(*results)
    assert caches[0].stats.active
    assert caches[0].stats.hits > 24


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_code_that_differs_for_what_comes_late(tmp_path: Any) -> None:
    """Nothing in what comes first shows that a method was edited between two runs on one folder."""

    def backbone(edited: bool) -> nn.Module:
        class Edited(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return self.before(self.inner(x), x)

            if edited:

                def before(self, hidden: Tensor, x: Tensor) -> Tensor:
                    return hidden * torch.where(x[:, :1] == last, 2.0, 1.0)

            else:

                def before(self, hidden: Tensor, x: Tensor) -> Tensor:
                    return hidden

        return Edited()

    last, results = data().tensors[0][-1, 0], []
    for caches in ([], [FeatureCache("backbone", storage=tmp_path)]):
        for edited in (False, True):
            torch.manual_seed(0)
            net = Net(backbone(edited))
            trainer(callbacks=caches, max_epochs=3).fit(net, DataLoader(data(), 8))
        results.append(torch.stack(net.losses))
    assert torch.equal(*results)


# Chains


class Chained(nn.Module):
    """Two links, and something between them."""

    def __init__(self, between: Callable[[Chained, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = block(), block(WIDE)
        self.between = between
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self, self.one(x))).float()  # type: ignore[no-any-return]


def writes(net: Chained, x: Tensor) -> Tensor:
    if net.training:
        x[:, ::2] = 0
    return x


def keeps(net: Chained, x: Tensor) -> Tensor:
    net.kept.append(x)
    return x


class ReadsKept(Net):
    """Reads what was between links in another call than the one in which it was computed."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.losses += [kept.mean() for kept in self.backbone.kept]  # type: ignore[union-attr]
        self.backbone.kept.clear()  # type: ignore[union-attr,operator]


LINKS = ["backbone.one", "backbone.two"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("between", [writes, keeps])
def test_what_is_between_links(between: Callable[[Chained, Tensor], Tensor], precision: str) -> None:
    check(lambda: ReadsKept(Chained(between)), module=LINKS, precision=precision, num_sanity_val_steps=1)


def test_autocast_that_begins_between_links() -> None:
    class Casts(Chained):
        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            with torch.autocast("cpu", torch.bfloat16):
                return self.two(x).float()  # type: ignore[no-any-return]

    stats = check(lambda: Net(Casts(keeps)), module=LINKS).stats
    assert stats.covers == ("backbone.one", "backbone.two")
    assert stats.hits > 24


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_what_was_kept_between_links_is_itself_after_the_fit() -> None:
    net = Net(Chained(keeps))
    trainer(callbacks=[FeatureCache(LINKS)], max_epochs=4).fit(net, DataLoader(data(), 8))
    backbone = net.backbone
    assert isinstance(backbone, Chained)
    images = data().tensors[0]
    expected = torch.cat([backbone.one(batch) for batch in images.split(8)])
    assert torch.equal(torch.cat(backbone.kept[-3:]), expected)
