"""GradientAudit in real fits: each planted fault is found by name, and nothing else is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_freeze import AuditError, FreezeBatchNorm, FreezeSchedule, GradientAudit, Phase
from tests.audit.fits import (
    Gan,
    Hooked,
    cause,
    compiled,
    fit,
    found,
    keep_zeros,
    no_gradients_in_checkpoint,
    parameters,
    swept,
)
from tests.nets import Net, Probe, Stops, adamw, loader, sgd, trainer


def statistics(net: nn.Module, prefix: str) -> set[str]:
    return {name for name, _ in net.named_buffers() if name.startswith(prefix)}


# Frozen values


def add(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1e-3)


WRITES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda net: net.neck.weight.detach().copy_(net.neck.weight.detach() + 1),
    "data": lambda net: net.neck.weight.data.mul_(1.5),
    "data set": lambda net: setattr(net.neck.weight, "data", net.neck.weight.data + 1),
    "in place": lambda net: add(net.neck.weight),
    "state_dict": lambda net: net.neck.load_state_dict({**net.neck.state_dict(), "weight": torch.ones(4, 4)}),
}


MOMENTS = [
    *(("on_train_batch_start", 1), ("on_train_batch_start", 9), ("on_train_epoch_start", 5)),
    *(("on_after_backward", 0), ("on_after_backward", 5), ("on_train_batch_end", 0), ("on_train_batch_end", 4)),
    *(("on_train_epoch_end", None), ("on_validation_end", None)),
]


@pytest.mark.parametrize(
    ("write", "moment", "batch"),
    swept(
        ((write, *moment) for write in WRITES for moment in MOMENTS),
        lambda write, moment, batch: write == "data" or (moment, batch) == ("on_train_batch_end", 0),
    ),
)
def test_frozen_parameter_written_by_hand_is_found(write: str, moment: str, batch: int | None) -> None:
    net = Hooked(WRITES[write], moment, batch)
    net.neck.requires_grad_(False)
    audit = fit(net)
    assert found(audit) == {"frozen_value_moved": {"neck.weight"}}
    assert ".data" in audit.report[0].cause
    assert "TargetNetwork" in audit.report[0].fix


@pytest.mark.parametrize("first", [True, False])
def test_write_to_what_the_schedule_froze_is_found(first: bool) -> None:
    schedule = FreezeSchedule([Phase("*", epochs=1), Phase("head")], verbose=False)
    net = Hooked(lambda net: net.backbone[0].weight.data.zero_(), "on_train_batch_end", 8)
    audit = GradientAudit()
    run = trainer(callbacks=[audit, schedule] if first else [schedule, audit], max_epochs=2)
    run.fit(net, loader())
    assert found(audit) == {"frozen_value_moved": {"backbone.0.weight"}}


def test_write_between_seldom_audits_is_found() -> None:
    net = Hooked(WRITES["data"], "on_train_batch_end", 8)
    net.neck.requires_grad_(False)
    assert found(fit(net, audit=GradientAudit(every_n_epochs=5), max_epochs=2)) == {
        "frozen_value_moved": {"neck.weight"}
    }


def freeze_neck(net: Any) -> None:
    net.neck.requires_grad_(False)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_frozen_parameter_that_an_optimizer_steps_is_found(optimizer: Any, batch: int) -> None:
    # Before validation, Lightning sets every gradient to None.
    net = Hooked(freeze_neck, "on_train_batch_start", batch, optimizer=optimizer)
    keep_zeros(net)
    audit = fit(net, limit_val_batches=0)
    neck = {"neck.weight", "neck.bias"}
    assert found(audit) == {"frozen_in_step": neck, "frozen_value_moved": neck}
    assert "zero_grad(set_to_none=False)" in cause(audit, "frozen_in_step")
    assert "An optimizer holds it together with a gradient" in cause(audit, "frozen_value_moved")


def test_zero_gradients_are_no_finding_while_everything_trains() -> None:
    net = Net()
    keep_zeros(net)
    assert found(fit(net)) == {}


# Running statistics


def test_batchnorm_that_updates_with_frozen_parameters_is_found() -> None:
    net = Net()
    net.backbone.requires_grad_(False)
    audit = fit(net)
    assert found(audit) == {"frozen_statistics_moved": statistics(net, "backbone")}
    assert len(audit.report) == 6
    assert "runs in training mode" in audit.report[0].cause
    assert "FreezeBatchNorm" in audit.report[0].fix


@pytest.mark.parametrize("fix", ["FreezeBatchNorm", "FreezeSchedule", "eval"])
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_fixes_that_a_finding_names_help(fix: str) -> None:
    net = Net()
    net.backbone.requires_grad_(False)
    others: list[Callback] = []
    if fix == "FreezeBatchNorm":
        others = [FreezeBatchNorm("backbone")]
    elif fix == "FreezeSchedule":
        others = [FreezeSchedule([Phase(["head", "neck"])], verbose=False)]
    else:
        net.backbone.eval()
    assert found(fit(net, *others)) == {}


def test_statistics_of_a_layer_frozen_alone_are_found() -> None:
    net = Net()
    net.backbone[1].requires_grad_(False)
    assert found(fit(net)) == {"frozen_statistics_moved": statistics(net, "backbone.1.")}


def test_statistics_written_in_eval_mode_are_found() -> None:
    net = Hooked(lambda net: net.backbone[1].running_var.data.fill_(3), "on_train_batch_end", 1)
    audit = fit(net, FreezeBatchNorm(train_affine=True))
    assert found(audit) == {"frozen_statistics_moved": {"backbone.1.running_var"}}
    assert "something wrote to it" in audit.report[0].cause


class Counting(nn.Module):
    """Learns in a buffer too, as codebooks and queues do."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(()))
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            self.calls += 1
        return x * self.scale


