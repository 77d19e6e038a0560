from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, fx, nn

from lightning_freeze.feature_cache.state import Conditions, Weights, structure_text, why_not_reusable


def frozen(net: nn.Module, training: bool = False) -> nn.Module:
    return net.requires_grad_(False).train(training)


@pytest.mark.parametrize(
    ("make", "in_train"),
    [
        (lambda: torchvision.models.resnet18(), r"net.bn1 \(BatchNorm2d\) is in train mode"),
        (lambda: torchvision.models.squeezenet1_1(), r"net.classifier.0 \(Dropout, p=0.5\)"),
        (lambda: nn.Sequential(torchvision.ops.StochasticDepth(0.2, "row")), r"\(StochasticDepth, p="),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.2), r"\(DropPath, drop_prob="),
        (lambda: EfficientNet.from_name("efficientnet-lite0"), r"BatchNorm2d\) is in train mode"),
        (lambda: nn.LSTM(3, 4, 2, dropout=0.3), r"net \(LSTM, dropout=0.3\)"),
        (lambda: nn.InstanceNorm2d(3, track_running_stats=True), r"running statistics move"),
    ],
)
def test_real_networks_in_train_mode_say_which_layer_forbids_it(make: Any, in_train: str) -> None:
    net = frozen(make())
    assert why_not_reusable("net", net) is None
    with pytest.raises(AssertionError, match=in_train):
        raise AssertionError(why_not_reusable("net", net.train()))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(3), lambda: nn.GroupNorm(1, 3), lambda: nn.InstanceNorm2d(3)])
def test_norms_of_one_sample_may_be_in_train_mode(make: Any) -> None:
    assert why_not_reusable("net", frozen(make(), training=True)) is None


def test_dropout_of_nothing_may_be_in_train_mode() -> None:
    assert why_not_reusable("net", nn.Sequential(nn.Dropout(0.0)).train()) is None


def test_conditions_see_what_counts() -> None:
    net = frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()))
    conditions = Conditions([net])
    modes = conditions.modes()
    net[0].training = True  # it does not read it, but whoever calls it can
    assert conditions.modes() != modes
    assert conditions.trains() == (False,)
    net[1].weight.requires_grad_(True)
    assert conditions.trains() == (True,)
    assert conditions.hold()
    net[1].bias = nn.Parameter(net[1].bias.detach().clone())
    assert not conditions.hold()


@pytest.mark.parametrize("where", ["class", "module", "below"])
def test_conditions_see_another_function(where: str) -> None:
    class Module(nn.Sequential):
        pass

    net: Any = Module(nn.Linear(2, 2))
    conditions = Conditions([net])
    target = {"class": Module, "module": net, "below": net[0]}[where]
    target.forward = lambda *args: args[-1]
    assert conditions.hold() == (where == "below")
    assert conditions.rewritten() == (where == "below")


def test_a_forward_that_is_made_anew_whenever_it_is_read_is_no_change() -> None:
    class Module(nn.Module):
        def run(self, x: Tensor, scale: int) -> Tensor:
            return x * scale

        forward = functools.partialmethod(run, scale=2)  # type: ignore[assignment]

    conditions = Conditions([Module(), nn.Sequential(Module())])
    assert conditions.hold()
    assert not conditions.rewritten()


def test_conditions_tell_programs_of_fx_apart_by_their_code() -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    conditions = Conditions([nn.Sequential(net)])
    modes, program = conditions.modes(), conditions.program()
    net.recompile()
    assert conditions.hold()
    assert not conditions.rewritten()
    assert (conditions.modes(), conditions.program()) == (modes, program)
    (*_, relu, output) = net.graph.nodes
    output.args = (relu.args[0],)
    net.recompile()
    assert conditions.modes() != modes
    assert conditions.program() != program
    assert Conditions([nn.Linear(2, 2)]).program() == ""


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_cannot_be_looked_into() -> None:
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), nn.ReLU())
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert why_not_reusable("net", net) == "net.0 is TorchScript, whose code cannot be looked into"
    assert Conditions([net]).hold()


def test_hooks_that_are_compiled_with_a_module_matter() -> None:
    net = frozen(nn.Linear(2, 2))
    net.register_forward_hook(lambda *_: None)
    assert why_not_reusable("net", net) is None
    net.compile(backend="eager")
    assert why_not_reusable("net", net) == "net has forward hooks, which would not be called"


def test_fingerprints_are_those_of_the_content() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(3, 4), nn.Linear(3, 4)
    assert Weights([one]).fingerprint() != Weights([other]).fingerprint()
    other.load_state_dict(one.state_dict())
    assert Weights([one]).fingerprint() == Weights([other]).fingerprint()
    with torch.no_grad():
        other.bias[2] = torch.nextafter(other.bias[2], torch.tensor(9.0))
    assert Weights([one]).fingerprint() != Weights([other]).fingerprint()


def test_structure_tells_settings_apart() -> None:
    texts = {structure_text([net]) for net in (nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Dropout(0.1), nn.Dropout(0.2))}
    assert len(texts) == 5
