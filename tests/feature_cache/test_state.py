from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from lightning_freeze.feature_cache.hashing import DeviceHash, Hash
from lightning_freeze.feature_cache.state import State, why_not_reusable


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
        (lambda: nn.TransformerEncoderLayer(6, 2, 4), r"net.self_attn \(MultiheadAttention, dropout=0.1\)"),
        (lambda: nn.RReLU(), r"\(RReLU, upper="),
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


def test_a_norm_without_statistics_depends_on_the_batch() -> None:
    assert "depends on the batch" in str(why_not_reusable("net", frozen(nn.BatchNorm1d(3, track_running_stats=False))))


def test_dropout_of_nothing_may_be_in_train_mode() -> None:
    assert why_not_reusable("net", nn.Sequential(nn.Dropout(0.0)).train()) is None


def state_of(net: nn.Module) -> State:
    return State("net", net, Hash()).read()


def test_what_counts_is_in_the_key() -> None:
    net = frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()))
    state = state_of(net)
    keys = [state.key]
    net[0].training = True  # it does not read it, but whoever calls it can
    keys.append(state.read().key)
    net[1].weight.requires_grad_(True)
    assert state.read().why == "net.1.weight trains"
    net[1].weight.requires_grad_(False)
    net[1].bias = nn.Parameter(net[1].bias.detach() + 1, requires_grad=False)
    keys.append(state.read().key)
    net[1].running_mean += 1
    keys.append(state.read().key)
    net[0].weight.data.mul_(2)
    state.recheck()
    keys.append(state.read().key)
    net.append(nn.ReLU())
    keys.append(state.read().key)
    assert len(set(keys)) == 6


@pytest.mark.parametrize("where", ["module", "class"])
def test_an_attribute_that_comes_late_is_in_the_key(where: str) -> None:
    class Own(nn.Module):
        pass

    net = Own()
    state, target = state_of(net), net if where == "module" else Own
    key = state.key
    target.late = 2  # type: ignore[union-attr]
    assert state.read().key != key
    del target.late  # type: ignore[union-attr]
    assert state.read().key == key


def test_another_view_of_the_same_memory_is_another_key() -> None:
    net, numbers = nn.Module(), torch.randn(4)
    net.register_buffer("some", numbers[:2])
    state = state_of(net)
    key = state.key
    net.some = numbers[:3]
    assert state.read().key != key


def test_where_weights_lie_is_in_the_key_and_what_is_written_back_is_no_change() -> None:
    net = frozen(nn.Conv2d(3, 4, 2))
    state = state_of(net)
    key = state.key
    net.load_state_dict(net.state_dict())
    assert state.read().key == key
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert state.read().key != key
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    assert state.read().key == key
    net.double()
    assert state.read().key != key


def test_a_forward_that_is_made_anew_whenever_it_is_read_is_no_change() -> None:
    class Module(nn.Module):
        def run(self, x: Tensor, scale: int) -> Tensor:
            return x * scale

        forward = functools.partialmethod(run, scale=2)  # type: ignore[assignment]

    state = state_of(nn.Sequential(Module()))
    assert state.read().key == state.key


class Marked(Tensor):
    """Is more than its bytes, as what torchao makes of weights is."""


def test_weights_that_are_more_than_their_bytes_are_left_alone() -> None:
    net = frozen(nn.Sequential(nn.Linear(2, 2)))
    net[0].weight = nn.Parameter(torch.ones(2, 2).as_subclass(Marked), requires_grad=False)
    assert state_of(net).why == "net.0.weight is a Marked, which is more than its bytes"
    net[0].weight = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    assert "sparse" in str(state_of(net).why)
    with torch.inference_mode():
        made = nn.Linear(2, 2)
    assert "inference mode" in str(state_of(frozen(made)).why)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_weights_that_an_observer_has_packed_are_left_alone() -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch quantizes nothing")
    net = torch.ao.nn.quantized.Linear(2, 2)
    assert "cannot be looked into" in str(state_of(nn.Sequential(net)).why)


@pytest.mark.parametrize("hashing", [Hash(), DeviceHash()], ids=lambda one: type(one).__name__)
def test_keys_are_those_of_the_content(hashing: Hash) -> None:
    torch.manual_seed(0)
    one, other = frozen(nn.Linear(3, 4)), frozen(nn.Linear(3, 4))

    def keys_differ() -> bool:
        first, second = (State("net", net, hashing).read() for net in (one, other))
        return first.key != second.key

    assert keys_differ()
    other.load_state_dict(one.state_dict())
    assert not keys_differ()
    other.bias[2] = torch.nextafter(other.bias[2], torch.tensor(9.0))  # type: ignore[index,operator]
    assert keys_differ()


def test_settings_are_in_the_key() -> None:
    nets = (nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Dropout(0.1), nn.Dropout(0.2))
    assert len({state_of(net.eval()).key for net in nets}) == 5