@pytest.mark.parametrize(
    ("mode", "always", "cause"),
    [
        (None, False, "runs in training mode"),
        ("batchnorm", False, "runs in training mode"),
        ("eval", False, None),
        ("eval", True, "is in eval mode now"),
    ],
)
def test_any_buffer_of_a_frozen_module_that_moves_is_found(mode: Any, always: bool, cause: str | None) -> None:
    net = Net()
    net.neck = nn.Sequential(net.neck, Counting(always))
    net.neck.requires_grad_(False)
    others = [FreezeSchedule([Phase(["*", "!neck"])], frozen_mode=mode, verbose=False)] if mode else []
    audit = fit(net, *others)
    assert found(audit) == ({"frozen_statistics_moved": {"neck.1.calls"}} if cause else {})
    for finding in audit.report:
        assert cause in finding.cause
        assert always or "frozen_mode='eval'" in finding.fix
    assert found(fit(net, *others, audit=GradientAudit(ignore="neck"))) == {}


def test_buffer_of_a_module_that_trains_is_no_finding() -> None:
    net = Net()
    net.neck = nn.Sequential(net.neck, Counting(always=True))
    assert found(fit(net)) == {}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_named_where_it_moves_a_frozen_embedding(kind: Any) -> None:
    class Words(Net):
        def __init__(self) -> None:
            super().__init__()
            self.words = kind(3, 4, max_norm=0.5)

        def forward(self, x: Tensor) -> Tensor:
            words = self.words(torch.tensor([[0], [1], [2], [1]])).view(4, 4)
            return self.head(torch.relu(self.neck(self.backbone(x).mean((2, 3)) + words[: len(x)])))

    net = Words()
    audit = fit(net, FreezeSchedule([Phase(["*", "!words"])], verbose=False))
    assert found(audit) == {"frozen_value_moved": {"words.weight"}}
    assert f"{kind.__name__} has max_norm=0.5" in audit.report[0].cause
    assert "max_norm=None" in audit.report[0].fix
    net.words.max_norm = None
    assert found(fit(net, FreezeSchedule([Phase(["*", "!words"])], verbose=False))) == {}


