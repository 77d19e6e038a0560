"""The arguments of a target network, checked."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

from lightning_freeze.words import whole_number


def check_names(source: object, target: object) -> None:
    """Refuse what cannot be the dotted names of two modules, neither of them in the other."""
    for role, name in (("source", source), ("target", target)):
        if not isinstance(name, str):
            raise TypeError(f"TargetNetwork({role}={name!r}): it is the dotted name of a module, such as {role!r}.")
        if not name:
            raise ValueError(f"TargetNetwork({role}=''): name a module inside the LightningModule, such as {role!r}.")
    if source == target:
        raise ValueError(f"TargetNetwork({source!r}, {target!r}): a module cannot follow itself. Name its copy.")
    for inner, outer in ((source, target), (target, source)):
        if str(inner).startswith(f"{outer}."):
            raise ValueError(
                f"TargetNetwork({source!r}, {target!r}): {inner!r} is inside {outer!r}, so it would be part of its own "
                "copy. Keep the two side by side."
            )


def checked_pace(
    tau: float | Callable[[int], float] | None, every_n_steps: int | None
) -> tuple[float | Callable[[int], float] | None, int | None]:
    """Return ``tau`` and ``every_n_steps`` as plain numbers, also if they are NumPy's."""
    if (tau is None) == (every_n_steps is None):
        raise ValueError(
            f"TargetNetwork(tau={tau!r}, every_n_steps={every_n_steps!r}): give one of the two, tau=0.005 for a "
            "Polyak average after every step, or every_n_steps=1000 for a copy after so many."
        )
    if every_n_steps is not None:
        return None, whole_number("TargetNetwork", "every_n_steps", every_n_steps)
    return tau if callable(tau) else checked_tau("TargetNetwork", tau), None


def checked_tau(where: str, tau: object) -> float:
    """Return ``tau`` as a float, also if it is one of NumPy's."""
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(
            f"{where}(tau={tau!r}): it is a number in [0, 1], for example 0.005, or a function of the step."
        )
    if not 0 <= float(tau) <= 1:
        raise ValueError(f"{where}(tau={tau!r}): it is in [0, 1], for example 0.005. 1 copies, 0 stays.")
    return float(tau)
