"""Learning rate schedulers of a phase's own, in the place of the user's, which rest meanwhile."""

from __future__ import annotations

import copy
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_freeze._lightning import LightningModule, LRSchedulerConfig, MisconfigurationException, scheduler_configs
from lightning_freeze.freezing.step_view import is_rate
from lightning_freeze.schedule.arguments import shown_value
from lightning_freeze.schedule.phases import Phase

Options = dict[str, Any]

# What a scheduler leaves on an optimizer to tell whether that has stepped.
_TRACES = ("step", "_opt_called")
# What schedulers call the steps that they last.
_STEPS = ("steps", "total_steps", "T_max", "total_iters", "num_training_steps")


@dataclass(frozen=True)
class _Rates:
    """Schedulers, what they set in optimizers, and the traces that they leave there."""

    configs: list[LRSchedulerConfig]
    options: dict[Optimizer, list[Options]]
    traces: dict[Optimizer, Options]

    @classmethod
    def of(cls, optimizers: Sequence[Optimizer], configs: Iterable[LRSchedulerConfig]) -> _Rates:
        traces = {one: {name: vars(one)[name] for name in _TRACES if name in vars(one)} for one in optimizers}
        return cls(list(configs), {one: _scheduled_options(one) for one in optimizers}, traces)


class PhaseSchedulers:
    """Puts a phase's own schedulers in the place of the user's, which rest until the phase is over.

    ``module`` has configured them; ``configs`` is the list itself by which they are stepped.
    """

    def __init__(
        self, module: LightningModule, optimizers: Sequence[Optimizer], configs: list[LRSchedulerConfig]
    ) -> None:
        self.optimizers = optimizers
        self.saved: dict[Optimizer, Options] = {}  # what a checkpoint holds of the phase's own, until they take it over
        self._module, self._configs = module, configs
        self._states = [copy.deepcopy(config.scheduler.state_dict()) for config in configs]
        self._rest: _Rates | None = None
        self._own: list[LRSchedulerConfig] = []
        self.take_as_first()

    def take_as_first(self) -> None:
        """Take the rates that there are as those that the optimizers were given: tuners set some before the fit."""
        self.end()
        self._first = _Rates.of(self.optimizers, self._configs)

    def check(self, phases: Sequence[Phase], steps: Callable[[Phase], int | None]) -> None:
        """Make the schedulers of all phases once, so that what one refuses is found at fit start."""
        for phase in [phase for phase in phases if phase.lr_scheduler is not None]:
            where = f"Phase {phase.label!r} has lr_scheduler={shown_value(phase.lr_scheduler)}"
            if phase.lr_scheduler == "restart" and not self._first.configs:
                raise MisconfigurationException(f"{where}, but configure_optimizers returns no scheduler.")
            try:
                self.begin(phase, steps(phase))
            except Exception as error:
                raise MisconfigurationException(f"{where}, which cannot be made: {error}") from error
            finally:
                self.end()

    def begin(self, phase: Phase, steps: int | None, *, anew: bool = False) -> None:
        """Have the schedulers of a phase's own go on, or else the user's.

        ``steps`` is how many the phase lasts at most, ``anew`` whether it begins here and now.
        """
        self.end()
        saved, self.saved = self.saved, {}
        if phase.lr_scheduler in (None, "restart"):
            if anew and phase.lr_scheduler == "restart":
                for config, state in zip(self._first.configs, self._states, strict=True):
                    config.scheduler.load_state_dict(copy.deepcopy(state))
                _set_options(self._first.options)
            return
        assert steps is not None  # else it was refused
        self._rest = _Rates.of(self.optimizers, self._configs)
        _set_options({one: map(_without_scheduler, options) for one, options in self._first.options.items()})
        made = [_make_scheduler(phase, optimizer, steps) for optimizer in self._driven()]
        self._configs[:] = self._own = scheduler_configs(self._module, made)
        for optimizer in self.optimizers:  # else torch warns where one is exchanged, which is seen in its first step
            vars(optimizer)["_opt_called"] = True
        for optimizer, state in saved.items():
            for config, own in zip(self._own_of(optimizer), state["schedulers"], strict=False):
                config.scheduler.load_state_dict(own)
            _set_options({optimizer: state["options"]})

    def end(self) -> None:
        """Have the user's schedulers go on from where they began to rest."""
        if self._rest is None:
            return
        if self._configs == self._own:  # else somebody has exchanged them too
            self._configs[:] = self._rest.configs
        _set_options(self._rest.options)
        for optimizer, traces in self._rest.traces.items():
            for name in _TRACES:
                vars(optimizer).pop(name, None)
            vars(optimizer).update(traces)
        self._rest, self._own = None, []

    def state(self, optimizer: Optimizer) -> dict[str, Options]:
        """Return what a checkpoint has to hold of the phase's own schedulers of an optimizer, empty without any."""
        if self._rest is None:
            return {"rates": self.saved[optimizer]} if optimizer in self.saved else {}
        schedulers = [config.scheduler.state_dict() for config in self._own_of(optimizer)]
        return {"rates": {"schedulers": schedulers, "options": _scheduled_options(optimizer)}}

    def as_the_users(self, checkpoint: dict[str, Any]) -> None:
        """Have a checkpoint hold the user's schedulers and options, as they rest."""
        if self._rest is None:
            return
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in self._rest.configs]
        for state, options in zip(checkpoint["optimizer_states"], self._rest.options.values(), strict=True):
            # FSDP gathers states on one process only.
            for number, (group, own) in enumerate(zip(state.get("param_groups", []), options, strict=False)):
                others = {key: value for key, value in group.items() if not is_scheduled(key)}
                state["param_groups"][number] = {**others, **own}

    def _driven(self) -> Sequence[Optimizer]:
        """Return the optimizers that get a scheduler, in the order in which the user's code finds schedulers."""
        if self._module.automatic_optimization:
            return self.optimizers
        driven = [config.scheduler.optimizer for config in self._first.configs]
        if not driven or len(set(driven)) < len(driven):
            raise ValueError(
                "in manual optimization your training_step steps what self.lr_schedulers() returns, so "
                "configure_optimizers has to return one scheduler for each optimizer that a phase's shall drive."
            )
        return driven

    def _own_of(self, optimizer: Optimizer) -> list[LRSchedulerConfig]:
        return [config for config in self._own if config.scheduler.optimizer is optimizer]


