"""Laws 7 and 8 while a fit goes on: what people do to a module under a FeatureCache works as it does without one.

They export, script, compile, copy and save it in hooks; they give it graphs that torch.fx made, which change with the
mode, or TorchScript; and they put several caches before it.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_freeze import FeatureCache, FreezeSchedule, Phase
from lightning_freeze.feature_cache.arguments import sequential_links
from tests.laws.test_law8_feature_cache_of_odd_modules import WIDE, Net, Plain, block, check, data
from tests.nets import trainer

KEYS = ("forward", "_compiled_call_impl", "_call_impl")


def own(net: nn.Module) -> dict[str, set[str]]:
    """The attributes of a module's own that say what runs when it is called, for each module that has any."""
    found = {name: {key for key in KEYS if key in vars(module)} for name, module in net.named_modules()}
    return {name: keys for name, keys in found.items() if keys}


# Functions that move


class Stages(nn.Module):
    """Has a node that only the graph of evaluation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = block(), block(WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


def extractor() -> nn.Module:
    nodes: dict[str, Any] = {"train_return_nodes": {"two": "out"}, "eval_return_nodes": {"one": "out"}}
    return create_feature_extractor(Stages(), **nodes)


class Extracts(Net):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x)["out"]  # type: ignore[call-overload,no-any-return]


def test_a_feature_extractor_whose_graph_changes_with_the_mode() -> None:
    stats = check(lambda: Extracts(extractor())).stats
    assert stats.active
    assert stats.hits > 24 * 2 + 16 * 2  # both graphs are remembered


def test_a_traced_module_that_is_edited_in_mid_fit() -> None:
    class Edits(Net):
        def on_train_epoch_start(self) -> None:
            graph = self.backbone.graph
            if self.current_epoch == 4:
                (linear,) = (node for node in graph.nodes if node.target == "inner.2")  # type: ignore[union-attr]
                with graph.inserting_after(linear):  # type: ignore[operator,union-attr]
                    doubled = graph.call_function(torch.mul, (linear, 2))  # type: ignore[operator,union-attr]
                linear.replace_all_uses_with(doubled, delete_user_cb=lambda node: node is not doubled)
            self.backbone.recompile()  # type: ignore[operator]

    assert check(lambda: Edits(fx.symbolic_trace(Plain()))).stats.hits > 24


@pytest.mark.parametrize("where", ["class", "module", "below"])
def test_a_forward_that_is_replaced_in_mid_fit(where: str) -> None:
    def make() -> Net:
        class Replaced(Plain):
            pass

        class Replaces(Net):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 4:
                    target: Any = {"class": Replaced, "module": self.backbone, "below": self.backbone.inner}[where]
                    plain = target.forward
                    target.forward = lambda *args: plain(*args) * 2

        return Replaces(Replaced())

    assert check(make).stats.hits > 24


# TorchScript


class Holds(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))  # type: ignore[no-any-return]


SCRIPTED: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(block()),
    "traced": lambda: torch.jit.trace(block(), torch.zeros(2, 6)),
    "one that holds a scripted one": lambda: Holds(torch.jit.script(block())),
    "a chain that begins with a scripted one": lambda: nn.Sequential(torch.jit.script(block()), nn.ReLU()),
    "a chain with a scripted one": lambda: nn.Sequential(block(), torch.jit.script(block(WIDE))),
}


def net_with(backbone: nn.Module) -> Net:
    """A net with a module that is already frozen; TorchScript has no ``requires_grad_``."""
    net = Net(nn.Identity())
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    net.backbone = backbone
    return net


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", SCRIPTED)
def test_torchscript_is_left_alone_with_a_sentence(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning_freeze")
    stats = check(lambda: net_with(SCRIPTED[name]())).stats
    assert "is TorchScript" in str(stats.why)
    (said,) = [record.message for record in caplog.records if record.message.startswith("FeatureCache")]
    if name == "a chain with a scripted one":
        assert stats.covers == ("backbone.0.0", "backbone.0.1", "backbone.0.2")
        assert stats.hits > 24
        assert said == f"FeatureCache: backbone: cached up to backbone.0.2, because {stats.why}."
    else:
        assert not stats.active
        assert said == f"FeatureCache: backbone: off, because {stats.why}."


# Tools in mid-fit


def saved(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def compiled(module: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="eager")


X = data().tensors[0][:8]
TOOLS: dict[str, Callable[[Any], Any]] = {
    "export": lambda module: torch.export.export(module, (X,)).module(),
    "strict export": lambda module: torch.export.export(module, (X,), strict=True).module(),
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, X),
    "symbolic trace": fx.symbolic_trace,
    "compile": compiled,
    "save": saved,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


class Typed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "plain": Typed,
    "sequential": block,
    "fx": lambda: fx.symbolic_trace(block()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The TorchScript type", "ignore:.*in eval mode at the start")
@pytest.mark.parametrize("within", [False, True], ids=["alone", "within another"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_work_in_mid_fit(tool: str, backbone: str, within: bool) -> None:
    made: list[Any] = []

    class Uses(Net):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 3:
                module = nn.Sequential(self.backbone, nn.Tanh()) if within else self.backbone
                expected = module(X)
                made.append(TOOLS[tool](module))
                assert torch.equal(made[0](X), expected)

    net, cache = Uses(BACKBONES[backbone]()), FeatureCache("backbone")
    trainer(callbacks=[cache], max_epochs=5).fit(net, DataLoader(data(), 8, shuffle=True))
    assert cache.stats.hits > 24
    assert own(net) == {}
    if tool in ("save", "pickle", "deepcopy"):
        assert not any("forward" in keys or "_call_impl" in keys for keys in own(made[0]).values())
        assert not any(vars(module).get("_compiled_call_impl") for module in made[0].modules())
        copied = made[0][0] if within else made[0]
        assert len(sequential_links("net", copied)) == len(sequential_links("net", net.backbone))
        copied.forward = lambda x: x
        assert torch.equal(copied(X), X)


# Compiled


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize("how", ["model", "method", "outer", "fullgraph", "in place"])
def test_a_module_in_something_compiled(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Compiled with what is around it, it is never called, and a sentence says so; compiled itself it is cached."""

    class Steps(Net):
        def __init__(self) -> None:
            super().__init__(Typed())
            if how == "method":
                self.features = torch.compile(self.features, backend="eager")  # type: ignore[method-assign]
            elif how == "outer":
                self.outer = torch.compile(nn.Sequential(self.backbone, nn.Identity()), backend="eager")
                self.features = self.outer.__call__  # type: ignore[method-assign]
            elif how == "in place":
                self.backbone.compile(backend="eager")

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.features(batch[0])), batch[1])

    caplog.set_level("INFO", "lightning_freeze")
    results = []
    for caches in ([], [FeatureCache("backbone")]):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net: Any = Steps()
        before = own(net.backbone)
        compiles = how in ("model", "fullgraph")
        fitted = torch.compile(net, backend="eager", fullgraph=how == "fullgraph") if compiles else net
        trainer(callbacks=list(caches), max_epochs=5).fit(fitted, DataLoader(data(), 8, shuffle=True))
        results.append(net.head[1].weight)
        assert own(net.backbone) == before
    assert torch.equal(*results)
    assert (caches[0].stats.hits > 24) == (how == "in place")
    assert ("never called" in caplog.text) == (how != "in place")


