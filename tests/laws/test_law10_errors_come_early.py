"""Law 10: what cannot work is said at construction or before the first batch, with what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_freeze import FreezeBatchNorm, FreezeSchedule, Phase, Plateau, chain_thaw, gradual_unfreezing
from tests.nets import Net, loader, trainer


class NoBatch(Net):
    """Fails the test if a batch is trained."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pytest.fail("a batch was trained before the error came")


def refused(error: type[Exception], match: str, *callbacks: Any, net: Net | None = None) -> None:
    with pytest.raises(error, match=match):
        trainer(callbacks=list(callbacks)).fit(net or NoBatch(), loader(), loader())


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: FreezeSchedule([]), ValueError, "has no phases"),
        (lambda: FreezeSchedule(Phase("*")), TypeError, "list of phases"),
        (
            lambda: FreezeSchedule(Phase("head", epochs=1), Phase("*")),
            TypeError,
            r"not Phase\(train='head', epochs=1\), Phase\(train='\*'\): FreezeSchedule\(\[Phase",
        ),
        (lambda: FreezeSchedule(chain_thaw(["neck", "head"]), Phase("*")), TypeError, "list of phases"),
        (
            lambda: FreezeSchedule({0: {"params": ["head"]}, 1: {"params": ["*"]}}),
            TypeError,
            r"FreezeSchedule\(list\(phases.values\(\)\)\)",
        ),
        (
            lambda: FreezeSchedule([{"class_path": "lightning_freeze.Phase", "init_args": {"train": "*", "epoch": 1}}]),
            ValueError,
            "Phase 1 has no option 'epoch'. Did you mean 'epochs'",
        ),
        (
            lambda: FreezeSchedule([{"train": "*", "until": {"class_path": "Plateau", "init_args": {"monitr": "x"}}}]),
            ValueError,
            "no option 'monitr'. Did you mean 'monitor'",
        ),
        (lambda: FreezeSchedule([Phase("head"), Phase("*")]), ValueError, "Phase 1 of 2 .'head'. has no end"),
        (lambda: FreezeSchedule(["head"]), TypeError, "Phase 1 is 'head'"),
        (lambda: FreezeSchedule([{"trian": "head"}]), ValueError, "no option 'trian'. Did you mean 'train'"),
        (lambda: FreezeSchedule([{"epochs": 2}]), ValueError, "does not say what trains"),
        (
            lambda: FreezeSchedule([{"train": "*", "until": {"monitr": "x"}}]),
            ValueError,
            "no option 'monitr'. Did you mean 'monitor'",
        ),
        (lambda: Phase("head", epochs=0), ValueError, "epochs is at least 1"),
        (lambda: Phase("head", epochs=2, steps=-1), ValueError, "steps is at least 1"),
        (lambda: Phase("head", epochs=1.5), TypeError, "epochs is a whole number"),
        (lambda: Phase("head", epochs=True), TypeError, "epochs is a whole number"),
        (lambda: Phase("head", until="val_loss"), TypeError, "until is a Plateau"),
        (lambda: Phase("head", until=Plateau), TypeError, "until is a Plateau"),
        (
            lambda: Phase("head", until=lambda run: True),
            TypeError,
            r"is called with \(trainer, pl_module\), .* too many",
        ),
        (
            lambda: Phase(lambda parameter: True),
            TypeError,
            r"is called with \(name, parameter\), which it does not take",
        ),
        (lambda: Phase("*", lr_scale={(lambda a, b, c: True): 0.1}), TypeError, "missing a required argument: 'c'"),
        (lambda: Phase(""), ValueError, "say what trains"),
        (lambda: Phase([]), ValueError, "say what trains"),
        (lambda: Phase("*", lr_scale=0.0), ValueError, "above 0 and finite"),
        (lambda: Phase("*", lr_scale={"head": float("nan")}), ValueError, "above 0 and finite"),
        (lambda: Phase("*", lr_scale={"head": "0.1"}), TypeError, "a factor is a number"),
        (lambda: Phase("*", lr_scale=[0.1, 1]), TypeError, "a factor is a number, a Ramp, or {selector: factor}"),
        (lambda: FreezeSchedule([gradual_unfreezing(["a"]), Phase("*")]), TypeError, r"by a star: \[\*phases, …\]"),
        (lambda: FreezeSchedule({"warm": Phase("head")}), TypeError, r"FreezeSchedule\(list\(phases\.values"),
        (lambda: FreezeSchedule([{"train": "*", "lr_scale": {"_target_": "Ramp", "start": 0.1}}]), ValueError, "Hydra"),
        (lambda: Phase("*", lr_scale="1e-1"), TypeError, "YAML takes 1e-1 for text: write 1.0e-1"),
        (lambda: Phase(Net().head), TypeError, 'not a module .Linear.. Give its dotted name, .* or "type:Linear"'),
        (lambda: Phase("*", lr_scale={3: 0.1}), TypeError, "A selector is a string, a callable or a list of them"),
        (lambda: Plateau(""), ValueError, "name a logged metric"),
        (lambda: Plateau("x", min_delta="1e-3"), TypeError, "min_delta is a number. YAML takes 1e-3 .* write 1.0e-3"),
        (lambda: Plateau("x", min_delta="small"), TypeError, "min_delta is a number.$"),
        (
            lambda: FreezeSchedule([{"train": "*", "until": {"patience": 3}}]),
            ValueError,
            "Phase 1: until={'patience': 3} does not say which metric: add 'monitor'",
        ),
        (lambda: FreezeBatchNorm(3), TypeError, "A selector is a string, a callable or a list of them, not 3"),
        (lambda: FreezeBatchNorm(nn.BatchNorm2d), TypeError, "not the class BatchNorm2d"),
        (lambda: Plateau("x", patience=0), ValueError, "patience is at least 1"),
        (lambda: Plateau("x", mode="up"), ValueError, "mode is 'min' or 'max'"),
        (lambda: Plateau("x", min_delta=-1.0), ValueError, "0 or more"),
        (lambda: FreezeSchedule([Phase("*")], frozen_mode="evil"), ValueError, "Did you mean 'eval'"),
        (lambda: FreezeSchedule([Phase("*")], optimizer_state="load"), ValueError, "one of 'keep', 'drop', 'offload'"),
    ],
)
def test_at_construction(build: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build()


@pytest.mark.parametrize(
    ("phases", "match"),
    [
        (
            [Phase("head", epochs=1), Phase("backbon.*")],
            r'Phase\(train="backbon\.\*"\) matches no parameter\. Did you mean "backbone\.\*"\?',
        ),
        ([Phase("head", epochs=1), Phase(["*", "!*"])], "selects nothing"),
        ([Phase("*", lr_scale={"bckbone": 0.1})], r'Phase\(lr_scale=\{"bckbone": …\}\) .* Did you mean "backbone"'),
        ([Phase("*", lr_scale={"backbone": 0.1, "*": 0.5})], "later one holds"),
        (
            [Phase("head", epochs=1, lr_scale={"backbone": 0.1}), Phase("*")],
            r"Phase 'head' trains nothing that its lr_scale names \(backbone\): train it, too",
        ),
        (gradual_unfreezing("backbon"), r'gradual_unfreezing\(layers="backbon"\) .* Did you mean "backbone"'),
        (chain_thaw(["bckbone", "head"]), r'chain_thaw\(layers="bckbone"\) .* Did you mean "backbone"'),
    ],
)
def test_names_at_fit_start(phases: list[Phase], match: str) -> None:
    refused(ValueError, match, FreezeSchedule(phases))


def test_scales_for_all_layers_may_be_given_to_a_phase_that_trains_some() -> None:
    scales = {"backbone": 0.1, "head": 0.5}
    FreezeSchedule([Phase("head", epochs=1, lr_scale=scales), Phase("*", lr_scale=scales)]).preview(Net(), 2)


def test_two_schedules() -> None:
    """Lightning itself refuses two of one class when the Trainer is built; we do wherever else they meet."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FreezeSchedule`"):
        trainer(callbacks=[FreezeSchedule([Phase("*")]), FreezeSchedule([Phase("head")])])

    class Special(FreezeSchedule):
        pass

    refused(MisconfigurationException, "two FreezeSchedule", FreezeSchedule([Phase("*")]), Special([Phase("*")]))


def test_beside_a_rival() -> None:
    rival = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    refused(MisconfigurationException, "BackboneFinetuning", FreezeSchedule([Phase("*")]), rival)


def test_lbfgs() -> None:
    refused(ValueError, "LBFGS", FreezeSchedule([Phase("*")]), net=NoBatch(torch.optim.LBFGS))


class FillsIn(torch.optim.SGD):
    """As Muon as it was published, to step alike on all ranks: what has no gradient gets one of zeros."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        assert all(group["lr"] for group in groups)  # none is made up where a group has none
        super().__init__(groups, momentum=0.9)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.before(group, p)
        super().step()
        return loss

    def before(self, group: dict[str, Any], p: nn.Parameter) -> None:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


class Decays(FillsIn):
    """KellerJordan/Muon 54: the decay comes before the look at the gradient."""

    def before(self, group: dict[str, Any], p: nn.Parameter) -> None:
        p.data.mul_(1 - group["lr"] * group["weight_decay"])


class NeedsAll(FillsIn):
    """Asks every parameter for its gradient."""

    def before(self, group: dict[str, Any], p: nn.Parameter) -> None:
        p.grad.data.clamp_(-1, 1)  # type: ignore[union-attr]


class KnowsFirst(FillsIn):
    """Measures in its first step what has a gradient then, as SGD-SaI does."""

    def before(self, group: dict[str, Any], p: nn.Parameter) -> None:
        known = group.setdefault("known", {id(q) for q in group["params"] if q.grad is not None})
        if p.grad is not None and id(p) not in known:
            raise KeyError("gain")


@pytest.mark.parametrize("kind", [FillsIn, Decays, NeedsAll, KnowsFirst])
@pytest.mark.parametrize(
    "holder",
    [
        lambda: FreezeSchedule([Phase("head", steps=2), Phase("*")]),
        lambda: FreezeSchedule([Phase("*", steps=2), Phase("head")]),
        FreezeBatchNorm,
    ],
)
def test_an_optimizer_that_cannot_pass_by_what_is_frozen(holder: Any, kind: type[FillsIn]) -> None:
    """It would move that, or fail in mid-fit; found at fit start, also if it freezes later only."""

    def groups(params: Any) -> torch.optim.Optimizer:
        return kind([{"params": list(params), "lr": 0.1, "weight_decay": 0.1}])

    says = f"{kind.__name__} cannot step while some of its parameters are frozen: .*if p.grad is None: continue"
    net = NoBatch(groups, lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 2)))  # a warmup
    refused(ValueError, says, holder(), net=net)