def _make_scheduler(phase: Phase, optimizer: Optimizer, steps: int) -> dict[str, Any]:
    """Return the scheduler of a phase's own for an optimizer, as ``configure_optimizers`` may return one."""
    make: Any = phase.lr_scheduler
    by_name = isinstance(make, Mapping) or isinstance(getattr(make, "func", make), type)
    options: Options = {}
    if isinstance(make, Mapping):
        options = {key: value for key, value in make.items() if key not in ("class_path", "init_args")}
        make = partial(pkgutil.resolve_name(make["class_path"]), **(make.get("init_args") or {}))
    if by_name:  # by place the steps could be a ``gamma``
        takes = [name for name in _STEPS if name in inspect.signature(make).parameters]
        is_told = any(name in getattr(make, "keywords", ()) for name in takes)
        made = make(optimizer, **({} if is_told else dict.fromkeys(takes[:1], steps)))
    else:
        made = make(optimizer, steps)
    made = {**(made if isinstance(made, Mapping) else {"scheduler": made}), **options}
    # A metric comes once a validation run, so this one would count stale values.
    interval = "epoch" if isinstance(made.get("scheduler"), ReduceLROnPlateau) else "step"
    return {"interval": interval, **made}


def is_scheduled(option: str) -> bool:
    """Return whether an option of a parameter group is one that schedulers set, and not an optimizer's running sum."""
    return is_rate(option) or option in ("betas", "weight_decay") or option.endswith("momentum")


def _scheduled_options(optimizer: Optimizer) -> list[Options]:
    """Return, for each group, a copy of the options that schedulers set."""
    return [
        {option: copy.deepcopy(value) for option, value in group.items() if is_scheduled(option)}
        for group in optimizer.param_groups
    ]


def _set_options(options: Mapping[Optimizer, Iterable[Options]]) -> None:
    """Set, for each group, what :func:`_scheduled_options` has returned, and remove other options of the kind."""
    for optimizer, groups in options.items():
        for group, own in zip(optimizer.param_groups, groups, strict=False):
            for option in [option for option in group if is_scheduled(option) and option not in own]:
                del group[option]
            for option, value in own.items():
                if isinstance(mine := group.get(option), Tensor):
                    mine.copy_(value)  # in place: captured graphs hold on to a rate that is a tensor
                else:
                    group[option] = copy.deepcopy(value)


def _without_scheduler(options: Options) -> Options:
    """Return options with the learning rate that a group had before a scheduler was made for it."""
    others = {option: value for option, value in options.items() if option != "initial_lr"}
    return others if len(others) == len(options) else {**others, "lr": options["initial_lr"]}
