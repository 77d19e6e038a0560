"""Law 5: checkpoints that keep only what requires grad, and those of version 0.1.0."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import FreezeSchedule, Phase, Plateau, chain_thaw
from tests.devices import Even
from tests.nets import Net, Probe, adamw, loader, moved, same, sgd, snapshot, trainer

LAYERS = ["backbone.0", "backbone.1", "backbone.4", "neck", "head"]
ORDER = ["head", "backbone.0", "backbone.1", "backbone.4", "neck"]  # of chain_thaw


class Small(Even):
    """Keeps in its checkpoints what requires grad and the buffers, as people do."""

    def __init__(self, optimizer: Any = adamw, *, given: str = "all") -> None:
        super().__init__(optimizer=optimizer)
        self.strict_loading = False
        self.given = given

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        flags = {name: p.requires_grad for name, p in self.named_parameters()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if flags.get(k, True)}

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters() if self.given == "all" else self.head.parameters())


def schedule(steps: int | None) -> FreezeSchedule:
    phases = chain_thaw(LAYERS) if steps is None else [Phase(name, steps=steps) for name in ORDER]
    return FreezeSchedule(phases if steps is None else [*phases, Phase("*")], verbose=False)


@pytest.mark.parametrize("given", ["all", "head"])
@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize(("steps", "epochs"), [(None, 7), (4, 5)], ids=["chain_thaw", "phases of four steps"])
def test_trainable_only_checkpoints_resume_exactly(
    tmp_path: Path, steps: int | None, epochs: int, make: Any, given: str
) -> None:
    """The other process begins with other values wherever a phase so far has trained."""
    every: dict[str, Any] = {"every_n_train_steps": 5, "save_on_train_epoch_end": False}
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)
    torch.manual_seed(0)
    whole = Small(make, given=given)
    run = trainer(tmp_path, callbacks=[schedule(steps), saver], max_epochs=epochs, enable_checkpointing=True)
    run.fit(whole, loader(stateful=True))
    stops = [stop for stop in sorted(tmp_path.glob("step=*.ckpt")) if int(stop.stem[5:]) % 6]
    assert len(stops) >= 5
    for stop in stops:
        begun = (int(stop.stem[5:]) - 1) // (steps or 6) + 1
        trained = tuple(f"{name}." for name in ORDER[:begun]) if begun <= len(ORDER) else ("",)
        torch.manual_seed(0)
        resumed = Small(make, given=given)
        with torch.no_grad():
            for name, p in resumed.named_parameters():
                if name.startswith(trained):
                    p.normal_()
        saved = torch.load(stop, weights_only=True)
        if 1 < begun <= len(ORDER):
            assert "head.weight" not in saved["state_dict"]
        fit = trainer(callbacks=[schedule(steps)], max_epochs=epochs)
        fit.fit(resumed, loader(stateful=True), ckpt_path=stop, weights_only=True)
        assert moved(snapshot(whole), snapshot(resumed)) == set(), stop.name


def test_what_a_trainable_only_checkpoint_has_to_keep() -> None:
    """``FreezeSchedule.trained`` names it, for those who keep it themselves."""
    found: list[list[str]] = []
    freezing = schedule(None)
    trainer(callbacks=[freezing, Probe(lambda *_: found.append(freezing.trained))], max_epochs=6).fit(Small(), loader())
    names = [name for name, _ in Net().named_parameters()]
    for batch, kept in enumerate(found):
        begun = batch // 6 + 1
        wanted = (
            names if begun > len(ORDER) else [n for n in names if n.startswith(tuple(f"{o}." for o in ORDER[:begun]))]
        )
        assert kept == wanted


def test_whole_checkpoints_keep_nothing_twice(tmp_path: Path) -> None:
    run = trainer(callbacks=[schedule(None)], max_epochs=1)

    class Saves(Net):
        def on_train_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "during.ckpt")

    run.fit(Saves(), loader())
    assert torch.load(tmp_path / "during.ckpt")["callbacks"]["FreezeSchedule"]["trained"] == {}


@pytest.mark.parametrize("breaks", [False, True], ids=["after the fit", "on an exception"])
def test_what_came_frozen_is_in_a_file_written_after_the_fit(tmp_path: Path, breaks: bool) -> None:
    """By then its flags are as they came, so the module leaves it out."""

    class CameFrozen(Small):
        stops_at = 0

        def __init__(self) -> None:
            super().__init__(sgd)
            self.backbone.requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == self.stops_at:
                raise RuntimeError("power cut")

    def run(stops_at: int = 0, epochs: int = 4, path: Path | None = None) -> CameFrozen:
        torch.manual_seed(0)
        net = CameFrozen()
        net.stops_at = stops_at
        phases = [Phase("head", epochs=1), Phase("backbone", epochs=1), Phase("*")]
        saver = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True, every_n_epochs=9)
        callbacks = [FreezeSchedule(phases, verbose=False), saver]
        fit = trainer(tmp_path, callbacks=callbacks, max_epochs=epochs, enable_checkpointing=True)
        with pytest.raises(RuntimeError, match="power cut") if stops_at else contextlib.nullcontext():
            fit.fit(net, loader(stateful=True), ckpt_path=path, weights_only=True)
        if epochs < 4:
            fit.save_checkpoint(tmp_path / "last.ckpt")
        return net

    run(stops_at=14) if breaks else run(epochs=2)
    assert "backbone.0.weight" not in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert moved(snapshot(run()), snapshot(run(path=tmp_path / "last.ckpt"))) == set()


# Version 0.1.0


PHASES = [
    Phase("head", until=Plateau("val_loss", patience=1, min_delta=9.0)),
    Phase("*", epochs=1, lr_scale={"backbone": 0.1}),
    Phase("neck", steps=4),
    Phase("*"),
]


def head_only(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(params)[-2:], lr=1e-2)


def finished(net: Net, epochs: int, tmp_path: Path, resume: Path | None = None) -> tuple[Any, Path]:
    freezing = FreezeSchedule(PHASES, verbose=False)
    run = trainer(callbacks=[freezing], max_epochs=epochs)
    run.fit(net, loader(), loader(), ckpt_path=resume, weights_only=True)
    run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
    state = [net.state_dict(), run.optimizers[0].state_dict(), freezing.history, run.global_step]
    return copy.deepcopy(state), tmp_path / f"{epochs}.ckpt"


def as_of_first_version(path: Path, adopted: list[str] = []) -> Path:  # noqa: B006
    """Rewrite a checkpoint as 0.1.0 had it: the callback's state is where it is, and no more."""
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["FreezeSchedule"]
    checkpoint["callbacks"]["FreezeSchedule"] = {key: state[key] for key in ("history", "plateau", "schedule")}
    if adopted:
        (optimizer,) = checkpoint["optimizer_states"]
        first = optimizer["param_groups"][0]
        numbers = list(range(len(first["params"]), len(first["params"]) + len(adopted)))
        optimizer["param_groups"].append({**first, "params": numbers, "adopted": adopted})
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_checkpoints_of_the_first_version_resume(tmp_path: Path, epochs: int) -> None:
    """To the bit, in every phase."""
    torch.manual_seed(0)
    whole, _ = finished(Even(optimizer=adamw), 5, tmp_path)
    torch.manual_seed(0)
    _, path = finished(Even(optimizer=adamw), epochs, tmp_path)
    resumed, _ = finished(Even(optimizer=adamw), 5, tmp_path, as_of_first_version(path))
    assert same(resumed, whole)


def test_checkpoints_of_the_first_version_with_adopted_parameters_are_refused(tmp_path: Path) -> None:
    """In a sentence, and before anything of the optimizer is loaded."""
    _, path = finished(Even(optimizer=head_only), 2, tmp_path)
    path = as_of_first_version(path, ["neck.weight", "neck.bias"])
    with pytest.raises(MisconfigurationException, match=r"lightning-freeze 0\.1\.0 wrote this checkpoint.*end the fit"):
        finished(Even(optimizer=head_only), 3, tmp_path, path)
    again = Even(optimizer=head_only)
    finished(again, 1, tmp_path)  # it trains all the same
    assert all(p.requires_grad for p in again.parameters())