def test_an_optimizer_that_cannot_pass_by_may_have_what_always_trains() -> None:
    schedule = FreezeSchedule([Phase(["*", "!backbone"])], verbose=False)
    net = Net()
    always = [*net.neck.parameters(), *net.head.parameters()]
    net.make_optimizer = lambda _: FillsIn([{"params": always, "lr": 0.1, "weight_decay": 0.1}])
    trainer(callbacks=[schedule]).fit(net, loader())


def test_adoption_by_several_optimizers_is_ambiguous() -> None:
    class Two(NoBatch):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(module.parameters(), lr=0.1) for module in (self.neck, self.head)]

    refused(
        MisconfigurationException,
        "none of the 2 optimizers holds: backbone.0.weight",
        FreezeSchedule([Phase("*")]),
        net=Two(),
    )


def test_only_frozen_batchnorm_left_to_train() -> None:
    refused(ValueError, "train_affine=True", FreezeSchedule([Phase("type:BatchNorm2d")]), FreezeBatchNorm())


def test_batchnorm_that_is_not_there() -> None:
    refused(ValueError, "no layer with running statistics", FreezeBatchNorm("head"))


def test_a_module_that_is_only_there_after_configure_model() -> None:
    class Late(Net):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.late(torch.relu(self.neck(self.backbone(x).mean((2, 3))))))

    net = Late()
    schedule = FreezeSchedule([Phase("late", epochs=1), Phase("*")])
    trainer(callbacks=[schedule], max_epochs=2).fit(net, loader(), loader())
    assert schedule.phase_index == 1