# No gradient


LEFT_OUT = "the loss does not depend on what comes of it"
NO_GRAPH = "only where no graph is recorded (audit/test_callback.py:"
# How the features are computed, and what a finding says of it.
FAULTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "none": (lambda net, x: net.branch(x), ""),
    "unused": (lambda net, x: x, "never uses it"),
    "detach": (lambda net, x: x + net.branch(x).detach(), ".detach() at audit/test_callback.py:"),
    "numpy": (lambda net, x: x + torch.from_numpy(net.branch(x).detach().numpy()), ".detach() at audit/test_callback"),
    "item": (lambda net, x: x + torch.no_grad()(net.branch)(x).sum().item(), NO_GRAPH),
    "no_grad": (lambda net, x: x + torch.no_grad()(net.branch)(x), NO_GRAPH),
    "re-entrant checkpoint": (lambda net, x: x + checkpoint(net.branch, x.detach(), use_reentrant=True), NO_GRAPH),
    "left out": (lambda net, x: (net.branch(x), x)[1], LEFT_OUT),
    "argmax": (lambda net, x: x + net.branch(x).argmax(1, keepdim=True), LEFT_OUT),
    "its backward gives none": (lambda net, x: x + Stops.apply(net.branch(x)), LEFT_OUT),
    "copy": (
        lambda net, x: x + nn.functional.linear(x, net.branch.weight.detach(), net.branch.bias.data),
        "Only a copy without a graph is used",
    ),
}
BRANCH = {"no_gradient": {"branch.weight", "branch.bias"}}


class Faulty(Net):
    """Its branch gets no gradient, for a reason that may change."""

    def __init__(self, fault: str | Callable[[Any], str], **options: Any) -> None:
        super().__init__(**options)
        self.fault = fault
        self.branch = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        compute, _ = FAULTS[self.fault(self) if callable(self.fault) else self.fault]
        return self.head(torch.relu(self.neck(compute(self, self.backbone(x).mean((2, 3)) * self.scale))))


@pytest.mark.parametrize("fault", list(FAULTS)[1:])
@no_gradients_in_checkpoint
def test_parameter_without_gradient_is_found_with_what_cuts_it_off(fault: str) -> None:
    audit = fit(Faulty(fault))
    assert found(audit) == BRANCH
    for finding in audit.report:
        assert FAULTS[fault][1] in finding.cause
        assert "freeze it" in finding.fix
        assert finding.step == 3


def test_cause_names_the_line_of_the_detach() -> None:
    lines = Path(__file__).read_text().splitlines()
    (number,) = [number for number, text in enumerate(lines, 1) if text.startswith('    "detach": (')]
    assert f"test_callback.py:{number}." in cause(fit(Faulty("detach")), "no_gradient")


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_missing_gradient_is_found_after_first_n_steps(steps: int, options: dict[str, Any]) -> None:
    audit = fit(Faulty("detach"), audit=GradientAudit(first_n_steps=steps), **options)
    assert {(finding.kind, finding.step) for finding in audit.report} == {("no_gradient", steps)}


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 1}, {"limit_train_batches": 1}], ids=str)
def test_missing_gradient_is_found_in_a_fit_shorter_than_first_n_steps(options: dict[str, Any]) -> None:
    audit = fit(Faulty("no_grad"), **options)
    assert found(audit) == BRANCH


