from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import nn

from lightning_freeze import Phase, layers_of, layerwise_lr_decay
from lightning_freeze.schedule.meaning import resolve_phases
from tests.nets import Net
from tests.trees import trees

# What is most of a model beside its blocks: a classifier on large features, the heads of a detector.
MOSTLY_HEADS = {"deeplabv3_mobilenet_v3_large"}
MOSTLY_HEADS |= {"fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "raft_small"}
MOSTLY_HEADS |= {f"{quantized}shufflenet_v2_x0_5" for quantized in ("", "quantized_")}
SAMPLE = {"resnet18", "vit_b_16", "convnext_tiny", "swin_t", "efficientnet_b0", "densenet121", "googlenet", "vgg11_bn"}
SAMPLE |= {"inception_v3", "maskrcnn_resnet50_fpn", "mobilenet_v3_small", "regnet_y_400mf", "s3d", "ssd300_vgg16"}
SAMPLE |= {"alexnet", "squeezenet1_0", "mnasnet0_5", "mvit_v2_s", "deeplabv3_resnet50", "raft_small"}


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Build modules without the time and the memory that initial values take."""
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield


def build(make: Any) -> nn.Module:
    with without_values():
        try:
            with torch.device("meta"):
                return make()
        except (RuntimeError, NotImplementedError):  # builders that compute with tensors
            return make()


def from_torchvision(name: str) -> nn.Module:
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if any(part in name for part in ("rcnn", "retina", "ssd", "fcos", "deeplab", "fcn_", "lraspp")):
        options["weights_backbone"] = None
    return build(lambda: torchvision.models.get_model(name, weights=None, **options))


def check(module: nn.Module, layers: list[str]) -> tuple[float, float]:
    """Check names and order; return the share of parameters in layers, and the one that is left out between them."""
    order = list(module.named_parameters())
    places: list[int] = []
    for layer in layers:
        own = set(module.get_submodule(layer).parameters())
        mine = [place for place, (_, parameter) in enumerate(order) if parameter in own]
        assert not places or mine[0] > places[-1], "in order, and none inside of another"
        places += mine
    sizes = [parameter.numel() for _, parameter in order]
    inside = sum(sizes[place] for place in places)
    return inside / sum(sizes), (sum(sizes[places[0] : places[-1] + 1]) - inside) / sum(sizes)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in torchvision.models.list_models()],
)
def test_layers_of_every_torchvision_model_are_in_order_and_leave_out_little(name: str) -> None:
    module = from_torchvision(name)
    layers = layers_of(module)
    share, left_out = check(module, layers)
    assert len(layers) > 4
    assert left_out < 0.05 or "googlenet" in name  # its auxiliary classifiers come before its end
    assert share > 0.3 or name in MOSTLY_HEADS


FAMILIES = [
    *("vit_base_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "mixer_b16_224", "hiera_tiny_224"),
    *("convnext_tiny", "convnextv2_atto", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "mvitv2_tiny"),
    *("resnet50", "resnetv2_50", "regnety_016", "densenet121", "nfnet_f0", "efficientnet_b0", "mobilenetv3_large_100"),
    *("maxvit_tiny_rw_224", "coatnet_0_rw_224", "pvt_v2_b1", "poolformer_s12", "levit_256", "xcit_small_12_p8_224"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_timm_models_are_in_order_and_leave_out_little(name: str) -> None:
    timm = pytest.importorskip("timm")
    module = build(lambda: timm.create_model(name))
    share, left_out = check(module, layers_of(module))
    assert left_out < 0.05
    assert share > 0.5


def numbered(prefix: str, count: int, start: int = 0) -> list[str]:
    return [f"{prefix}{number}" for number in range(start, start + count)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]),
        ("vit_b_16", numbered("encoder.layers.encoder_layer_", 12)),
        (
            "swin_t",
            [
                *(*numbered("features.1.", 2), "features.2", *numbered("features.3.", 2), "features.4"),
                *(*numbered("features.5.", 6), "features.6", *numbered("features.7.", 2)),
            ],
        ),
        (
            "efficientnet_b0",
            [f"features.{stage}.{n}" for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for n in range(count)],
        ),
    ],
)
def test_layers_of_torchvision_models_by_name(name: str, expected: list[str]) -> None:
    assert layers_of(from_torchvision(name)) == expected


def from_transformers(model: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes = {
        "GPT2Config": {"n_layer": 2, "n_embd": 16, "n_head": 2},
        "T5Config": {"d_model": 16, "d_ff": 32, "d_kv": 8},
    }
    return build(
        lambda: getattr(transformers, model)(getattr(transformers, config)(**{**sizes.get(config, small), **options}))
    )


@pytest.mark.parametrize(
    ("model", "config", "options", "expected"),
    [
        ("BertForSequenceClassification", "BertConfig", {}, numbered("bert.encoder.layer.", 2)),
        ("BertModel", "BertConfig", {"num_hidden_layers": 1}, ["encoder.layer.0"]),
        ("GPT2LMHeadModel", "GPT2Config", {}, numbered("transformer.h.", 2)),
        ("LlamaForCausalLM", "LlamaConfig", {"vocab_size": 9}, numbered("model.layers.", 2)),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {"num_layers": 2},
            numbered("encoder.block.", 2) + numbered("decoder.block.", 2),
        ),
        ("T5Model", "T5Config", {"num_layers": 1}, ["encoder.block.0", "decoder.block.0"]),
    ],
)
def test_layers_of_transformers_models(model: str, config: str, options: dict[str, Any], expected: list[str]) -> None:
    assert layers_of(from_transformers(model, config, **options)) == expected


def test_layers_of_a_transformers_vit_are_its_blocks() -> None:
    layers = layers_of(from_transformers("ViTForImageClassification", "ViTConfig", num_hidden_layers=3))
    assert [name.rpartition(".")[2] for name in layers] == ["0", "1", "2"]


def parts(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))


class Ff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8)


class MixtureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate, self.experts = Attention(), nn.Linear(8, 6), nn.ModuleList(Ff() for _ in range(6))


class Stage(nn.Module):
    """As timm's: the module between two stages is in the second one."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.downsample = parts(norm=nn.LayerNorm(width // 2), reduce=nn.Linear(width // 2, width))
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)


