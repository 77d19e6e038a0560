"""What ``configure_optimizers`` makes, without a fit, and the learning rates that its schedulers will set in one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from lightning_freeze._lightning import LightningModule, LRSchedulerConfig, configured
from lightning_freeze.schedule.plan import Plan
from lightning_freeze.schedule.schedulers import PhaseSchedulers

_MOST = 200_000  # steps that are gone through
_SHOWN = 300  # of a phase


@dataclass(frozen=True)
class Forecast:
    """The learning rate of each optimizer step, or of each epoch, of a fit."""

    rates: list[float]
    each: float  # the steps for which one of them holds

    def at(self, step: float) -> float:
        """Return the rate in a step of the fit."""
        return self.rates[min(int(step / self.each), len(self.rates) - 1)]

    def edges(self, begin: float, end: float) -> list[float]:
        """Return both steps, and between them where the rate moves; of many a part."""
        numbers = range(int(begin / self.each) + 1, math.ceil(end / self.each))
        moves = [number for number in numbers if self.rates[number] != self.rates[number - 1]]
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
    if plan.ledger is not None:
        return None  # what configure_optimizers keeps for training_step must stay
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizers, configs = made_optimizers(plan)
        makes = any(part.phase.lr_scheduler not in (None, "restart") for part in plan.reached)
        intervals = {config.interval for config in configs} | ({"step"} if makes else set())
        # Where nobody knows how many steps an epoch has, it is gone through as one.
        each = 1 if plan.length.knows("step") else plan.length.per_epoch
        is_known = all(map(plan.length.knows, intervals)) and getattr(plan.model, "automatic_optimization", False)
        if not optimizers or not is_known or plan.end / each > _MOST:
            return None
        try:
            return Forecast(list(_simulated(plan, optimizers, configs, each)), each)
        except Exception:  # whatever schedulers raise, as they would in the fit
            return None


def _simulated(
    plan: Plan, optimizers: Sequence[Optimizer], configs: list[LRSchedulerConfig], each: float
) -> Iterator[float]:
    """Yield the learning rate of all groups, step by step, as :class:`PhaseSchedulers` has it in a fit."""
    schedulers = PhaseSchedulers(plan.model, optimizers, configs)  # type: ignore[arg-type]
    begins = {round(part.begin / each): part for part in plan.reached}
    for tick in range(math.ceil(plan.end / each)):
        if (part := begins.get(tick)) is not None:
            schedulers.begin(part.phase, part.lasts.phase, anew=True)
        (rate,) = {float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups}
        yield rate
        for config in configs:
            size = 1 if config.interval == "step" else plan.length.per_epoch / each
            done = (tick + 1) // size
            if done > tick // size and done % config.frequency == 0 and not config.reduce_on_plateau:
                config.scheduler.step()  # type: ignore[call-arg]