def test_zero_gradient_left_over_counts_as_none() -> None:
    net = Faulty("unused")
    keep_zeros(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert found(fit(net)) == BRANCH


def test_gradient_set_by_hand_counts() -> None:
    net = Hooked(lambda net: setattr(net.extra, "grad", torch.ones(2)), "on_after_backward")
    net.extra = nn.Parameter(torch.zeros(2))
    assert found(fit(net)) == {}
    assert net.extra.abs().sum() > 0


def test_missing_gradient_in_a_later_phase_is_found() -> None:
    net = Faulty(lambda net: "unused" if net.trainer.fit_loop.total_batch_idx >= 6 else "none")
    phases = [Phase(["*", "!backbone"], steps=6), Phase("*")]
    assert found(fit(net, FreezeSchedule(phases, verbose=False), limit_val_batches=0)) == BRANCH


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_that_comes_no_more_is_missed_however_a_step_clears_it(set_to_none: bool, manual: bool) -> None:
    class Later(Faulty):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad(set_to_none=set_to_none)
            self.manual_backward(loss)
            optimizer.step()
            return None

    net = Later(lambda net: "detach" if net.current_epoch else "none")
    net.automatic_optimization = not manual
    if not set_to_none:
        keep_zeros(net)
    # Before a validation Lightning sets all gradients to None.
    audit = fit(net, audit=GradientAudit(first_n_steps=1), max_epochs=4, limit_val_batches=0)
    assert found(audit) == BRANCH
    assert "test_callback.py" in cause(audit, "no_gradient")
    assert audit.report[0].step == 6 + 10


@compiled
def test_cause_in_a_compiled_module_says_what_cannot_be_seen() -> None:
    net = Faulty("unused")
    net.neck = torch.compile(net.neck, backend="eager")
    audit = fit(net)
    assert found(audit) == BRANCH
    assert "cannot be seen" in audit.report[0].cause


def test_network_of_a_gan_without_gradient_is_found() -> None:
    class Cut(Gan):
        def _turn(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
            super()._turn(optimizer, lambda: loss() if "AdamW" in str(type(optimizer)) else self.critic[0].bias.sum())

    audit = fit(Cut("plain"))
    assert found(audit) == {"no_gradient": parameters(Gan("plain"), "generator")}


class AllCut(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("train", ["*", "head"])
@pytest.mark.parametrize("first", [True, False])
def test_error_of_a_loss_without_graph_is_explained(train: str, first: bool) -> None:
    net, audit, schedule = AllCut(), GradientAudit(), FreezeSchedule([Phase(train)], verbose=False)
    run = trainer(callbacks=[audit, schedule] if first else [schedule, audit])
    with pytest.raises(RuntimeError, match="does not require grad"):
        run.fit(net, loader())
    assert found(audit) == {"no_gradient": parameters(net, train.strip("*"))}
    assert all("no graph is recorded" in finding.cause for finding in audit.report)


def test_error_of_another_kind_adds_no_finding() -> None:
    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    net, audit = Breaks(), GradientAudit()
    with pytest.raises(ZeroDivisionError):
        fit(net, audit=audit)
    assert audit.report == []
    assert "training_step" not in vars(net)


class Ends(Net):
    """Ends by an error in the second step's forward, or in the first one's backward."""

    def __init__(self, error: type[BaseException], where: str) -> None:
        super().__init__(optimizer=sgd)
        self.error, self.where = error, where
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        error = self.error

        def fail(*_: Tensor) -> None:
            raise error("as of DDP, where a parameter was not used")

        if batch_idx == 1 and self.where == "forward":
            fail()
        loss = super().training_step(batch, batch_idx) * self.scale
        if self.where == "backward":
            loss.register_hook(fail)
        return loss


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("phases", [[Phase("head", epochs=1), Phase("*")], [Phase("*")]], ids=["frozen", "all"])
def test_fit_that_ends_by_an_error_has_no_false_finding(
    error: type[BaseException], where: str, phases: list[Phase], first: bool
) -> None:
    """FreezeSchedule gives flags back in ``on_exception``, and the step that the error cuts short proves nothing."""
    schedule, audit = FreezeSchedule(phases, verbose=False), GradientAudit()
    run = trainer(callbacks=[audit, schedule] if first else [schedule, audit])
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        run.fit(Ends(error, where), loader())
    assert audit.report == []
    assert audit.report.checks == (2 if where == "forward" else 1)


def test_gradient_missing_before_an_error_is_reported() -> None:
    class Unused(Ends):
        def __init__(self) -> None:
            super().__init__(ValueError, "forward")
            self.branch = nn.Linear(2, 2)

    audit = GradientAudit()
    schedule = FreezeSchedule([Phase(["head", "branch"])], verbose=False)
    with pytest.raises(ValueError, match="not used"):
        fit(Unused(), schedule, audit=audit)
    assert found(audit) == BRANCH
    assert "in the step that was audited" in audit.report[0].cause


# Optimizers


def test_parameter_in_no_optimizer_is_found() -> None:
    net = Net(optimizer=lambda params: sgd([p for p in params if p.ndim > 1]))
    audit = fit(net)
    assert found(audit) == {"in_no_optimizer": {name for name, p in net.named_parameters() if p.ndim == 1}}
    assert {finding.step for finding in audit.report} == {0}
    assert found(fit(net, FreezeSchedule([Phase("*")], verbose=False))) == {}


def test_parameter_in_two_optimizers_is_found() -> None:
    class Two(Gan):
        def configure_optimizers(self) -> Any:
            return sgd([*self.generator.parameters(), self.critic[0].weight]), adamw(self.critic.parameters())

    audit = fit(Two("plain"))
    assert found(audit) == {"in_two_optimizers": {"critic.0.weight"}}
    assert audit.report[0].cause.startswith("It is in SGD 0, group 0 and in AdamW 1, group 0")


def test_parameter_twice_in_one_optimizer_is_found() -> None:
    def twice(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        optimizer = sgd(params)
        optimizer.param_groups[0]["params"].append(params[-1])
        return optimizer

    assert found(fit(Net(optimizer=twice))) == {"in_two_optimizers": {"head.bias"}}


def test_training_without_an_optimizer_is_no_finding() -> None:
    class ByHand(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for parameter in self.parameters():
                parameter.grad = None
            super().training_step(batch, batch_idx).backward()
            for parameter in self.parameters():
                parameter.data.sub_(0.1 * parameter.grad)

        def configure_optimizers(self) -> None:
            return None

    with pytest.warns(UserWarning, match="will run with no optimizer"):
        audit = fit(ByHand())
    assert found(audit) == {}


# Graphs


LOSSES: list[Tensor] = []


# What is done with a loss, and what of it is found.
KEEPS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "list": (lambda net, loss: net.losses.append(loss), "self.losses[0]"),
    "buffer": (lambda net, loss: setattr(net, "mean", net.mean.detach() + loss), "self.mean"),
    "callback": (lambda net, loss: setattr(net.trainer.callbacks[0], "seen", loss), "Probe.seen"),
    "global": (lambda net, loss: LOSSES.append(loss), "tests.audit.test_callback.LOSSES[0]"),
    "detached": (lambda net, loss: net.losses.append(loss.detach()), ""),
    "cycle": (lambda net, loss: (cycle := [loss]).append(cycle), ""),
    "nothing": (lambda net, loss: None, ""),
}


class Keeps(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.losses: list[Tensor] = []
        self.register_buffer("mean", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        keep, _ = KEEPS[self.how]
        keep(self, loss)
        return loss


@pytest.mark.parametrize("how", KEEPS)
def test_tensor_that_keeps_a_graph_is_found(how: str) -> None:
    audit = fit(Keeps(how), Probe())
    LOSSES.clear()
    expected = KEEPS[how][1]
    assert found(audit) == ({"graph_kept": {expected}} if expected else {})
    assert all(".detach()" in finding.fix for finding in audit.report)


def test_list_of_graphs_emptied_at_the_epoch_end_is_found() -> None:
    class Empties(Keeps):
        def on_train_epoch_end(self) -> None:
            self.losses.clear()

    assert found(fit(Empties("list"))) == {"graph_kept": {"self.losses[0]"}}


def test_kept_graph_is_found_after_one_batch() -> None:
    assert found(fit(Keeps("list"), fast_dev_run=True)) == {"graph_kept": {"self.losses[0]"}}


def test_graph_from_before_the_fit_is_no_finding() -> None:
    """As a notebook has, where a cell has called the model."""
    LOSSES.append(torch.ones(2, requires_grad=True) * 2)
    assert found(fit(Net())) == {}
    LOSSES.clear()


def test_batch_with_a_graph_is_no_finding() -> None:
    class Augments(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * self.gain, batch[1]

    assert found(fit(Augments())) == {}


# Words


def test_finding_is_raised_as_an_error_with_its_report() -> None:
    net, audit = Faulty("unused"), GradientAudit(on_violation="raise")
    with pytest.raises(AuditError, match=r"branch\.weight, branch\.bias: trainable, but it gets no gradient") as caught:
        fit(net, audit=audit)
    assert caught.value.report is audit.report
    assert str(caught.value) == str(audit.report)
    assert len(audit.report) == 2
    assert isinstance(caught.value, MisconfigurationException)
    assert not net._forward_hooks
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())


def test_finding_of_the_start_is_raised_before_the_first_step() -> None:
    net = Net(optimizer=lambda params: sgd(list(params)[:-1]))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(AuditError, match=r"head\.bias: trainable, but in no optimizer"):
        fit(net, audit=GradientAudit(on_violation="raise"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_each_finding_is_logged_once_and_the_end_is_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_freeze"):
        audit = fit(Faulty("unused"), max_epochs=3)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("branch.weight, branch.bias" in message for message in messages) == 1
    assert messages[-1] == audit.report.summary
    assert messages[-1].startswith("audit: 2 findings in ")
    assert messages[-1].endswith(f" over {len(list(Faulty('unused').parameters()))} parameters")
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == [f"audit, step 3: {str(audit.report).split(chr(10), 1)[1]}"]


def test_ignored_parameters_have_no_finding_and_unknown_ones_are_refused() -> None:
    net = Hooked(WRITES["data"], "on_train_batch_end", 1)
    net.neck.requires_grad_(False)
    net.unused = nn.Linear(2, 2)
    assert found(fit(net, audit=GradientAudit(ignore=["neck", "unused"]))) == {}
    with pytest.raises(ValueError, match=r'GradientAudit\(ignore="necks"\) matches no parameter. Did you mean "neck"'):
        fit(net, audit=GradientAudit(ignore="necks"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_violation": "rise"}, ValueError, r"on_violation='rise'.*Did you mean 'raise'"),
        ({"every_n_epochs": 0}, ValueError, r"every_n_epochs=0\): every_n_epochs is at least 1"),
        ({"first_n_steps": 0}, ValueError, r"first_n_steps=0\): first_n_steps is at least 1"),
        ({"first_n_steps": 1.5}, TypeError, r"first_n_steps=1.5\): first_n_steps is a whole number"),
        ({"every_n_epochs": True}, TypeError, r"every_n_epochs=True"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientAudit(**options)


def test_strategy_that_shards_is_refused() -> None:
    run = trainer()
    run.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match="does not work with FSDPStrategy"):
        GradientAudit().on_fit_start(run, Net())


def test_no_hook_stays_behind() -> None:
    net = Faulty("unused")
    run = trainer(callbacks=[GradientAudit()], max_epochs=1)
    run.fit(net, loader())
    assert "training_step" not in vars(net)
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in net.parameters())


def test_validation_and_test_are_not_audited() -> None:
    audit = GradientAudit(on_violation="raise")
    run = trainer(callbacks=[audit])
    run.validate(Faulty("unused"), loader(8), verbose=False)
    assert audit.report.checks == 0


def test_batch_that_is_not_audited_looks_at_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    original = nn.Module.named_parameters
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *args, **kw: looks.append(1) or original(*args, **kw))
    counts: list[int] = []
    probe = Probe(start=lambda *_: counts.append(len(looks)), end=lambda *_: counts.append(len(looks)))
    fit(Net(), probe, audit=GradientAudit(first_n_steps=2), max_epochs=1)
    assert len(set(counts[:5])) > 1
    assert len(set(counts[5:])) == 1
