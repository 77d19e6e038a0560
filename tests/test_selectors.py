from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze import FreezeBatchNorm, Phase, freeze_batchnorm, select_parameters
from lightning_freeze.freezing.batchnorm import has_running_statistics
from lightning_freeze.selectors import clean_name, select_layers, selector_text
from tests.nets import Net
from tests.trees import trees


class Reference:
    """The table of selectors once more, written for clearness and from its words alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)

    def select(self, patterns: Any) -> list[str]:
        chosen: set[int] = set()
        for pattern in [patterns] if isinstance(patterns, str) or callable(patterns) else patterns:
            if isinstance(pattern, str) and pattern.startswith("!"):
                chosen -= self.one(pattern[1:])
            else:
                chosen |= self.one(pattern)
        return [names[0] for key, names in self.names.items() if key in chosen]

    def one(self, pattern: Any) -> set[int]:
        return {key for key, names in self.names.items() if self.accepts(pattern, key, names)}

    def accepts(self, pattern: Any, key: int, names: list[str]) -> bool:
        if callable(pattern):
            parameter = next(p for p in self.module.parameters() if id(p) == key)
            return bool(pattern(names[0], parameter))
        if pattern.startswith("type:"):
            return any(
                any(cls.__name__ == pattern[5:] for cls in type(module).__mro__)
                and any(id(p) == key for p in module.parameters())
                for module in self.module.modules()
            )
        if pattern.startswith("re:"):
            return any(re.fullmatch(pattern[3:], name) for name in names)
        for name in names:
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                part = ".".join(parts[:length])
                if wild(pattern, part) or (pattern.startswith("*.") and wild(pattern[2:], part)):
                    return True
        return False


def wild(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(wild(pattern[1:], text[start:]) for start in range(len(text) + 1))
    return bool(text) and pattern[0] in ("?", text[0]) and wild(pattern[1:], text[1:])


@st.composite
def patterns(draw: Any, module: nn.Module) -> Any:
    """A pattern made from a name that is there, of any of the seven forms."""
    name = draw(st.sampled_from([name for name, _ in module.named_parameters(remove_duplicate=False)]))
    parts = name.split(".")
    kind = draw(st.sampled_from(["name", "glob", "regex", "type", "all", "predicate"]))
    if kind == "name":
        return ".".join(parts[: draw(st.integers(1, len(parts)))])
    if kind == "glob":
        globbed = [draw(st.sampled_from([part, "*", f"{part[:-1]}?"])) for part in parts]
        return ".".join(globbed[draw(st.integers(0, len(parts) - 1)) :])
    if kind == "regex":
        return "re:" + r"\.".join(draw(st.sampled_from([part, ".*", "[a-d]"])) for part in parts)
    if kind == "type":
        owners = [type(m) for m in module.modules() if any(True for _ in m.parameters())]
        return "type:" + draw(st.sampled_from(draw(st.sampled_from(owners)).__mro__[:-1])).__name__
    if kind == "predicate":
        return draw(st.sampled_from([lambda name, p: p.ndim == 1, lambda name, p: name.startswith(parts[0])]))
    return "*"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_selectors_select_what_the_table_says(data: st.DataObject) -> None:
    module = data.draw(trees())
    selector = data.draw(st.lists(patterns(module), min_size=1, max_size=4))
    for place in range(1, len(selector)):
        if isinstance(selector[place], str) and data.draw(st.booleans()):
            selector[place] = f"!{selector[place]}"
    if len(selector) == 1 and data.draw(st.booleans()):
        (selector,) = selector
    reference = Reference(module)
    each = [selector] if isinstance(selector, str) or callable(selector) else selector
    expected = reference.select(selector)
    matches = all(reference.one(one.removeprefix("!") if isinstance(one, str) else one) for one in each)
    if expected and matches:
        found = select_parameters(module, selector)
        assert list(found) == expected
        named = dict(module.named_parameters())
        assert all(found[name] is named[name] for name in found)
    else:
        with pytest.raises(ValueError, match="matches no parameter" if not matches else "selects nothing"):
            select_parameters(module, selector)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_wrappers_change_neither_names_nor_selection(data: st.DataObject) -> None:
    """A compiled module, or one compiled below, selects the same parameters under the same names."""
    module = data.draw(trees())
    selector = data.draw(patterns(module))
    assume(not (isinstance(selector, str) and selector.startswith("type:Module")))
    try:
        plain = select_parameters(module, selector)
    except ValueError:
        assume(False)
    compiled = torch.compile(module, backend="eager")
    assert {n: id(p) for n, p in select_parameters(compiled, selector).items()} == {n: id(p) for n, p in plain.items()}
    parallel = nn.DataParallel(module)
    for around in (parallel, torch.compile(parallel, backend="eager")):
        assert select_parameters(around, selector).keys() == plain.keys()
    name, child = next(iter(module.named_children()))
    setattr(module, name, torch.compile(child, backend="eager"))
    assert {n: id(p) for n, p in select_parameters(module, selector).items()} == {n: id(p) for n, p in plain.items()}


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("backbon", 'select="backbon" matches no parameter. Did you mean "backbone"?'),
        ("backbon.4", 'matches no parameter. Did you mean "backbone.4"?'),
        ("backbon.*.bias", 'Did you mean "backbone.*.bias"?'),
        ("hed.weight", 'Did you mean "head.weight"?'),
        ("backbone.2", 'There is a module "backbone.2", but it has none.'),
        ("type:BatchNorm3d", 'select="type:BatchNorm3d" matches no parameter. Did you mean "type:BatchNorm2d"'),
        ("re:nothing.*", 'select="re:nothing.*" matches no parameter.\n'),
        (r"re:backbon\..*\.weight", 'matches no parameter. Did you mean "backbone.'),
        ("re:(?i)hed", 'Did you mean "head"'),
        ("backbone.*.wieght", 'Did you mean "backbone.*.weight"?'),
        ("backbone.*.wieght*", 'Did you mean "backbone.*.weight*"?'),
        ("bakcbone.?", 'Did you mean "backbone.?"?'),
        ("Backbone.4.WEIGHT", 'Did you mean "backbone.4.weight"?'),
        ("type:Dropout", 'select="type:Dropout" matches no parameter. There are modules of that class, but they have'),
        ("type:torch.nn.Linaer", 'Did you mean "type:Linear"?'),
        ("type:linear", 'Did you mean "type:Linear"?'),
        ([], 'select=[] selects nothing: it is empty. For everything, give "*".'),
        ("re:(", 'select="re:(" is no regular expression'),
        (["*", "!hed"], 'select="!hed" matches no parameter. Did you mean "head"?'),
        ("!head", 'Say what it takes away from, for example ["*", "!head"]'),
        (["head", "!*"], 'select=["head", "!*"] selects nothing'),
        (lambda name, p: False, "matches no parameter"),
    ],
    ids=selector_text,
)
def test_error_suggests_the_closest_pattern_and_lists_modules(select: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        select_parameters(Net(), select)
    if "matches no" in str(caught.value):
        assert str(caught.value).endswith("\nTop-level modules: backbone, neck, head.")


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (3, "not 3."),
        (None, "not None."),
        (["head", 3], "not 3 in ['head', 3]."),
        ([["head"]], "not ['head'] in [['head']]."),
        ({"head": 1}, "not {'head': 1}."),
        (
            nn.Linear(1, 1),
            'not a module (Linear). Give its dotted name, for example "backbone.layer4", or "type:Linear"',
        ),
        ([nn.ReLU()], "not a module (ReLU)."),
        (nn.BatchNorm2d, 'not the class BatchNorm2d. Give "type:BatchNorm2d" for its layers.'),
        (
            [nn.Parameter(torch.ones(1))],
            'not a tensor (Parameter). Give its dotted name, for example "backbone.layer4".',
        ),
    ],
    ids=str,
)
def test_what_is_no_selector_is_refused_by_every_function(select: Any, message: str) -> None:
    expected = re.escape(f"A selector is a string, a callable or a list of them, {message}")
    for act in (select_parameters, freeze_batchnorm):
        with pytest.raises(TypeError, match=expected):
            act(Net(), select)
    with pytest.raises(TypeError, match=expected):
        FreezeBatchNorm(select)
    if select and not isinstance(select, int | dict):
        with pytest.raises(TypeError, match=expected):
            Phase(select)


def test_name_with_brackets_comes_before_a_glob() -> None:
    net = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in ("a[0]", "a0", "b")})
    assert list(select_parameters(net, "a[0]")) == ["a[0]"]
    assert list(select_parameters(net, ["*", "!a[0]"])) == ["a0", "b"]
    assert list(select_parameters(net, "a[!0]*")) == ["a[0]"]
    assert set(select_parameters(nn.ModuleDict({"m[0]": net}), "m[0]")) == {"m[0].a[0]", "m[0].a0", "m[0].b"}
    with pytest.raises(ValueError, match=r'"b\[0\]" matches no parameter\.') as caught:
        select_parameters(net, "b[0]")
    assert "There is a module" not in str(caught.value)


@pytest.mark.parametrize(
    ("select", "meant"),
    [
        ("fc", "model.fc"),
        ("fc.*", "model.fc.*"),
        ("layre4", "model.layer4"),
        ("layer4[-1]", "model.layer4[-1]"),
        ("model.layre4[0].bias", "model.layer4[0].bias"),
        ("net.model.layer4", "model.layer4"),
        ("lit_module.model", "model"),
        (r"model\.layer4\.(0|1)\..*", r"re:model\.layer4\.(0|1)\..*"),
    ],
)
def test_error_names_what_is_below_or_above_a_wrapper(select: str, meant: str) -> None:
    layers = {"layer4": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), "fc": nn.Linear(1, 1)}
    net = nn.ModuleDict({"model": nn.ModuleDict(layers)})
    given, right = json.dumps(select), json.dumps(meant)
    with pytest.raises(ValueError, match=re.escape(f"{given} matches no parameter. Did you mean {right}")):
        select_parameters(net, select)
    assert select_parameters(net, meant)


def block() -> nn.Module:
    return nn.ModuleDict({"attn": nn.Linear(1, 1, bias=False), "mlp": nn.Linear(1, 1, bias=False)})


def stacked() -> nn.Module:
    parts = {"blocks": nn.ModuleList(block() for _ in range(3)), "layer1": nn.Sequential(block(), block())}
    return nn.ModuleDict({"body": nn.ModuleDict(parts | {"layer2": nn.Sequential(block())}), "head": nn.Linear(1, 1)})


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("body.blocks[-2:]", ["body.blocks.1", "body.blocks.2"]),
        ("body.blocks[0]", ["body.blocks.0"]),
        ("body.blocks[-1]", ["body.blocks.2"]),
        ("body.blocks[::2]", ["body.blocks.0", "body.blocks.2"]),
        ("body.blocks[1::-1].mlp", ["body.blocks.0.mlp", "body.blocks.1.mlp"]),
        ("body.blocks[:-1].attn", ["body.blocks.0.attn", "body.blocks.1.attn"]),
        ("body.blocks[1:2].mlp.*", ["body.blocks.1.mlp"]),
        ("*.layer?[0]", ["body.layer1.0", "body.layer2.0"]),
        ("body.layer[12][0].attn", ["body.layer1.0.attn", "body.layer2.0.attn"]),
        ("body.layer[12]", ["body.layer1", "body.layer2"]),
        (["body", "!body.blocks[:2]", "!body.layer1[-1]"], ["body.blocks.2", "body.layer1.0", "body.layer2"]),
        (["*", "!body.blocks[:]", "!body.layer[12]"], ["head"]),
    ],
    ids=selector_text,
)
def test_slice_selects_members_of_a_list(select: Any, expected: list[str]) -> None:
    net = stacked()
    found = select_parameters(net, select)
    assert list(found) == [name for name, _ in net.named_parameters() if name.startswith(tuple(expected))]
    for index in range(2):
        net["body"]["blocks"][index] = torch.compile(net["body"]["blocks"][index], backend="eager")
    assert list(select_parameters(net, select)) == list(found)


def test_slice_of_a_module_that_is_a_list_itself() -> None:
    assert list(select_parameters(nn.Sequential(block(), block()), "[-1]")) == ["1.attn.weight", "1.mlp.weight"]


def test_slice_of_a_list_of_parameters() -> None:
    net = nn.ModuleDict({"prompts": nn.ParameterList(torch.zeros(2) for _ in range(12)), "head": nn.Linear(2, 1)})
    assert list(select_parameters(net, "prompts[-3:]")) == ["prompts.9", "prompts.10", "prompts.11"]
    assert list(select_parameters(net, ["prompts", "!prompts[1:]"])) == ["prompts.0"]


@pytest.mark.parametrize(
    "select", ["head.weight", "*.weight", r"re:head\.w.*", "head.parametrizations.weight.original1"]
)
def test_what_is_parametrized_has_the_name_that_it_had(select: str) -> None:
    net = nn.ModuleDict({"head": nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))})
    found = list(select_parameters(net, select))
    assert found == [
        f"head.parametrizations.weight.original{number}" for number in ((0, 1) if "1" not in select else (1,))
    ]
    assert list(select_parameters(net, ["*", "!head.weight"])) == ["head.bias"]


@pytest.mark.parametrize("picked", ["3", "-4", "-4:", ":4", "2:1"])
def test_slice_out_of_range_says_how_many_there_are(picked: str) -> None:
    with pytest.raises(ValueError, match=r'"body\.blocks" has 3 modules: \[0\] to \[2\], from the end') as caught:
        select_parameters(stacked(), f"body.blocks[{picked}].attn")
    assert f'select="body.blocks[{picked}].attn": [{picked}] picks nothing' in str(caught.value)


def test_slice_of_what_is_no_list_says_so() -> None:
    with pytest.raises(ValueError, match=r'matches no parameter\. "head" is no nn\.ModuleList or nn\.Sequential\.'):
        select_parameters(stacked(), "head[0]")
    with pytest.raises(ValueError, match=r"matches no parameter\.\nTop"):
        select_parameters(stacked(), "body.blocks[0].nope")


def test_error_of_a_module_without_children_lists_its_parameters() -> None:
    with pytest.raises(ValueError, match=r"Did you mean \"weight\"\?\nParameters: weight, bias\."):
        select_parameters(nn.Linear(2, 1), "wieght")
    with pytest.raises(ValueError, match="has no parameters yet"):
        select_parameters(nn.Module(), "*")
    assert list(select_parameters(nn.Linear(2, 1), "*.bias")) == ["bias"]


def test_type_selector_accepts_the_full_path_of_a_class() -> None:
    net = Net()
    assert list(select_parameters(net, "type:torch.nn.modules.batchnorm.BatchNorm2d")) == list(
        select_parameters(net, "type:_BatchNorm")
    )


def test_clean_name_drops_whole_segments_only() -> None:
    assert clean_name("_orig_mod.a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight") == "a.b.weight"
    assert clean_name("my_orig_mod.weight") == "my_orig_mod.weight"


def test_selector_text_has_no_address_of_a_function() -> None:
    assert (
        selector_text(["head", "!*.bias", test_clean_name_drops_whole_segments_only])
        == "head, !*.bias, test_clean_name_drops_whole_segments_only"
    )


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_select_layers_finds_layers_that_have_buffers_only(data: st.DataObject) -> None:
    module = data.draw(trees())
    every = {m for m in module.modules() if isinstance(m, nn.BatchNorm1d)}
    found = select_layers(module, "*", has_running_statistics)
    assert set(found.values()) == every
    assert len(found) == len(every)
    for name, layer in found.items():
        assert module.get_submodule(name) is layer
        assert layer in select_layers(module, name, has_running_statistics).values()
