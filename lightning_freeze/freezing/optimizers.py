"""Home groups: an optimizer that holds what trains and only that, while its checkpoint stays the user's own.

A parameter's *home* is the group, and the place in it, that the user gave it. Freezing takes it out of the group's
list, unfreezing puts it back in its place. Number and order of the groups never change after fit start, so LR
schedulers keep working, and around saving and loading the lists are whole, so a checkpoint does not show that anything
was frozen.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import LBFGS, Optimizer

from lightning_freeze.freezing.schedulers import (
    MEMBERS,
    Scheduler,
    first_groups,
    follow_groups,
    is_rate,
    lists_apart,
    scaled,
    scaled_rates,
    schedulers_of,
)
from lightning_freeze.selectors import Selector, named_unique_parameters, resolve, selector_text

OptimizerState = Literal["keep", "drop", "offload"]


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose groups cannot be edited.

    Raises:
        ValueError: If it is LBFGS or ZeroRedundancyOptimizer.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS flattens its parameters into one vector when it is built, so none can freeze later. "
            "Use another optimizer, or freeze by hand before configure_optimizers and leave FreezeSchedule out."
        )
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise ValueError(
            "ZeroRedundancyOptimizer deals its parameters out to the ranks when it is built, so none can freeze later. "
            "Use the optimizer inside of it with strategy='ddp', or ModelParallelStrategy (FSDP2), which shards "
            "optimizer states too."
        )


def homeless(optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Give the parameters that no optimizer holds, compared by identity."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) not in held}


def strangers(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Give the parameters that optimizers hold and that are none of ``parameters``, compared by identity."""
    known = {id(parameter) for parameter in parameters}
    held = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    return [parameter for parameter in held if id(parameter) not in known]


@dataclass
class _Home:
    """The whole of one group: every member in the user's order, and their names if the user gave names."""

    params: list[nn.Parameter]
    names: list[str] | None


@dataclass
class _Follower:
    """A group appended to the user's: options come from ``source``, learning rates times the phase's scale."""

    source: int
    scales: tuple[float, ...]
    group: dict[str, Any]
    scale: float = 1.0


class _Covered:
    """Methods of one object, covered by others until :meth:`remove`."""

    def __init__(self, owner: object, **methods: Callable[..., Any]) -> None:
        self._attributes = vars(owner)
        self._before = {name: self._attributes[name] for name in methods if name in self._attributes}
        self._names = list(methods)
        self._attributes.update(methods)

    def remove(self) -> None:
        """Show the object's own methods again."""
        for name in self._names:
            self._attributes.pop(name, None)
        self._attributes.update(self._before)


def _saves_as_torch_does(optimizer: Optimizer) -> bool:
    """Whether saving and loading are torch's own, which call hooks."""
    names = ("state_dict", "load_state_dict")
    return all(getattr(getattr(optimizer, name), "__func__", None) is getattr(Optimizer, name) for name in names)


