"""Laws 1 to 4 for every optimizer in torch."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lightning_freeze import FreezeSchedule, Phase
from tests.nets import WarmUp, loader, same, sgd, trainer
from tests.phased import Phased

OPTIMIZERS = sorted(
    name
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name, None), type) and name not in ("Optimizer", "LBFGS", "SparseAdam")
)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(4, 3, generator=generator)).square().sum().backward()
    optimizer.step()


def only(net: nn.Module, phased: Phased, *layers: int) -> None:
    phased.train(net, [p for index in layers for p in net[index].parameters()])  # type: ignore[index]


def build(name: str, policy: Any = "keep") -> tuple[nn.Module, torch.optim.Optimizer, Phased]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-2, **options)
    return net, optimizer, Phased(optimizer, optimizer_state=policy)


def test_there_are_as_many_as_expected() -> None:
    assert len(OPTIMIZERS) >= 12
    assert {"AdamW", "SGD", "Adagrad", "Adafactor", "Rprop"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_freeze_unfreeze_freeze(name: str) -> None:
    net, optimizer, phased = build(name)
    step(net, optimizer, 0)
    for seed, layers in enumerate([(0, 2), (2,), (0,), (0, 2)], 1):
        only(net, phased, *layers)
        before = [p.detach().clone() for p in net.parameters()]
        step(net, optimizer, seed)
        for index, (p, old) in enumerate(zip(net.parameters(), before, strict=True)):
            assert torch.equal(p, old) == (2 * index not in layers)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_while_frozen_and_resumed(name: str) -> None:
    """A state saved in any phase is the whole one, loads without us, and goes on to the bit."""
    net, optimizer, phased = build(name)
    step(net, optimizer, 0)
    only(net, phased, 2)
    step(net, optimizer, 1)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    assert [len(group["params"]) for group in saved["param_groups"]] == [2]
    assert saved["state"].keys() == {0, 1}
    other, resumed, others = build(name)
    only(other, others, 2)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    plain, bare, nothing = build(name)
    nothing.release()
    plain.load_state_dict(weights)
    bare.load_state_dict(saved)
    for seed, layers in ((2, (2,)), (3, (0, 2)), (4, (0,))):
        for module, groups, held in ((net, phased, optimizer), (other, others, resumed)):
            only(module, groups, *layers)
            step(module, held, seed)
        assert same(net.state_dict(), other.state_dict())
        assert same(optimizer.state_dict(), resumed.state_dict())
    step(plain, bare, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dropped_state_starts_anew(name: str) -> None:
    net, optimizer, phased = build(name, "drop")
    step(net, optimizer, 0)
    only(net, phased, 2)
    frozen, _ = net.parameters()
    assert frozen not in optimizer.state
    step(net, optimizer, 1)
    only(net, phased, 0, 2)
    step(net, optimizer, 2)
    assert frozen in optimizer.state


class CountsSteps(torch.optim.SGD):
    """Its constructor makes the state, and its step makes none, as Adagrad's in torch 2.6."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] |= {"count": 0, "sum": torch.full_like(p, group["weight_decay"])}

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p]["count"] += 1
                self.state[p]["sum"] += 1
        return super().step(closure)


def test_state_of_a_constructor_comes_anew_with_the_options_of_its_group() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    groups = [{"params": [net[0].weight], "weight_decay": 0.5}, {"params": [net[1].weight]}]
    optimizer = CountsSteps(groups, lr=0.01)
    phased = Phased(optimizer, optimizer_state="drop")
    for seed, layers in enumerate([(0, 1), (1,), (0, 1)]):
        only(net, phased, *layers)
        step(net, optimizer, seed)
    (first, second) = (optimizer.state[layer.weight] for layer in net)
    assert (first["count"], second["count"]) == (1, 3)
    assert same([first["sum"], second["sum"]], [torch.full((4, 3), 1.5), torch.full((2, 4), 3.0)])


class Around(torch.optim.Optimizer):
    """Wraps another one as timm's Lookahead does: it saves in its own way, and its step may call no hooks."""

    def __init__(self, base: torch.optim.Optimizer, nested: bool = False) -> None:
        self.base, self.nested = base, nested
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.defaults, self.state, self.param_groups = base.defaults, base.state, base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict()} if self.nested else self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict["base"] if self.nested else state_dict)
        self.state, self.param_groups = self.base.state, self.base.param_groups


@pytest.mark.parametrize("nested", [False, True])
def test_an_optimizer_that_saves_in_its_own_way(tmp_path: Path, nested: bool) -> None:
    """Its checkpoints are whole, resume with and without us, and rates written before a step are scaled in it."""

    def fit(schedule: Any, epochs: int, resume: Path | None = None, saver: Any = None) -> list[list[float]]:
        unhooked = type("Around", (Around,), {})  # torch hooks a class's step late, and then for good
        stepped: list[list[float]] = []

        def make(params: Any) -> torch.optim.Optimizer:
            base = sgd(params)
            base.register_step_post_hook(lambda *_: stepped.append([group["lr"] for group in base.param_groups]))
            return unhooked(base, nested)

        net = WarmUp(make, lambda o: StepLR(o, 9))
        callbacks = [callback for callback in (schedule, saver) if callback is not None]
        run = trainer(tmp_path, callbacks=callbacks, max_epochs=epochs, enable_checkpointing=saver is not None)
        run.fit(net, loader(), ckpt_path=resume, weights_only=True)
        assert not {"state_dict", "load_state_dict"} & set(vars(run.optimizers[0]))
        assert all(len(rates) == 1 for rates in net.rates)
        return stepped

    def schedule() -> FreezeSchedule:
        return FreezeSchedule([Phase("head", epochs=2), Phase("*", lr_scale={"neck": 0.1})])

    fit(schedule(), 1, saver=ModelCheckpoint(tmp_path, "first"))
    state = torch.load(tmp_path / "first.ckpt")["optimizer_states"][0]
    (group,) = (state["base"] if nested else state)["param_groups"]
    assert len(group["params"]) == 12
    rates = fit(schedule(), 3, tmp_path / "first.ckpt")
    assert rates == [[0.01 * n, 0.01 * n * (0.1 if n > 12 else 1.0)] for n in range(7, 19)]
    fit(None, 2, tmp_path / "first.ckpt")


def test_sparse_adam() -> None:
    net = nn.ModuleList([nn.Embedding(5, 2, sparse=True) for _ in range(2)])
    optimizer = torch.optim.SparseAdam(net.parameters(), lr=0.1)
    phased = Phased(optimizer)
    for index in (0, 1, 0):
        phased.train(net, [net[index].weight])
        before = [layer.weight.detach().clone() for layer in net]
        net[index](torch.tensor([1, 3])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [torch.equal(layer.weight, old) for layer, old in zip(net, before, strict=True)] == [
            index == 1,
            index == 0,
        ]


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS flattens its parameters"):
        Phased(torch.optim.LBFGS(nn.Linear(2, 1).parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves state between a GPU and the CPU")
def test_offloaded_state_returns() -> None:
    net, optimizer, phased = build("AdamW", "offload")
    phased.release()
    net.cuda()
    optimizer = torch.optim.AdamW(net.parameters())
    phased = Phased(optimizer, optimizer_state="offload")
    generator_input = torch.ones(4, 3, device="cuda")
    net(generator_input).sum().backward()
    optimizer.step()
    frozen, _ = net.parameters()
    only(net, phased, 2)
    assert all(value.device.type == "cpu" for value in optimizer.state[frozen].values())
    only(net, phased, 0, 2)
    assert optimizer.state[frozen]["exp_avg"].device.type == "cuda"