def conv_block(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU())


class Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(1, 4)
        self.block1, self.block2, self.block3 = Residual(4), Residual(8), Residual(16)
        self.head = nn.Linear(16, 1)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)
        self.fc = nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (parts(model=nn.ModuleList(MixtureBlock() for _ in range(2))), numbered("model.", 2)),
        (
            parts(stem=nn.Linear(1, 2), stages=nn.Sequential(Stage(4, 2), Stage(8, 1), Stage(16, 3))),
            [
                *("stages.0.blocks.0", "stages.0.blocks.1", "stages.1.downsample", "stages.1.blocks.0"),
                *("stages.2.downsample", *numbered("stages.2.blocks.", 3)),
            ],
        ),
        (parts(body=nn.Sequential(conv_block(1), conv_block(2)), head=nn.Linear(4, 1)), ["body.0", "body.1"]),
        (Attributes(), ["block1", "block2", "block3"]),
        (Two(), ["conv1", "conv2", "fc"]),
        (parts(embed=nn.Embedding(5, 4), lstm=nn.LSTM(4, 4, 2), head=nn.Linear(4, 2)), ["embed", "lstm", "head"]),
        (
            parts(encoder=nn.Embedding(5, 4), rnns=nn.ModuleList([nn.LSTM(4, 6), nn.LSTM(6, 6), nn.LSTM(6, 4)])),
            ["encoder", *numbered("rnns.", 3)],
        ),
        (nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), ["0", "2"]),
        (Net(), ["backbone.0", "backbone.4", "neck", "head"]),
        (
            nn.Transformer(8, 2, 2, 3, 16, batch_first=True),
            numbered("encoder.layers.", 2) + numbered("decoder.layers.", 3),
        ),
        (nn.LazyLinear(2), None),
        (nn.LayerNorm(2), None),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_layers_of_other_structures(module: nn.Module, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"layers_of\(select='\*'\) finds no layer with a weight matrix"):
            layers_of(module)
    else:
        assert layers_of(module) == expected
        assert layers_of(torch.compile(parts(net=module), backend="eager")) == [f"net.{name}" for name in expected]


