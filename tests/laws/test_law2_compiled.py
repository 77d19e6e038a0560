"""Law 2 under ``torch.compile``: what was compiled while a parameter was frozen trains it when it unfreezes.

Code that was compiled for a frozen parameter computes no gradient for it; were it used again, the parameter would be
left out in silence (pytorch #139476).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from lightning_freeze import FreezeSchedule, Phase
from tests.nets import Net, Probe, loader, moved, sgd, snapshot, trainer

# Either everything trains, or the head.
PHASES = {
    "head first": [Phase("head", epochs=1), Phase("*", lr_scale={"backbone": 0.5})],
    "steps": [Phase("head", steps=4), Phase("*")],
    "frozen again": [Phase("*", epochs=1), Phase("head", epochs=1), Phase("*")],
}


def compiled(how: str, backend: str) -> tuple[Net, Any]:
    """A net, and what is fitted."""

    class Features(Net):
        def features(self, x: torch.Tensor) -> torch.Tensor:
            return self.neck(self.backbone(x).mean((2, 3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.features(x)))

    torch.manual_seed(0)
    net = Features(sgd)  # AdamW makes steps of the rounding error that is the gradient of a bias before BatchNorm
    for child in net.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.0
    if how == "module":
        net.backbone.compile(backend=backend)
        net.neck = torch.compile(net.neck, backend=backend)  # a wrapper, whose names have a prefix
    if how == "method":
        net.features = torch.compile(net.features, backend=backend)  # type: ignore[method-assign]
    return net, torch.compile(net, backend=backend) if how == "LightningModule" else net


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    yield
    torch._dynamo.reset()


def fit(how: str, backend: str, phases: list[Phase]) -> dict[str, torch.Tensor]:
    """Check after each phase what it has trained, and give the weights at the end."""
    net, fitted = compiled(how, backend)
    schedule, seen = FreezeSchedule(phases, verbose=False), dict[int, list[dict[str, torch.Tensor]]]()
    probe = Probe(
        lambda *_: seen.setdefault(schedule.phase_index, [snapshot(net)]),
        lambda *_: seen[schedule.phase_index].append(snapshot(net)),
    )
    trainer(callbacks=[schedule, probe], max_epochs=3, limit_val_batches=0).fit(fitted, loader())
    assert len(seen) == len(phases)
    names = {name for name, _ in net.named_parameters()}
    for index, steps in seen.items():
        trains = {name for name in names if phases[index].train == "*" or name.startswith("head")}
        assert moved(steps[0], steps[-1]) & names == trains
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in snapshot(net).items()}


def cases() -> Iterator[Any]:
    compiler = pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
    for backend, phases in product(("aot_eager", "inductor"), PHASES):
        sample = (backend, phases) == ("aot_eager", "head first")
        marks = [] if sample else [pytest.mark.slow, pytest.mark.timeout(900)]
        yield pytest.param(backend, phases, marks=[*marks, *([compiler] if backend == "inductor" else [])])


@pytest.mark.parametrize("how", ["module", "method", "LightningModule"])
@pytest.mark.parametrize(("backend", "phases"), list(cases()))
@pytest.mark.filterwarnings("ignore")  # of torch's own, about its compilers
def test_what_was_compiled_while_frozen_trains_when_it_unfreezes(backend: str, phases: str, how: str) -> None:
    expected = fit("not at all", backend, PHASES[phases])
    torch.testing.assert_close(fit(how, backend, PHASES[phases]), expected, rtol=1e-3, atol=1e-5)
