"""What ``configure_optimizers`` makes, without a fit, and the learning rates that its schedulers will set in one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.optim import Optimizer

from lightning_freeze._lightning import LightningModule, LRSchedulerConfig, configured
from lightning_freeze.freezing.holder import ledger_of
from lightning_freeze.schedule.plan import Plan, trainer_of
from lightning_freeze.schedule.schedulers import PhaseSchedulers

Point = tuple[float, float | None]  # a position, and a scale there

_MOST = 200_000  # steps that are gone through
_SHOWN = 300  # of a phase


@dataclass(frozen=True)
class Forecast:
    """The learning rate of each optimizer step, or of each epoch, of a fit."""

    rates: list[float]
    each: float  # how long one of them holds, in the plan's unit

    @property
    def moves(self) -> bool:
        """Whether there are different rates."""
        return len(set(self.rates)) > 1

    def at(self, position: float) -> float:
        """Return the rate at a position of the fit."""
        return self.rates[min(int(position / self.each + 1e-6), len(self.rates) - 1)]

    def edges(self, begin: float, end: float) -> list[float]:
        """Return both positions, and between them where the rate moves; of many a part.

        Example:
            >>> Forecast([0.1, 0.2, 0.3, 0.3], each=2.0).edges(1.0, 8.0)
            [1.0, 2.0, 4.0, 8.0]
        """
        first, last = int(begin / self.each + 1e-6) + 1, math.ceil(end / self.each - 1e-6)
        moves = [number for number in range(first, last) if self.rates[number] != self.rates[number - 1]]
        return [begin, *(number * self.each for number in moves[:: len(moves) // _SHOWN + 1]), end]


def made_optimizers(plan: Plan) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Return the optimizers and schedulers that ``configure_optimizers`` makes; flags that it sets are restored.

    They are none where it needs a fit that is not there.
    """
    parameters = list(plan.parameters.values())
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        return configured(plan.model) if isinstance(plan.model, LightningModule) else ([], [])
    except Exception:  # whatever the user's code raises
        return [], []
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad = flag


def forecast_rates(plan: Plan) -> Forecast | None:
    """Return the learning rate of a whole fit, without scales; None if it is unknown, or groups have different ones.

    It is unknown during a fit, in manual optimization, and where a scheduler counts steps and nobody knows how many an
    epoch has. A ``ReduceLROnPlateau`` leaves the rate alone.
    """
    trainer = trainer_of(plan.model)
    if trainer is not None and ledger_of(trainer) is not None:
        return None  # what configure_optimizers keeps for training_step must stay
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizers, configs = made_optimizers(plan)
        makes = any(plan.phases[index].lr_scheduler not in (None, "restart") for index in plan.reached)
        intervals = {config.interval for config in configs} | ({"step"} if makes else set())
        if not all(map(plan.length.knows, intervals)):
            return None
        # Where nobody knows how many steps an epoch has, it is gone through as one.
        each, per_epoch = (1 / plan.length.size, plan.length.per_epoch) if plan.length.knows("step") else (1.0, 1.0)
        if not optimizers or plan.end / each > _MOST or not getattr(plan.model, "automatic_optimization", False):
            return None
        try:
            return Forecast(list(_simulated(plan, optimizers, configs, each, per_epoch)), each)
        except Exception:  # whatever schedulers raise, as they would in the fit
            return None


def curve(pieces: Iterable[tuple[Point, Point]], rates: Forecast | None) -> Iterator[tuple[float, float, float]]:
    """Yield points of a scale that trains: position, the rate that it makes of the optimizer's, and the scale."""
    for (begin, one), (end, other) in pieces:
        assert one is not None
        assert other is not None
        for left, right in pairwise([begin, end] if rates is None else rates.edges(begin, end)):
            rate = 1.0 if rates is None else rates.at(left)
            for place in (left, right):
                factor = one + (other - one) * (place - begin) / (end - begin)
                yield place, rate * factor, factor


def _simulated(
    plan: Plan, optimizers: Sequence[Optimizer], configs: list[LRSchedulerConfig], each: float, per_epoch: float
) -> Iterator[float]:
    """Yield the learning rate of all groups, step by step, as :class:`PhaseSchedulers` has it in a fit."""
    schedulers = PhaseSchedulers(plan.model, optimizers, configs)  # type: ignore[arg-type]
    begins = {round(begin / each): index for index, (begin, _) in plan.reached.items()}
    for tick in range(math.ceil(plan.end / each - 1e-6)):
        if tick in begins:
            schedulers.begin(plan.phases[begins[tick]], plan.length_of(begins[tick]).phase, anew=True)
        (rate,) = {float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups}
        yield rate
        for config in configs:
            done, before = (tick + 1, tick) if config.interval == "step" else _epochs(tick, per_epoch)
            if done > before and done % config.frequency == 0 and not config.reduce_on_plateau:
                config.scheduler.step()  # type: ignore[call-arg]


def _epochs(tick: int, per_epoch: float) -> tuple[int, int]:
    """Return how many epochs are over after a step, and before it."""
    return int((tick + 1) / per_epoch + 1e-6), int(tick / per_epoch + 1e-6)
