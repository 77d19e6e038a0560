"""Laws 1 to 8 on a device, in each setting of ``fits.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gpu.fits import SETTINGS, Evidence, NotHereError, evidence, fit
from tests.nets import same

STATISTICS = {
    f"backbone.{layer}.{name}" for layer in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")
}
# A convolution in front of a BatchNorm gets no gradient for its bias, up to rounding.
NO_GRADIENT = {"backbone.0.bias", "backbone.4.bias"}


def frozen_means_frozen(name: str, found: Evidence) -> None:
    assert [index for index, *_ in found.whole.phases] == [0, 1, 2, 3]
    for index, trains, changed in found.whole.phases:
        allowed = trains | (STATISTICS if index in (0, 3) else set())
        assert changed <= allowed, f"phase {index + 1} moves {sorted(changed - allowed)}"


def trained_means_trained(name: str, found: Evidence) -> None:
    exempt = NO_GRADIENT | ({"backbone.1.weight", "backbone.5.weight"} if SETTINGS[name].rounds else set())
    for index, trains, changed in found.whole.phases:
        assert trains - changed <= exempt, f"phase {index + 1} does not move {sorted(trains - changed - exempt)}"
    if "accumulate" not in name:
        assert not set().union(*found.whole.gradients), "gradients are not those of what trains"


def groups_are_the_users(name: str, found: Evidence) -> None:
    groups = [shown for shown in found.whole.groups if shown != found.whole.groups[0]]
    assert not groups, f"groups were {found.whole.groups[0]}, then {groups[0]}"


def checkpoint_is_the_users(name: str, found: Evidence) -> None:
    ours, plain = (c["optimizer_states"] for c in (found.checkpoint, found.plain_checkpoint))
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine["state"].keys() <= theirs["state"].keys()
        assert [group.keys() for group in mine["param_groups"]] == [group.keys() for group in theirs["param_groups"]]
        for key, state in mine["state"].items():
            assert state.keys() == theirs["state"][key].keys()
    assert found.checkpoint["state_dict"].keys() == found.plain_checkpoint["state_dict"].keys()


def resume_is_exact(name: str, found: Evidence) -> None:
    for stop, seen in found.resumed.items():
        for key, value in found.whole.end.items():
            assert same(seen.end[key], value), f"{key} differs after a resume from {stop}"


def replicas_agree(name: str, found: Evidence, device: str) -> None:
    """One process of DDP does what no DDP does, through a wrapper that is built anew at transitions."""
    if SETTINGS[name].net.__name__ == "TwoOptimizers":
        raise NotHereError("with two optimizers DDP wants find_unused_parameters, which is not what is tested")
    distributed = fit(SETTINGS[name], device, strategy="ddp", use_distributed_sampler=False)
    for key, value in found.whole.end.items():
        assert same(distributed.end[key], value), f"{key} differs under DDP"


def nothing_stays_behind(name: str, found: Evidence) -> None:
    for seen in (found.whole, *found.resumed.values(), found.observed):
        assert not seen.left, "; ".join(seen.left[:3])


def observation_changes_nothing(name: str, found: Evidence) -> None:
    for key, value in found.whole.end.items():
        assert same(found.observed.end[key], value), f"{key} differs with NormLogger, MetricLogger and GradientAudit"


def state_is_where_it_should_be(name: str, found: Evidence, device: str) -> None:
    """Offloaded state is on the CPU while its parameter is frozen, and on the device when that trains."""
    offloads = SETTINGS[name].policy == "offload"
    for index, places in found.whole.state_devices.items():
        wrong = {place for place in places if place[1] != (device if place[0] or not offloads else "cpu")}
        assert not wrong, f"phase {index + 1}: (trains, device) of state is {wrong}"


def loads_without_us(name: str, device: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        fit(SETTINGS[name], device, Path(place))
        fit(SETTINGS[name], device, frozen=False, resume=Path(place, "epoch=1.ckpt"))


LAWS: dict[str, Callable[..., None]] = {
    "law 1, frozen means frozen": frozen_means_frozen,
    "law 2, trained means trained": trained_means_trained,
    "law 3, groups are the user's": groups_are_the_users,
    "law 4, checkpoints are the user's": checkpoint_is_the_users,
    "law 5, resume is exact": resume_is_exact,
    "law 6, DDP of one process": replicas_agree,
    "law 7, nothing stays behind": nothing_stays_behind,
    "law 8, observation changes nothing": observation_changes_nothing,
    "optimizer state is on its device": state_is_where_it_should_be,
}


def law(setting: str, check: Callable[..., None]) -> Callable[[str], None]:
    """A check of one law in one setting, for a device."""

    def run(device: str) -> None:
        more: dict[str, Any] = {"device": device} if "device" in check.__annotations__ else {}
        check(setting, evidence(setting, device), **more)

    return run


CHECKS: dict[str, Callable[[str], Any]] = {
    f"{setting}: {name}": law(setting, check) for setting in SETTINGS for name, check in LAWS.items()
}
CHECKS["float32: a checkpoint loads without us"] = lambda device: loads_without_us("float32", device)
CHECKS["16-mixed: a checkpoint loads without us"] = lambda device: loads_without_us("16-mixed", device)