# Several caches


class Two(nn.Module):
    """Two parts that are no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = block(), nn.Sequential(block(WIDE), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) * 2)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize(
    ("modules", "twice"),
    [
        (["backbone", "backbone"], "backbone"),
        (["backbone.two", "backbone.two.1"], "backbone.two.1"),
        (["backbone.two.0.0", "backbone.two"], "backbone.two.0.0"),
        ([["backbone.one", "backbone.two"], "backbone.one"], "backbone.one"),
    ],
)
def test_two_caches_of_one_module_are_refused(modules: list[Any], twice: str) -> None:
    net = Net(Two())
    caches = [FeatureCache(module) for module in modules]
    with pytest.raises(ValueError, match="Leave one of them out") as error:
        trainer(callbacks=list(caches)).fit(net, DataLoader(data(), 8))
    for module in modules:
        assert f"FeatureCache(module={module!r})" in str(error.value)
    assert f"remember what {twice} gives" in str(error.value)
    assert own(net) == {}
    trainer(callbacks=caches[:1], max_epochs=3).fit(net, DataLoader(data(), 8))
    assert caches[0].stats.hits > 0
    assert own(net) == {}


@pytest.mark.parametrize("inner", ["backbone.one", ["backbone.two.0.0", "backbone.two.0.1"], "backbone.two"])
@pytest.mark.parametrize("first", [False, True])
def test_a_cache_within_another(inner: Any, first: bool) -> None:
    caches: list[FeatureCache] = []

    def callbacks() -> list[Any]:
        caches[:] = [FeatureCache(inner)]
        return [*caches, FreezeSchedule([Phase("head", epochs=4), Phase(["head", "backbone.two.0.2"])])]

    outer = check(lambda: Net(Two()), callbacks=callbacks, first=first, max_epochs=9)
    assert outer.stats.hits > 24
    assert caches[0].stats.hits > 24 or inner == "backbone.two"
