from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_freeze.feature_cache.arguments import sequential_links
from lightning_freeze.feature_cache.chain import FeatureChain
from lightning_freeze.feature_cache.hashing import DeviceHash, Hash
from lightning_freeze.feature_cache.interceptor import is_intercepted
from lightning_freeze.feature_cache.rows import MemoryRows

WIDE = 300  # outputs with this many numbers are trusted after one comparison


def small() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, WIDE), nn.ReLU(), nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()))
    return net.requires_grad_(False)


def convolutional() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
    return net.eval().requires_grad_(False)


class Counting(nn.Module):
    """Counts the samples that really run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.samples = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        self.samples += len(first)
        return self.inner(*args, **kwargs)


class Watched:
    """A chain over one counted module, and what it said."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        self.net = Counting(inner)
        self.said: list[str] = []
        rows = MemoryRows(options.pop("limit", 10**8))
        self.chain = FeatureChain(("net", self.net), {}, rows=rows, say=self.said.append, **options)

    def __enter__(self) -> Watched:
        self.chain.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.chain.__exit__()
        self.chain.close()

    def runs(self, *args: Any, **kwargs: Any) -> int:
        """How many samples a call runs; its output is checked against the bare module's."""
        before = self.net.samples
        output = self.net(*args, **kwargs)
        ran = self.net.samples - before
        assert_same(output, self.net.inner(*args, **kwargs))
        return ran

    def learn(self, *args: Any, **kwargs: Any) -> None:
        """Show a batch until it is answered from memory."""
        for _ in range(5):
            if self.runs(*args, **kwargs) == 0:
                return
        raise AssertionError("It never is.")


def assert_same(a: Any, b: Any) -> None:
    leaves, spec = torch.utils._pytree.tree_flatten(a)
    others, other_spec = torch.utils._pytree.tree_flatten(b)
    assert spec == other_spec
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            assert leaf.dtype == other.dtype
            assert leaf.stride() == other.stride()
            assert np.array_equal(bits(leaf), bits(other))
        else:
            assert leaf == other


def bits(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(torch.uint8).numpy()


@pytest.fixture(params=[Hash, DeviceHash], ids=["on the host", "on the device"])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    with Watched(small(), hashing=request.param()) as here:
        yield here


# What is remembered


def test_samples_are_known_in_any_order_and_company(watched: Watched) -> None:
    x = torch.randn(16, 6)
    assert [watched.runs(x) for _ in range(3)] == [16, 16, 0]  # the second time shows that it is not random
    assert watched.runs(x.flip(0)) == 16  # and once more in another order
    assert watched.runs(x[torch.randperm(16)]) == 0
    assert watched.runs(x[[3] * 16]) == 0


@pytest.mark.parametrize("kind", ["linear", "conv", "half"])
def test_a_short_last_batch_is_not_computed_for_ever(kind: str) -> None:
    """Plain "size in the key" computes 2.2 epochs in ten: the last batch, and all that its samples come into later."""
    made: dict[str, Callable[[], nn.Module]] = {
        "linear": small,
        "conv": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 64, 2), nn.ReLU(), nn.Flatten()),
        "half": lambda: small().bfloat16(),
    }
    size, x = 12 * 32 + 16, torch.randn(12 * 32 + 16, 6)
    x = x.bfloat16() if kind == "half" else x
    with Watched(made[kind]().requires_grad_(False)) as watched:
        ran = sum(watched.runs(x[places]) for _ in range(10) for places in torch.randperm(size).split(32))
    # In half precision the short batch itself is computed in each epoch: rounding hides where kernels differ.
    assert ran <= (1.6 if kind == "half" else 1.2) * size


class KernelOfShort(nn.Module):
    """Batches of less than eight get other bits, in their last sample."""

    def forward(self, x: Tensor) -> Tensor:
        features = x.repeat(1, WIDE)
        if len(x) < 8:
            features[-1].mul_(1.5)
        return features


def test_sizes_that_differ_in_one_sample_never_serve_each_other() -> None:
    x = torch.randn(44, 6)
    with Watched(KernelOfShort()) as watched:
        for _ in range(6):
            for places in torch.randperm(44).split(8):
                watched.runs(x[places])
        assert watched.chain.stats().hits > 0


