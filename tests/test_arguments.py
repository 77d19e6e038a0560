from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lightning_freeze import GradientAudit, NormLogger, Phase, Plateau, TargetNetwork

# Where users give a number of times: the class, the argument, and an object with it.
TAKERS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("Phase", "epochs", lambda n: Phase("*", epochs=n)),
    ("Plateau", "patience", lambda n: Plateau("loss", patience=n)),
    ("NormLogger", "every_n_steps", lambda n: NormLogger(every_n_steps=n)),
    ("TargetNetwork", "every_n_steps", lambda n: TargetNetwork("a", "b", every_n_steps=n)),
    ("GradientAudit", "every_n_epochs", lambda n: GradientAudit(every_n_epochs=n)),
    ("GradientAudit", "first_n_steps", lambda n: GradientAudit(first_n_steps=n)),
]


@pytest.mark.parametrize(("where", "name", "make"), TAKERS, ids=[f"{where}-{name}" for where, name, _ in TAKERS])
def test_a_whole_number_is_the_same_everywhere(where: str, name: str, make: Callable[[Any], Any]) -> None:
    taken = getattr(make(np.int64(2)), name)
    assert (type(taken), taken) == (int, 2)
    for wrong in (2.0, True, "2"):
        with pytest.raises(TypeError, match=rf"^{where}\({name}={wrong!r}\): {name} is a whole number\.$"):
            make(wrong)
    with pytest.raises(ValueError, match=rf"^{where}\({name}=0\): {name} is at least 1\.$"):
        make(0)


def test_tau_can_be_one_of_numpys() -> None:
    tau = TargetNetwork("a", "b", tau=np.float32(0.5)).tau
    assert (type(tau), tau) == (float, 0.5)