def test_compiled_blocks_are_like_the_others() -> None:
    blocks = nn.ModuleList(Residual(4) for _ in range(3))
    net = parts(stem=nn.Linear(1, 4), blocks=blocks)
    blocks[0], blocks[2] = (torch.compile(blocks[place], backend="eager") for place in (0, 2))
    assert layers_of(net) == numbered("blocks.", 3)
    net["blocks"] = torch.compile(blocks, backend="eager")
    assert layers_of(net) == numbered("blocks.", 3)


def test_layers_are_those_of_what_is_selected() -> None:
    net = parts(
        model=nn.Transformer(8, 2, 2, 2, 16, batch_first=True), other=nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    )
    assert layers_of(net, "model.decoder") == numbered("model.decoder.layers.", 2)
    assert layers_of(net, ["model", "!model.encoder"]) == numbered("model.decoder.layers.", 2)
    assert layers_of(net, "model.encoder.layers") == numbered("model.encoder.layers.", 2)
    assert layers_of(net, "other") == ["other.0", "other.1"]
    with pytest.raises(ValueError, match=r'"decoder" matches no parameter\. Did you mean "model\.decoder"'):
        layers_of(net, "decoder")


@settings(max_examples=100, deadline=None)
@given(trees())
def test_layers_of_random_trees_are_in_order_and_apart(module: nn.Module) -> None:
    try:
        layers = layers_of(module)
    except ValueError:
        assert all(parameter.ndim < 2 for parameter in module.parameters())
        return
    names = [name for name, _ in module.named_parameters()]  # a tied one under its first name
    places = [[place for place, name in enumerate(names) if name.startswith(f"{layer}.")] for layer in layers]
    assert all(places)
    assert places == sorted(places)
    assert not [one for one in layers for other in layers if one.startswith(f"{other}.")]


def test_lr_decay_is_that_of_beit_with_embeddings_named() -> None:
    depth, decay = 3, 0.75
    beit = [decay ** (depth + 1 - number) for number in range(depth + 2)]  # embeddings, blocks, head
    scales = layerwise_lr_decay(["embed", "block.0", "block.1", "block.2"], decay)
    assert [*scales.values(), 1.0] == pytest.approx(beit)
    assert layerwise_lr_decay(["a", "b"], 0.5, head=4.0) == {"*": 4.0, "a": 1.0, "b": 2.0}
    assert layerwise_lr_decay([["a", "b"], "c"], 0.5) == {"a": 0.25, "b": 0.25, "c": 0.5}


def test_lr_decay_scales_the_rates_of_a_phase() -> None:
    net = parts(head=nn.Linear(1, 1), blocks=nn.ModuleList(Residual(2) for _ in range(2)))
    phase = Phase("*", lr_scale=layerwise_lr_decay(layers_of(net), 0.5, head=2.0))
    (scales,) = resolve_phases(net, [phase], came_frozen=set(), held={}, mode="batchnorm").scales
    found = {name: scales[id(parameter)] for name, parameter in net.named_parameters() if name.endswith("weight")}
    assert found == {
        **{"head.weight": 2.0, "blocks.0.one.weight": 0.5, "blocks.0.two.weight": 0.5},
        **{"blocks.1.one.weight": 1.0, "blocks.1.two.weight": 1.0},
    }


@pytest.mark.parametrize("options", [{"decay": 0.0}, {"decay": float("nan")}, {"decay": 0.5, "head": -1.0}])
def test_lr_decay_refuses_what_is_no_factor(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a factor is above 0 and finite"):
        layerwise_lr_decay(["a"], **options)


def test_lr_decay_refuses_the_name_of_one_module() -> None:
    with pytest.raises(TypeError, match=r"layers='blocks': give names, .*, or layers_of\(model, 'blocks'\)"):
        layerwise_lr_decay("blocks", 0.5)
    with pytest.raises(TypeError, match=r"layerwise_lr_decay\(decay='0.5'\): a factor is a number"):
        layerwise_lr_decay(["a"], "0.5")  # type: ignore[arg-type]