def test_mixing_that_is_proven_in_one_size_says_nothing_of_another() -> None:
    x = torch.randn(8, 6)
    with Watched(KernelOfShort()) as watched:
        assert [watched.runs(x[torch.randperm(8)]) for _ in range(3)] == [8, 8, 0]
        for places in ([0, 1, 2, 3], [3, 0, 1, 2]):
            watched.runs(x[places])


def test_sizes_that_differ_in_an_earlier_link_never_serve_each_other() -> None:
    """The last link alone would give the same bits in both sizes."""
    links = {"one": KernelOfShort(), "two": nn.Linear(6 * WIDE, WIDE).requires_grad_(False)}
    net, x = nn.Sequential(*links.values()), torch.randn(44, 6)
    orders = [torch.randperm(44).split(8) for _ in range(6)]
    expected = [net(x[places]) for order in orders for places in order]
    with FeatureChain(None, links, rows=MemoryRows(10**8)) as chain:
        outputs = [net(x[places]) for order in orders for places in order]
        assert chain.stats().hits > 3 * 40
    assert all(map(torch.equal, outputs, expected))


class Encoder(nn.Module):
    """A small transformer as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, pool: bool = False) -> dict[str, Any]:
        padding = None if attention_mask is None else attention_mask == 0
        hidden = self.layers(self.embed(input_ids), src_key_padding_mask=padding)
        return {"last_hidden_state": hidden, "pooled": hidden.mean(1) if pool else None}


def test_a_transformer_with_masks_and_varying_lengths() -> None:
    with Watched(Encoder().eval().requires_grad_(False)) as watched:
        ids = torch.randint(0, 50, (8, 12))
        mask = (torch.arange(12) < torch.randint(3, 12, (8, 1))).long()
        watched.learn(input_ids=ids, attention_mask=mask)
        order = torch.randperm(8)
        watched.learn(input_ids=ids.flip(0), attention_mask=mask.flip(0))
        assert watched.runs(input_ids=ids[order], attention_mask=mask[order]) == 0
        assert watched.runs(input_ids=ids, attention_mask=torch.ones_like(mask)) > 0
        assert watched.runs(input_ids=ids, attention_mask=mask, pool=True) == 8
        assert watched.runs(input_ids=ids) == 8
        watched.learn(input_ids=ids[:, :7], attention_mask=mask[:, :7])
        assert watched.runs(input_ids=ids, attention_mask=mask) == 0


@pytest.mark.parametrize("kind", ["channels_last", "half", "bfloat16", "double", "slice"])
def test_layouts_and_dtypes_of_inputs(kind: str) -> None:
    net, x = convolutional(), torch.randn(8, 3, 9, 9)
    with Watched(net) as watched:
        watched.learn(x)
        if kind == "channels_last":
            other = x.contiguous(memory_format=torch.channels_last)
        elif kind == "slice":
            other = torch.randn(8, 6, 9, 18)[:, ::2, :, ::2]
        else:
            dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[kind]
            net.to(dtype)
            other = x.to(dtype)
        assert watched.runs(other) == 8
        watched.learn(other)


class KernelsOfHalf(nn.Module):
    """In batches of four one sample gets other bits, in batches of eight all the usual: rounding hides the rest."""

    def forward(self, x: Tensor) -> Tensor:
        features = x.mul(2)
        last = features[-1] if len(x) == 4 and x[-1, 0] > 10 else features[:0]
        last.mul_(1.5)
        return features


class HalfInside(KernelsOfHalf):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(300, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16() * self.weight).float()


@pytest.mark.parametrize(
    ("net", "dtype"),
    [(KernelsOfHalf(), torch.bfloat16), (KernelsOfHalf(), torch.float16), (HalfInside(), torch.float32)],
)
def test_in_half_precision_equal_bits_of_some_say_nothing_of_others(net: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(8, 300).to(dtype)
    x[6, 0] = 11
    known, new = x[[0, 2, 1, 3]], x[[4, 5, 7, 6]]
    batches = [x, x, known, known, x[:4], new, new, x]
    plain = [net(batch) for batch in batches]
    with FeatureChain(("net", net), {}, rows=MemoryRows(10**6)) as chain:
        cached = [net(batch) for batch in batches]
    assert all(map(torch.equal, plain, cached))
    assert chain.stats().hits >= 8


def test_outputs_are_the_users_to_write_into(watched: Watched) -> None:
    x = torch.randn(8, 6)
    for _ in range(4):
        output = watched.net(x)
        assert_same(output, watched.net.inner(x))
        output.zero_()


# What makes it forget, or turns it off


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "load_state_dict(assign=True)": lambda net: net.load_state_dict(
        {k: v + 1 for k, v in net.state_dict().items()}, assign=True
    ),
    "in place": lambda net: net[0].weight.add_(0.1),
    "one number in place": lambda net: net[2][0].weight[3, 4].add_(0.1),
    "another parameter": lambda net: setattr(net[0], "bias", nn.Parameter(torch.ones(WIDE), requires_grad=False)),
    ".data = ": lambda net: setattr(net[0].weight, "data", torch.ones_like(net[0].weight)),
    "another layer": lambda net: net.__setitem__(1, nn.Tanh()),
    "one more layer": lambda net: net.append(nn.Tanh()),
    "to": lambda net: net.double(),
    "initialised anew": lambda net: net[0].reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen_at_the_next_call(change: str, watched: Watched) -> None:
    x = torch.randn(8, 6)
    watched.learn(x)
    with torch.no_grad():
        CHANGES[change](watched.net.inner)  # type: ignore[arg-type]
    if change == "to":
        x = x.double()
    for parameter in watched.net.parameters():
        parameter.requires_grad_(False)
    assert watched.runs(x) == 8
    watched.learn(x)


def test_weights_that_move_all_the_time_turn_it_off(watched: Watched) -> None:
    x = torch.randn(8, 6)
    for _ in range(12):
        watched.runs(x)
        watched.net.inner[0].weight.add_(0.1)  # type: ignore[index]
    assert "written to again and again" in str(watched.chain.stats().why)
    assert len(watched.said) == 1


def test_a_parameter_that_trains_gets_its_gradient(watched: Watched) -> None:
    x = torch.randn(8, 6)
    watched.learn(x)
    watched.net.inner[2][0].bias.requires_grad_(True)  # type: ignore[index]
    watched.net(x).sum().backward()
    assert watched.net.inner[2][0].bias.grad is not None  # type: ignore[index]
    assert watched.chain.stats().why == "net.inner.2.0.bias trains"
    assert watched.said == ["net: off, because net.inner.2.0.bias trains."]
    watched.net.requires_grad_(False)
    watched.learn(x)


def test_an_input_that_requires_grad_gets_its_gradient(watched: Watched) -> None:
    x = torch.randn(8, 6)
    watched.learn(x)
    y = x.clone().requires_grad_()
    watched.net(y).sum().backward()
    assert y.grad is not None
    assert watched.said == ["net: such calls are not cached: its input requires grad."]
    with torch.no_grad():
        watched.learn(y)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.repeat(1, WIDE) + self.calls


def test_a_module_that_counts_its_calls_turns_it_off() -> None:
    net, plain, x = Counts(), Counts(), torch.randn(12, 6)
    order = [torch.randperm(12, generator=torch.Generator().manual_seed(i))[:8] for i in range(6)]
    expected = [plain(x[i]) for i in order]
    with Watched(net) as watched:
        outputs = [watched.net(x[i]) for i in order]
        assert not watched.chain.stats().active
        assert "gave other outputs" in watched.said[-1]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("own", [False, True])
def test_hooks_are_called(own: bool, watched: Watched) -> None:
    x = torch.randn(8, 6)
    watched.learn(x)
    seen = []
    handle = (watched.net if own else watched.net.inner).register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        watched.net(x)
    assert len(seen) == 3
    assert "has forward hooks" in watched.said[0]
    handle.remove()
    watched.learn(x)


# Room


def test_what_does_not_fit_is_computed() -> None:
    each = 4 * WIDE + 300
    with Watched(small(), limit=10 * each) as watched:
        x = torch.randn(24, 6)
        for _ in range(3):
            for batch in x.split(8):
                watched.runs(batch)
        stats = watched.chain.stats()
        assert stats.samples == 10
        assert stats.bytes <= 10 * each
        assert "the cache is full" in watched.said[0]
        assert len(watched.said) == 1
        assert watched.runs(x[:8]) == 0


def test_halves_take_half_the_room_and_are_the_same_from_the_start() -> None:
    net, x = small(), torch.randn(8, 6)
    full, half = Watched(net), Watched(net, dtype=torch.float16)
    with full:
        full.learn(x)
        bytes_ = full.chain.stats().bytes
    with half:
        outputs = [half.net(x) for _ in range(3)]
        assert half.chain.stats().hits == 8
        assert half.chain.stats().bytes < 0.7 * bytes_
    assert all(torch.equal(output, net(x).half().float()) for output in outputs)


def test_numbers_too_large_for_halves_turn_it_off() -> None:
    net = nn.Linear(6, WIDE).requires_grad_(False)
    net.bias += 1e6
    with Watched(net, dtype=torch.float16) as watched:
        assert watched.runs(torch.randn(8, 6)) == 8
        assert "too large for torch.float16" in watched.said[0]


# What stays behind


def test_nothing_stays_behind() -> None:
    net = small()
    before = [dict(vars(module)) for module in net.modules()]
    chain = FeatureChain(("net", net), sequential_links("net", net), rows=MemoryRows(10**6))
    with pytest.raises(RuntimeError, match="shapes cannot"), chain:
        net(torch.randn(4, 7))
    for old, module in zip(before, net.modules(), strict=True):
        assert list(old) == list(vars(module))


def test_a_chain_that_cannot_stand_before_all_stands_before_none(watched: Watched) -> None:
    links = {"before": nn.ReLU(), "net": watched.net}
    with pytest.raises(ValueError, match="Counting are intercepted already"):
        FeatureChain(None, links, rows=MemoryRows(10**6)).__enter__()
    assert not is_intercepted(links["before"])
    assert is_intercepted(watched.net)


def test_tracing_and_transforms_run_the_module(watched: Watched) -> None:
    x = torch.randn(8, 6)
    watched.learn(x)
    net = watched.net
    torch.testing.assert_close(torch.func.vmap(net)(x[:, None]).squeeze(1), net(x))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert net(torch.empty(8, 6)).shape == (8, WIDE)


def test_compiled_modules() -> None:
    net: Any = torch.compile(Counting(small()), backend="eager")
    x = torch.randn(8, 6)
    before = dict(vars(net))
    expected = net(x)
    with FeatureChain(("net", net), {}, rows=MemoryRows(10**6)) as chain:
        outputs = [net(x) for _ in range(4)]
        assert chain.stats().hits >= 8
    assert all(torch.equal(output, expected) for output in outputs)
    assert list(vars(net)) == list(before)
    assert torch.equal(net(x), expected)


# Chains


class Stages(nn.Module):
    """Like a ResNet: a stem, stages one on the output of the other, and what comes after them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        for number in range(1, 5):
            self.add_module(f"stage{number}", Counting(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        for number in range(1, 5):
            x = getattr(self, f"stage{number}")(x)
        return x.mean((2, 3))


class Skips(Stages):
    """Like a U-Net: reads what is between, too."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.stage1(self.stem(x))
        second = self.stage2(first)
        return torch.cat([self.stage4(self.stage3(second)), first * 2, second], 1)


class Between(Stages):
    """Does something between two stages."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)).relu())))


class InPlace(Stages):
    """Does something between two stages, and one cannot see it by the tensor's identity."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))).relu_()))


class Sideways(Stages):
    """Runs the stages in another order, and one twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stage1(self.stage3(self.stage4(self.stage1(self.stage2(self.stem(x))))))


class Apart(Stages):
    """Runs the second stage only sometimes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        return self.stage3(x if x.shape[0] == 8 else self.stage2(x))


NAMES = [f"stage{number}" for number in range(1, 5)]


def ran(net: nn.Module, *args: Tensor) -> list[int]:
    before = [getattr(net, name).samples for name in NAMES]
    net(*args)
    return [getattr(net, name).samples - old for name, old in zip(NAMES, before, strict=True)]


@pytest.mark.parametrize("inference", [False, True])
def test_a_chain_is_cached_as_deep_as_it_is_frozen(inference: bool) -> None:
    net, x = Stages().eval().requires_grad_(False), torch.randn(8, 3, 16, 16)
    said: list[str] = []
    chain = FeatureChain(None, {name: getattr(net, name) for name in NAMES}, rows=MemoryRows(10**8), say=said.append)
    with torch.inference_mode(inference), chain:
        for depth in (4, 2, 3, 1, 0, 4):
            for number, name in enumerate(NAMES):
                getattr(net, name).requires_grad_(number >= depth)
            with_cache = [ran(net, x) for _ in range(4)][-1]
            assert with_cache == [0] * depth + [8] * (4 - depth)
            assert chain.stats().covers == tuple(NAMES[:depth])
            assert chain.stats().active == (depth > 0)
            cached = net(x)
            chain.__exit__()
            assert torch.equal(cached, net(x))
            chain.__enter__()
    assert "stage1: cached up to stage2, because stage3.inner.0.weight trains." in said


@pytest.mark.parametrize("kind", [Skips, Between, InPlace, Sideways, Apart])
@pytest.mark.parametrize("inference", [False, True])
def test_links_that_are_no_chain_give_what_they_would_have(kind: type[Stages], inference: bool) -> None:
    """Links that do not follow each other are remembered by themselves, and the outputs are always the same."""
    net = kind().eval().requires_grad_(False)
    batches = [torch.randn(size, 3, 16, 16) for size in (8, 8, 5)]
    with torch.inference_mode(inference):
        expected = [net(x) for x in batches]
        chain = FeatureChain(None, {name: getattr(net, name) for name in NAMES}, rows=MemoryRows(10**8))
        with chain:
            for _ in range(5):
                for x, output in zip(batches, expected, strict=True):
                    assert_same(net(x), output)
            assert chain.stats().hits > 0
            assert chain.stats().covers == tuple(NAMES)


class Attends(nn.Module):
    """Like a language model: blocks that are all given the same masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        for name in NAMES:
            self.add_module(name, Counting(Block()))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(ids)
        future = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        for name in NAMES:
            h = self.block(name, h, mask, future)
        return h.mean(1)

    def block(self, name: str, h: Tensor, mask: Tensor, future: Tensor) -> Tensor:
        output: Tensor = getattr(self, name)(h, future, True, mask=(mask, None))
        return output


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(
        self,
        h: Tensor,
        future: Tensor | None = None,
        plus: bool = False,
        *,
        mask: tuple[Tensor, Any],
        scale: float = 1.0,
    ) -> Tensor:
        after = self.attention(h, h, h, key_padding_mask=mask[0] == 0, attn_mask=future, need_weights=False)[0]
        return (h + after if plus else after) * scale


class OtherMask(Attends):
    """Gives the third block a mask of its own."""

    def block(self, name: str, h: Tensor, mask: Tensor, future: Tensor) -> Tensor:
        return super().block(name, h, mask if name != "stage3" else torch.ones_like(mask), future)


class WritesMask(Attends):
    """Writes into the mask before the third block."""

    def block(self, name: str, h: Tensor, mask: Tensor, future: Tensor) -> Tensor:
        return super().block(name, h, mask.fill_(1) if name == "stage3" else mask, future)


class Counted(Attends):
    """Gives the third block another number in each call."""

    calls = 0

    def block(self, name: str, h: Tensor, mask: Tensor, future: Tensor) -> Tensor:
        if name != "stage3":
            return super().block(name, h, mask, future)
        self.calls += 1
        output: Tensor = self.stage3(h, future, mask=(mask, None), scale=float(self.calls % 3))
        return output


class OutOfTurn(Attends):
    """Leaves the second mask out in every other call."""

    calls = 0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(ids, mask)

    def block(self, name: str, h: Tensor, mask: Tensor, future: Tensor) -> Tensor:
        output: Tensor = getattr(self, name)(h, future if self.calls % 2 else None, mask=(mask, None))
        return output


def texts(size: int, length: int = 6) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(length) < torch.randint(3, length + 1, (size, 1))).long()
    return torch.randint(50, (size, length)), mask


@pytest.mark.parametrize("depth", [4, 3, 2])
@pytest.mark.parametrize("inference", [False, True])
def test_links_may_be_given_what_the_first_link_was_given(inference: bool, depth: int) -> None:
    net = Attends().eval().requires_grad_(False)
    for number, name in enumerate(NAMES):
        getattr(net, name).requires_grad_(number >= depth)
    chain = FeatureChain(None, {name: getattr(net, name) for name in NAMES}, rows=MemoryRows(10**8))
    ids, mask = texts(9)
    ones, order = torch.ones_like(mask), torch.randperm(9)
    with torch.inference_mode(inference):
        expected, others, shuffled = net(ids, mask), net(ids, ones), net(ids[order], mask[order])
        with chain:
            for _ in range(3):
                assert_same(net(ids, mask.clone()), expected)
            assert ran(net, ids, mask.clone()) == [0] * depth + [9] * (4 - depth)
            assert_same(net(ids, mask.clone()), expected)
            assert chain.stats().covers == tuple(NAMES[:depth])
            assert_same(net(ids, ones), others)
            for _ in range(2):
                assert_same(net(ids.flip(0), mask.flip(0)), expected.flip(0))
            hits = chain.stats().hits
            assert_same(net(ids[order], mask[order]), shuffled)
            assert chain.stats().hits == hits + 9


@pytest.mark.parametrize("kind", [OtherMask, WritesMask, Counted, OutOfTurn])
@pytest.mark.parametrize("inference", [False, True])
def test_links_that_are_given_anything_else_give_what_they_would_have(kind: type[Attends], inference: bool) -> None:
    net, twin = kind().eval().requires_grad_(False), kind().eval().requires_grad_(False)
    twin.load_state_dict(net.state_dict())
    batches = [texts(size) for size in (8, 8, 5)]
    chain = FeatureChain(None, {name: getattr(net, name) for name in NAMES}, rows=MemoryRows(10**8))
    with torch.inference_mode(inference), chain:
        for _ in range(7):
            for ids, mask in batches:
                assert_same(net(ids, mask.clone()), twin(ids, mask.clone()))
        assert chain.stats().hits > 0


class Scaled(Attends):
    """Gives all blocks but the first a number."""

    scale = 1.0

    def block(self, name: str, h: Tensor, mask: Tensor, future: Tensor) -> Tensor:
        options = {} if name == "stage1" else {"scale": self.scale}
        output: Tensor = getattr(self, name)(h, future, mask=(mask, None), **options)
        return output


def test_a_link_that_writes_into_what_it_is_given_is_left_alone() -> None:
    links = {"one": nn.ReLU(inplace=True), "two": nn.Linear(6, WIDE).requires_grad_(False)}
    said: list[str] = []
    net, x = nn.Sequential(*links.values()), torch.randn(8, 6)
    with FeatureChain(None, links, rows=MemoryRows(10**6), say=said.append):
        for _ in range(4):
            given = x.clone()
            output = net(given)
            assert torch.equal(given, x.relu())
            assert torch.equal(output, nn.functional.linear(x.relu(), links["two"].weight, links["two"].bias))
    assert "one: off, because it writes into what it is given." in said


def test_another_chain_does_not_go_on_with_what_links_gave_for_other_arguments() -> None:
    net, (ids, mask) = Scaled().eval().requires_grad_(False), texts(9)
    links = {name: getattr(net, name) for name in NAMES}
    rows, misses = MemoryRows(10**8), []
    for scale in (1.0, 2.0, 2.0):
        net.scale = scale
        expected = net(ids, mask)
        chain = FeatureChain(None, links, rows=rows)
        with chain:
            for _ in range(5):
                assert_same(net(ids, mask), expected)
            assert chain.stats().covers == tuple(NAMES)
        misses.append(chain.stats().misses)
    assert misses == [18, 18, 9]  # twice the same, the second time as a proof; once for what was kept


def test_what_cannot_be_computed_any_more_is_an_error() -> None:
    class Late(Stages):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            first = self.stage1(x)
            last = self.stage4(self.stage3(self.stage2(first)))
            if self.late:
                x.zero_()
                last = last + first
            return last

    net, x = Late().eval().requires_grad_(False), torch.randn(8, 3, 16, 16)
    with FeatureChain(None, {name: getattr(net, name) for name in NAMES}, rows=MemoryRows(10**8)):
        for _ in range(4):
            net(x)
        net.late = True
        with pytest.raises(RuntimeError, match="Name no module after stage1"):
            net(x)


def test_a_sequential_is_a_chain_of_its_own() -> None:
    net = nn.Sequential(*[Counting(nn.Linear(40, 40)) for _ in range(4)], nn.Sequential(Counting(nn.Linear(40, 40))))
    counted = [module for module in net.modules() if isinstance(module, Counting)]
    net.requires_grad_(False)
    x = torch.randn(8, 40)
    with FeatureChain(("net", net), sequential_links("net", net), rows=MemoryRows(10**8)) as chain:
        for depth in (5, 3, 4, 0, 1):
            for number, module in enumerate(counted):
                module.requires_grad_(number >= depth)
            expected = copy.deepcopy(net)(x)
            for _ in range(5):
                before = [module.samples for module in counted]
                assert torch.equal(net(x), expected)
            assert [m.samples - old for m, old in zip(counted, before, strict=True)] == [0] * depth + [8] * (5 - depth)
            assert chain.stats().covers == (() if depth == 0 else ("net",) if depth == 5 else chain.stats().covers)
