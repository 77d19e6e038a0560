"""Law 10: what an optimizer would refuse in mid-fit is refused at its start; a schedule that is cut short says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim import optimizer as hooks_of

from lightning_freeze import FreezeSchedule, Phase, Plateau, Ramp
from tests.nets import Net, adamw, loader, needs_muon, sgd, trainer


class OneRate(torch.optim.SGD):
    """As Prodigy and D-Adaptation: refuses groups of two rates when it steps."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("Setting different lr values is only supported for values of 0")
        return super().step(closure)


class OneRateAtAll(torch.optim.SGD):
    """Refuses them when it is built."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise ValueError("one rate for all")


class NeverZero(torch.optim.SGD):
    """As some libraries' optimizers: refuses to be built with a rate of 0, and would step at one."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        if any(not group["lr"] for group in self.param_groups):
            raise ValueError("lr is above 0")


class Matrices(torch.optim.SGD):
    """As Muon: takes matrices only, and says so when it is built."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            if any(p.ndim != 2 for p in group["params"]):
                raise ValueError("only matrices, please")


class MatricesInSteps(torch.optim.SGD):
    """Says so when it steps."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            if any(p.grad is not None and p.ndim != 2 for p in group["params"]):
                raise NotImplementedError("a vector has no rows")
        return super().step(closure)