def test_a_plateau_of_a_metric_that_nobody_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Known as soon as every loop that could log it has run: before the second epoch, of later phases too."""
    epochs = []

    class Counting(Net):
        def on_train_epoch_start(self) -> None:
            epochs.append(self.current_epoch)

    wrong = Plateau("val_los")
    schedule = FreezeSchedule([Phase("*", until=wrong), Phase("neck")], verbose=False)
    refused(MisconfigurationException, "Phase '\\*' ends by .* Did you mean 'val_loss'", schedule, net=Counting())
    assert epochs == [0]
    schedule = FreezeSchedule([Phase("head", epochs=2), Phase("*", until=wrong), Phase("neck")], verbose=False)
    refused(MisconfigurationException, "Phase '\\*' ends by", schedule, net=Counting())
    assert epochs == [0, 0, 1, 2]
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_freeze")]
    assert warning == (
        "phase 2/3 '*' ends by Plateau(monitor='val_los'), but no metric of that name was logged. Did you mean "
        "'val_loss'? Logged are: val_loss. If it is not logged in that phase either, the fit ends there with an error."
    )


def test_a_metric_that_is_logged_in_its_phase_only(tmp_path: Path) -> None:
    """Not missed before the phase nor, where the fit resumes, after it."""
    phases = [Phase("head", epochs=1), Phase("neck", until=Plateau("only", patience=1)), Phase("*")]

    class Particular(Net):
        def on_validation_epoch_end(self) -> None:
            if schedule.phase_index == 1:
                self.log("only", 1.0)

    schedule, net = FreezeSchedule(phases), Particular()
    run = trainer(tmp_path, callbacks=[schedule], max_epochs=4)
    run.fit(net, loader(), loader())
    assert schedule.history == [(0, 0, 0), (1, 6, 1), (3, 18, 2)]
    run.save_checkpoint(tmp_path / "last.ckpt")
    schedule = FreezeSchedule(phases)
    run = trainer(callbacks=[schedule], max_epochs=6)
    run.fit(net, loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert run.current_epoch == 6