class HomeGroups:
    """An optimizer's groups, of which at any time only what trains shows.

    Parameters the user's optimizer never had are adopted, once, by a group cloned from the first one. Parameters that
    some phase gives another learning rate than their group's are shown in groups of their own, behind the user's; the
    user's group stays in its place, if need be empty, as the one that scheduler and user change and the others follow.

    Args:
        optimizer: Any that :func:`check_optimizer` accepts, with all parameters in its groups.
        holders: LR schedulers, or what may have some in attributes; see :func:`schedulers_of`.
        scales: For each phase, the identity of each parameter whose learning rate is scaled, and its factor.
        adopt: Name to parameter, for what the optimizer shall take in.
        optimizer_state: What becomes of a parameter's state when it freezes: ``"keep"``, ``"drop"``, or ``"offload"``
            to the CPU until it trains again.

    Raises:
        ValueError: If :func:`check_optimizer` refuses the optimizer, or it has no learning rate where one is scaled.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> homes = HomeGroups(sgd)
        >>> homes.apply(0, trains={id(net[1].weight)})
        >>> len(sgd.param_groups[0]["params"]), len(sgd.state_dict()["param_groups"][0]["params"])
        (1, 2)
        >>> homes.release()
        >>> len(sgd.param_groups[0]["params"])
        2
    """

    def __init__(
        self,
        optimizer: Optimizer,
        holders: Sequence[object] = (),
        *,
        scales: Sequence[Mapping[int, float]] = ({},),
        adopt: Mapping[str, nn.Parameter] | None = None,
        optimizer_state: OptimizerState = "keep",
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self._policy = optimizer_state
        self._stays_whole = False
        self._own = len(optimizer.param_groups)
        self._homes = [
            _Home(list(group["params"]), list(group["param_names"]) if "param_names" in group else None)
            for group in optimizer.param_groups
        ]
        self._adopted = list(adopt or {})
        self._followers: list[_Follower] = []
        self._trains = {id(parameter) for home in self._homes for parameter in home.params}
        self._offloaded: dict[nn.Parameter, dict[str, torch.device]] = {}
        if adopt:
            self._adopt(adopt, len(scales))
        # For each group that shows: its home, and which places in it are its members.
        self._members = [(home, list(range(len(home.params)))) for home in self._homes]
        for index in range(len(self._homes)):
            self._split(index, scales)
        optimizer.param_groups.extend(follower.group for follower in self._followers)
        self.follow()
        self._schedulers = schedulers_of(optimizer, holders)
        try:
            self._apart = lists_apart(self._schedulers, self._own, self._followers)
        except ValueError:
            del optimizer.param_groups[self._own :]
            raise
        #: Whether a step calls hooks for sure; otherwise :meth:`follow` has to be called before it.
        self.calls_hooks: bool = getattr(optimizer.step, "hooked", False)
        self._handles = self._hook_states() if _saves_as_torch_does(optimizer) else [self._cover_states()]
        if self._followers:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.follow()))

    @property
    def group_count(self) -> int:
        """How many groups the optimizer's checkpoint has: the user's, and one more if parameters were adopted."""
        return len(self._homes)

    @property
    def adds_groups(self) -> bool:
        """Whether there are groups behind the user's."""
        return bool(self._followers)

    def apply(self, phase: int, trains: Collection[int]) -> None:
        """Show what trains in a phase, and only that, with the phase's learning rate scales.

        Args:
            phase: The index of the phase in ``scales``.
            trains: The identity of each parameter that trains.
        """
        self._trains = set(trains)
        for follower in self._followers:
            follower.scale = follower.scales[phase]
        self._make_whole()
        self._show()
        self._settle_state()
        self._extend_lists(self._followers)

    def scheduler_state(self, scheduler: Scheduler) -> dict[str, Any]:
        """Give a scheduler's ``state_dict()`` with the entries of the groups that the optimizer's checkpoint has."""
        if not self._followers:
            return scheduler.state_dict()
        with first_groups(scheduler, self.group_count, self._apart):
            return scheduler.state_dict()

    def follow(self) -> None:
        """Give each appended group the options of the group it follows, learning rates times its scale."""
        groups = self.optimizer.param_groups
        for follower in self._followers:
            mine, scale = follower.group, follower.scale
            known = mine.get
            for key, value in groups[follower.source].items():
                # This runs twice in a step: what both groups already share is passed over.
                if known(key, mine) is value and (scale == 1.0 or not is_rate(key)):
                    continue
                if key in MEMBERS:
                    continue
                wanted = scaled(value, scale) if is_rate(key) else value
                if isinstance(wanted, Tensor) and isinstance(known(key), Tensor):
                    with torch.no_grad():
                        mine[key].copy_(wanted)
                else:
                    mine[key] = wanted

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Show everything for the time of the context, for those who name parameters around a ``state_dict()``."""
        self._make_whole()
        before, self._stays_whole = self._stays_whole, True
        try:
            yield
        finally:
            self._stays_whole = before
            self._show()

    def release(self) -> None:
        """Give the optimizer back whole: the user's groups, and that of the adopted parameters."""
        for handle in self._handles:
            handle.remove()
        groups, shown = self.optimizer.param_groups, self._own + len(self._followers)
        added = groups[shown:]  # by somebody else: refused as long as the fit is on, but not lost
        del groups[shown:]
        self._make_whole()
        groups.extend(added)
        for home in self._homes:
            for parameter in home.params:
                self._reload(parameter)
        self._extend_lists(self._followers[: self.group_count - self._own])

    def _extend_lists(self, followers: Sequence[_Follower]) -> None:
        for scheduler in self._schedulers:
            follow_groups(scheduler, self._own, followers, self._apart)

    def _adopt(self, parameters: Mapping[str, nn.Parameter], phases: int) -> None:
        names, members = list(parameters), list(parameters.values())
        home = _Home(members, names if self._homes and self._homes[0].names is not None else None)
        group = {"params": list(members), "adopted": names}
        if home.names is not None:
            group["param_names"] = list(names)
        if "name" in self.optimizer.param_groups[0]:
            group["name"] = "adopted"
        self._homes.append(home)
        self._follow_with(group, source=0, scales=(1.0,) * phases)

    def _split(self, index: int, scales: Sequence[Mapping[int, float]]) -> None:
        home = self._homes[index]
        places: dict[tuple[float, ...], list[int]] = {}
        for place, parameter in enumerate(home.params):
            places.setdefault(tuple(scale.get(id(parameter), 1.0) for scale in scales), []).append(place)
        unscaled = (1.0,) * len(scales)
        self._members[index] = (home, places.pop(unscaled, []))
        adopted = index >= self._own
        source = 0 if adopted else index
        if places:
            self._check_rate(source)
        name = (self._followers[0].group if adopted else self.optimizer.param_groups[index]).get("name")
        for number, (factors, members) in enumerate(places.items(), 1):
            group: dict[str, Any] = {"params": []}
            if home.names is not None:
                group["param_names"] = []
            if name is not None:
                group["name"] = f"{name}/scaled-{number}"
            self._follow_with(group, source=source, scales=factors)
            self._members.append((home, members))

    def _check_rate(self, index: int) -> None:
        group = self.optimizer.param_groups[index]
        rates = [value for key, value in group.items() if is_rate(key)]
        if not isinstance(group.get("lr", next(iter(rates), None)), numbers.Real | Tensor):
            raise ValueError(
                f"lr_scale scales lr, which is {repr(group['lr']) if 'lr' in group else 'not there'} in group {index} "
                f"of {type(self.optimizer).__name__}. Give it an lr that is a number, or leave lr_scale out."
            )

    def _follow_with(self, group: dict[str, Any], source: int, scales: tuple[float, ...]) -> None:
        self._followers.append(_Follower(source, scales, group, scales[0]))

    def _make_whole(self) -> None:
        groups = self.optimizer.param_groups
        if len(groups) > self._own + len(self._followers):
            raise ValueError(
                "A group was added to the optimizer during the fit, which FreezeSchedule cannot follow. Give the "
                "optimizer all parameters in configure_optimizers and let a phase say from when on they train."
            )
        del groups[len(self._homes) :]
        for group, home in zip(groups, self._homes, strict=False):
            group["params"][:] = home.params
            if home.names is not None:
                group["param_names"] = list(home.names)

    def _show(self) -> None:
        if self._stays_whole:
            return
        groups = self.optimizer.param_groups
        for position, follower in enumerate(self._followers, self._own):
            if position < len(groups):
                follower.group = groups[position]  # loading a checkpoint makes new dicts
            else:
                groups.append(follower.group)
        for group, (home, places) in zip(groups, self._members, strict=True):
            shown = [place for place in places if id(home.params[place]) in self._trains]
            group["params"][:] = [home.params[place] for place in shown]
            if home.names is not None:
                group["param_names"] = [home.names[place] for place in shown]
        self.follow()

    def _hook_states(self) -> list[Any]:
        def before_load(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            self._make_whole()
            return fit_adopted(state, self._own, self._adopted)

        return [
            self.optimizer.register_state_dict_pre_hook(lambda _: self._make_whole()),
            self.optimizer.register_state_dict_post_hook(lambda _, __: self._show()),
            self.optimizer.register_load_state_dict_pre_hook(before_load),
            self.optimizer.register_load_state_dict_post_hook(lambda _: self._show()),
        ]

    def _cover_states(self) -> _Covered:
        save, load = self.optimizer.state_dict, self.optimizer.load_state_dict

        def state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
            with self.whole():
                return save(*args, **kwargs)

        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            fitted = fit_adopted(state_dict, self._own, self._adopted) if "param_groups" in state_dict else state_dict
            with self.whole():
                load(fitted, *args, **kwargs)

        return _Covered(self.optimizer, state_dict=state_dict, load_state_dict=load_state_dict)

    def _settle_state(self) -> None:
        if self._policy == "keep":
            return
        for home in self._homes:
            for parameter in home.params:
                if id(parameter) in self._trains:
                    self._reload(parameter)
                elif self._policy == "drop":
                    self.optimizer.state.pop(parameter, None)
                else:
                    self._offload(parameter)

    def _offload(self, parameter: nn.Parameter) -> None:
        state = self.optimizer.state.get(parameter, {})
        devices = self._offloaded.setdefault(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device.type != "cpu":
                devices[key] = value.device
                state[key] = value.cpu()

    def _reload(self, parameter: nn.Parameter) -> None:
        state = self.optimizer.state.get(parameter, {})
        for key, device in self._offloaded.pop(parameter, {}).items():
            if isinstance(state.get(key), Tensor):
                state[key] = state[key].to(device)


def fit_adopted(state: dict[str, Any], own: int, adopted: Sequence[str]) -> dict[str, Any]:
    """Make an optimizer's saved state fit the parameters adopted now, which another schedule may not have adopted.

    Args:
        state: What ``optimizer.state_dict()`` gave; it is not changed.
        own: How many groups the user's optimizer has.
        adopted: The names of the parameters adopted now.

    Returns:
        The state with as many groups as the optimizer has now; parameters that were not adopted then have no state.
    """
    groups = state["param_groups"]
    if any(isinstance(member, str) for group in groups for member in group["params"]):
        # FSDP2 has matched by name: groups and members are those of now, only the list of names is the checkpoint's.
        return {**state, "param_groups": [*groups[:own], *({**g, "adopted": list(adopted)} for g in groups[own:])]}
    saved = groups[own] if len(groups) == own + 1 and "adopted" in groups[own] else None
    names = list(saved["adopted"]) if saved else []
    if names == list(adopted) or len(groups) != own + bool(saved) or not groups:
        return state
    used = [index for group in groups for index in group["params"]]
    indices = dict(zip(names, saved["params"], strict=True)) if saved else {}
    kept = {name: indices.get(name, max(used, default=-1) + 1 + place) for place, name in enumerate(adopted)}
    gone = set(indices.values()) - set(kept.values())
    fitted = [*groups[:own]]
    if adopted:
        template = saved if saved is not None else groups[0]
        fitted.append({**scaled_rates(template, 1.0), "params": list(kept.values()), "adopted": list(adopted)})
    return {
        **state,
        "state": {index: value for index, value in state["state"].items() if index not in gone},
        "param_groups": fitted,
    }


def parameter_groups(
    module: nn.Module,
    options: Mapping[Any, Mapping[str, Any]],  # of selectors; a Mapping of them would refuse a dict[str, …]
    *,
    no_decay: Selector = ("*.bias", "type:_NormBase", "type:LayerNorm"),
) -> list[dict[str, Any]]:
    """Give optimizer groups from selectors: disjoint, and together all parameters of a module.

    Args:
        module: Any module. Frozen parameters are in the groups too: they may train later.
        options: Selector to the options of its group, for example ``{"backbone": {"lr": 1e-5}}``. Where selectors
            overlap the later one holds. What none selects is in a group without options of its own. A tuple is a list
            of selectors: ``{("*", "!head"): {"lr": 1e-5}}``.
        no_decay: What gets ``weight_decay=0.0``, in a group beside. A pattern that matches nothing is passed over.

    Returns:
        Groups for any ``torch.optim`` optimizer, each with ``params``, a ``name`` of its own and its options; no empty
        ones. A tensor among the options, a learning rate say, is copied for each group.

    Raises:
        TypeError: If the options of a selector are no dict.
        ValueError: If a selector matches nothing, if later ones leave it nothing, or if options have ``params``.

    Example:
        >>> net = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> groups = parameter_groups(net, {"backbone": {"lr": 1e-4, "weight_decay": 0.1}})
        >>> [(group["name"], group.get("lr"), group.get("weight_decay"), len(group["params"])) for group in groups]
        [('backbone', 0.0001, 0.1, 1), ('backbone/no_decay', 0.0001, 0.0, 1), ('rest', None, None, 1), \
('rest/no_decay', None, 0.0, 1)]
    """
    _check_options(options)
    everything = named_unique_parameters(module)
    owner = overlay(module, list(options), given="parameter_groups({{{}: …}})")
    undecayed = resolve(module, no_decay, given="parameter_groups(no_decay={})", partial=True)
    sections = [(values.get("name", selector_text(select)), values, select) for select, values in options.items()]
    groups: dict[str, dict[str, Any]] = {}
    for title, values, select in [*sections, ("rest", {}, None)]:
        members = [name for name in everything if owner.get(name) == select]
        for suffix, names, extra in (
            ("", [name for name in members if name not in undecayed], {}),
            ("/no_decay", [name for name in members if name in undecayed], {"weight_decay": 0.0}),
        ):
            if names:
                own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
                name = _unlike(f"{title}{suffix}", groups)
                groups[name] = {"params": [everything[name] for name in names], **own, **extra, "name": name}
    return list(groups.values())


def _check_options(options: Mapping[Any, Any]) -> None:
    if not isinstance(options, Mapping):
        raise TypeError(
            f'parameter_groups: options are a dict of selectors, for example {{"head": {{"lr": 1e-3}}}}, '
            f"not {options!r}."
        )
    for select, values in options.items():
        shown = f"parameter_groups({{{selector_text(select)!r}: {values!r}}})"
        if not isinstance(values, Mapping):
            raise TypeError(f'{shown}: the options of a group are a dict, for example {{"lr": 1e-3}}.')
        if "params" in values:
            raise ValueError(f"{shown}: what a group holds follows from its selector. Leave params out.")


def _unlike(name: str, taken: Collection[str]) -> str:
    """Give a name that is not taken: LearningRateMonitor refuses two groups of one name."""
    numbered = (f"{name}-{number}" for number in count(2))
    return name if name not in taken else next(one for one in numbered if one not in taken)


def overlay(module: nn.Module, selects: Sequence[Selector], *, given: str = "select={}") -> dict[str, Selector]:
    """Give, for each parameter that one of several selectors names, the last selector that does.

    Raises:
        ValueError: If a selector matches nothing, or if later ones leave it nothing.
    """
    owner: dict[str, Selector] = {}
    for select in selects:
        owner.update(dict.fromkeys(resolve(module, select, given=given), select))
    for select in selects:
        if not any(holder is select for holder in owner.values()):
            mine = resolve(module, select, given=given)
            for other in selects:
                if other is not select and resolve(module, other, given=given).keys() == mine.keys():
                    raise ValueError(
                        f"{given.format(repr(selector_text(select)))} names the same parameters as "
                        f"{selector_text(other)!r}: {', '.join(mine)}. Tied parameters are one. Keep one of the two."
                    )
            raise ValueError(
                f"{given.format(repr(selector_text(select)))} is left with no parameter: later selectors name all of "
                "them, and the later one holds. Put the wider selector first."
            )
    return owner