class NoRate(torch.optim.Optimizer):
    """Has no learning rate that could be scaled."""

    def __init__(self, params: Any, **_: Any) -> None:
        super().__init__(params, {"step_size": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["step_size"])
        return loss


class Counting(Net):
    """Counts its batches; gives its optimizer what ``chosen`` says."""

    def __init__(self, kind: Any, chosen: str = "all") -> None:
        super().__init__(lambda params: kind(params, lr=0.01))
        self.chosen, self.batches = chosen, 0
        self.words = nn.Embedding(3, 4, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        dense = [p for name, p in self.named_parameters() if not name.startswith("words.")]
        chosen = {
            "all": dense,
            "matrices": [p for p in dense if p.ndim == 2],
            "sparse": list(self.words.parameters()),
        }
        return self.make_optimizer(chosen[self.chosen])


DENSE = ["backbone", "neck", "head"]
LATE = [Phase("head.weight", epochs=1), Phase(DENSE, lr_scale={"head": 0.1})]
ADOPTS = [Phase("head.weight", epochs=1), Phase(["head", "neck"])]


@pytest.mark.parametrize(
    ("kind", "chosen", "phases", "match"),
    [
        (OneRate, "all", LATE, "OneRate refuses: Setting different lr values is only supported for values of 0 Leave"),
        (
            OneRate,
            "all",
            [Phase(DENSE, epochs=1), Phase(DENSE, epochs=1, lr_scale=0.1), Phase("head")],
            None,
        ),
        (OneRate, "all", [Phase(DENSE, epochs=1), Phase(DENSE)], None),
        (OneRate, "all", [Phase(DENSE, lr_scale=Ramp(0.1))], None),
        (OneRate, "all", [Phase(DENSE, lr_scale={"head": Ramp(1.0, 2.0)})], "OneRate refuses: Setting different"),
        (OneRate, "all", [Phase(DENSE, lr_scale={"head": Ramp(0.5, 1.0)})], "OneRate refuses: Setting different"),
        (NeverZero, "all", [Phase(DENSE, lr_scale={"head": Ramp(0.0)})], None),
        (OneRateAtAll, "all", LATE, "OneRateAtAll refuses: one rate for all Leave lr_scale out"),
        (NoRate, "all", LATE, r"lr_scale scales lr, which is not there in group 0 of NoRate"),
        (NoRate, "all", [Phase("head", epochs=1), Phase(DENSE)], None),
        (Matrices, "matrices", ADOPTS, r"Matrices was not given and does not take: .*It says: only matrices, please"),
        (Matrices, "matrices", [Phase("head.weight", epochs=1), Phase(["neck.weight", "head.weight"])], None),
        (MatricesInSteps, "matrices", ADOPTS, r"does not take: .*head\.bias\. It says: a vector has no rows"),
        pytest.param(
            getattr(torch.optim, "Muon", None),
            *("matrices", ADOPTS, r"Muon was not given and does not take: .*Muon only supports"),
            marks=needs_muon,
        ),
        (torch.optim.SparseAdam, "sparse", [Phase("words", epochs=1), Phase(["words", "head"])], "It says: SparseAdam"),
        (torch.optim.SGD, "matrices", ADOPTS, None),
        (torch.optim.AdamW, "all", LATE, None),
        (torch.optim.Adafactor, "all", LATE, None),
    ],
)
def test_refused_at_fit_start_in_the_optimizers_words(
    kind: Any, chosen: str, phases: list[Phase], match: str | None
) -> None:
    """And what it does not refuse runs."""
    net = Counting(kind, chosen)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    run = trainer(callbacks=[FreezeSchedule(phases, verbose=False)], max_epochs=2)
    if match is None:
        run.fit(net, loader())
        assert net.batches == 12
    else:
        with pytest.raises(ValueError, match=match):
            run.fit(net, loader())
        assert net.batches == 0
    # Nothing stays behind either way.
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    (group,) = run.optimizers[0].param_groups
    assert len(group["params"]) == {"all": 12, "matrices": 2, "sparse": 1}[chosen]
    assert not hooks_of._global_optimizer_pre_hooks
    assert not hooks_of._global_optimizer_post_hooks


# Ends


class Flat(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)
        self.log("other", 1.0)


class StopsAt(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def plateau(patience: int) -> list[Phase]:
    return [Phase("head", until=Plateau("val_loss", patience=patience)), Phase("*", name="all")]


BY_EPOCHS = [Phase("head", epochs=2), Phase("neck", epochs=2), Phase("*", name="all")]
FORESEEN = (
    "phase 1/2 'head' waits for a plateau of 'val_loss' with patience=3, at which EarlyStopping(patience={}) ends the "
    "fit: later phases never begin. Give EarlyStopping more patience, list it after FreezeSchedule, which then has it "
    "count anew in each phase, or leave it out and end the last phase by a Plateau."
)


@pytest.mark.parametrize(
    ("phases", "other", "options", "expected"),
    [
        (
            plateau(3),
            lambda: EarlyStopping("val_loss", patience=3),
            {"max_epochs": 9},
            [],
        ),
        (
            plateau(3),
            lambda: EarlyStopping("val_loss", patience=1),
            {"max_epochs": 9},
            [FORESEEN.format(1), "the fit ended at epoch 2, step 12 in phase 1/2 'head'; never began: 'all'."],
        ),
        (plateau(2), lambda: EarlyStopping("val_loss", patience=4), {"max_epochs": 9}, []),
        (
            plateau(3),
            lambda: EarlyStopping("other", patience=1),
            {"max_epochs": 9},
            ["the fit ended at epoch 2, step 12 in phase 1/2 'head'; never began: 'all'."],
        ),
        (
            BY_EPOCHS,
            lambda: StopsAt(1),
            {"max_epochs": 9},
            ["the fit ended at epoch 2, step 12 in phase 1/3 'head'; never began: 'neck', 'all'."],
        ),
        (
            BY_EPOCHS,
            lambda: StopsAt(2),
            {"max_epochs": 9},
            ["the fit ended at epoch 3, step 18 in phase 2/3 'neck'; never began: 'all'."],
        ),
        (BY_EPOCHS, lambda: StopsAt(4), {"max_epochs": 9}, []),
        (
            BY_EPOCHS,
            lambda: StopsAt(9),
            {"max_steps": 18},
            [
                "phase 3/3 'all' never begins: the fit ends before, at max_steps=18.",
                "the fit ended at epoch 3, step 18 in phase 2/3 'neck'; never began: 'all'.",
            ],
        ),
        (
            BY_EPOCHS,
            lambda: StopsAt(9),
            {"max_epochs": 2},
            [
                "phase 2/3 'neck' never begins: the fit ends before, at max_epochs=2.",
                "phase 3/3 'all' never begins: the fit ends before, at max_epochs=2.",
                "the fit ended at epoch 2, step 12 in phase 1/3 'head'; never began: 'neck', 'all'.",
            ],
        ),
        (BY_EPOCHS, lambda: StopsAt(9), {"max_steps": 30}, []),
    ],
)
def test_an_early_end_is_foreseen_or_said(
    phases: list[Phase], other: Any, options: Any, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_epochs": None, **options}
    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        trainer(callbacks=[FreezeSchedule(phases), other()], **options).fit(Flat(sgd), loader(), loader())
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lightning_freeze")] == expected


def test_what_is_foreseen_is_said_before_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    counts = []

    class Notes(Flat):
        def on_train_start(self) -> None:
            counts.append(len(caplog.records))

    with caplog.at_level(logging.WARNING, "lightning_freeze"):
        schedule = FreezeSchedule(plateau(3))
        trainer(callbacks=[schedule, EarlyStopping("val_loss", patience=2)]).fit(Notes(adamw), loader(), loader())
    assert counts == [1]


def one_cycle(optimizer: Any, steps: int) -> Any:
    return lrs.OneCycleLR(optimizer, 0.1, total_steps=steps)


class Endless(torch.utils.data.IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter(loader().dataset)


class ByHand(Counting):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, "all")
        self.automatic_optimization = False


NO_LENGTH = "cannot be known .*: say steps=, here or of the phase"


@pytest.mark.parametrize(
    ("phase", "options", "match"),
    [
        ({"lr_scale": Ramp(0.1)}, {"data": Endless()}, f"'head' has lr_scale=Ramp.start=0.1., .* {NO_LENGTH}"),
        ({"lr_scale": {"head": Ramp(0.1, epochs=1)}}, {"data": Endless()}, NO_LENGTH),
        ({"lr_scale": Ramp(0.1)}, {"data": Endless(), "max_steps": 4}, None),
        ({"lr_scale": Ramp(0.1, steps=3)}, {"data": Endless()}, None),
        ({"lr_scale": Ramp(0.1), "steps": 3}, {"data": Endless()}, None),
        ({"lr_scale": Ramp(0.1)}, {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 1})]}, None),
        ({"lr_scale": Ramp(0.1, epochs=1)}, {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 1})]}, NO_LENGTH),
        ({"lr_scheduler": one_cycle}, {"data": Endless()}, f"has lr_scheduler=.*one_cycle.* {NO_LENGTH}"),
        ({"lr_scheduler": one_cycle, "steps": 3}, {"data": Endless()}, None),
        ({"lr_scheduler": "restart"}, {}, "'restart', but configure_optimizers returns no scheduler"),
        ({"lr_scheduler": lambda o, steps: lrs.OneCycleLR(o, 0.1)}, {}, "cannot be made: You must define either"),
        ({"lr_scheduler": lambda o, steps: None}, {}, "cannot be made: The provided lr scheduler `NoneType`"),
        ({"lr_scheduler": lambda o, steps: lrs.ReduceLROnPlateau(o)}, {}, "cannot be made: The .* include a monitor"),
        ({"lr_scheduler": {"class_path": "torch.optim.Cosine"}}, {}, "cannot be made: .* has no attribute 'Cosine'"),
        (
            {"lr_scheduler": one_cycle},
            {"callbacks": [StochasticWeightAveraging(0.1)]},
            "StochasticWeightAveraging puts",
        ),
        ({"lr_scheduler": one_cycle, "steps": 3}, {"net": ByHand}, "has to return one scheduler for each optimizer"),
        ({"lr_scale": Ramp(0.1), "epochs": 1}, {"net": ByHand}, NO_LENGTH),
    ],
)
def test_rates_of_a_later_phase_that_cannot_be_are_refused(
    phase: dict[str, Any], options: dict[str, Any], match: str | None
) -> None:
    options = {"max_epochs": 2, "callbacks": [], "data": loader().dataset, **options}
    net = options.pop("net", lambda: Counting(torch.optim.SGD, "all"))()
    batches = torch.utils.data.DataLoader(options.pop("data"), batch_size=4)
    later = Phase("head", **phase)
    after = [Phase("neck")] if later.has_end else []
    schedule = FreezeSchedule([Phase(DENSE, steps=2), later, *after], frozen_mode="train")
    run = trainer(**{**options, "callbacks": [schedule, *options["callbacks"]]})
    if match is None:
        run.fit(net, batches)
        assert net.batches > 3
    else:
        with pytest.raises(MisconfigurationException, match=match):
            run.fit(net, batches)
        assert net.batches == 0
        assert run.lr_scheduler_configs == []
