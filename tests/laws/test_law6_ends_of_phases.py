"""Law 6 for what ends phases: ranks that see other things move together, and their replicas agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lightning_freeze import FreezeSchedule, Phase, Plateau
from tests.devices import Even, Watch, share
from tests.nets import snapshot, trainer
from tests.replicas import WORLD, on_two_processes

BEST = Plateau("score", patience=2, restore_best=True)


class Uneven(Even):
    """Its metric is another on each rank, and rank 1 alone asks for the next phase."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (schedule,) = [one for one in self.trainer.callbacks if isinstance(one, FreezeSchedule)]
        if dist.get_rank() == 1 and self.trainer.global_step in (3, 9) and schedule.phase.name == "asks":
            schedule.next_phase()
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        score = abs(self.trainer.global_step - 6.0)
        self.log("score", score + 1 if dist.get_rank() == 0 else 2 * score)


def grown(trainer: Trainer, pl_module: LightningModule) -> bool:
    return dist.get_rank() == 1 and trainer.global_step % 7 == 5


CASES: dict[str, Any] = {
    "restore_best": [Phase(["head", "backbone"], until=BEST), Phase("*", until=BEST)],
    "function": [Phase("head", until=grown), Phase("*", until=grown)],
    "next_phase": [Phase("head", name="asks", epochs=5), Phase("*", name="asks", epochs=5)],
    "fraction": [Phase("head", fraction=0.25), Phase("*", fraction=0.5)],
}
# Steps at which each phase, and the fit, ends; there are 24.
ENDS = {"restore_best": (12, 21), "function": (5, 12), "next_phase": (4, 10), "fraction": (6, 18)}


def every_case() -> dict[str, Any]:
    found = {}
    for name, phases in CASES.items():
        torch.manual_seed(0)
        net, watch, schedule = Uneven(), Watch(), FreezeSchedule(phases, verbose=False)
        options: dict[str, Any] = {"strategy": "ddp", "devices": WORLD, "use_distributed_sampler": False}
        options |= {"max_epochs": 4, "val_check_interval": 3, "callbacks": [schedule, watch]}
        shots: dict[int, Any] = {}
        net.on_phase_end = lambda *_, net=net, shots=shots: shots.update({len(shots): snapshot(net)})  # type: ignore
        run = trainer(**options)
        run.fit(net, share(), share())
        found[name] = {
            "history": [(*begin, begin.why) for begin in schedule.history],
            "steps": run.global_step,
            "differ": watch.differ,
            "ends": shots,
        }
    return found


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(every_case, tmp_path_factory.mktemp("law6"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_move_together_and_replicas_agree(on_two: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in on_two)
    assert first["history"] == second["history"]
    for rank in (first, second):
        assert (rank["history"][1][1], rank["steps"]) == ENDS[name]
        assert not any(name for names in rank["differ"] for name in names if "running" not in name)
    assert first["ends"].keys() == second["ends"].keys() == {0, 1}
    for index, weights in first["ends"].items():
        assert all(torch.equal(value, second["ends"][index][key]) for key, value in weights.items() if "run" not in key)


def test_why_a_phase_ended_is_the_same_on_ranks_that_had_nothing_to_say(on_two: list[dict[str, Any]]) -> None:
    for rank in on_two:
        whys = {name: rank[name]["history"][1][3] for name in CASES}
        assert whys == {
            "restore_best": "score had no better value than 0.5 for 2 looks",
            "function": "grown",
            "next_phase": "next_phase()",
            "fraction": "6 steps",
        }
