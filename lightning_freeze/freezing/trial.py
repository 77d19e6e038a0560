"""What an optimizer would refuse in mid-fit, asked of a throw-away one of its class before the first batch."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.freezing.step_view import MEMBERS, is_rate
from lightning_freeze.words import listed


@contextmanager
def _without_random_numbers() -> Iterator[None]:
    """Leave the random numbers of the fit as they are: some optimizers add noise."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng([torch.cuda.current_device()] if used else []):
        yield


def try_adoption(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], sparse: Iterable[int] = ()
) -> dict[nn.Parameter, Any]:
    """Build an optimizer with parameters that this one was not given, and step small ones of their kinds.

    ``sparse`` has the identities of those that get sparse gradients. Returns the state that the constructor makes for a
    parameter, where it makes one.

    Raises:
        ValueError: If the constructor or the step refuses them, in the optimizer's words, or it saves in a way of its
            own, without hooks, as wrappers do.
    """
    name = type(optimizer).__name__

    def refusal(why: str) -> ValueError:
        return ValueError(
            f"The schedule trains what {name} was not given: {listed(parameters)}. {why} Give it all parameters in "
            "configure_optimizers; a phase says from when on they train."
        )

    if not _saves_with_hooks(optimizer):
        raise refusal("It saves in a way of its own, so nothing can be added to it later.")
    sparse, own = set(sparse), [p for group in optimizer.param_groups for p in group["params"]]
    known, new = (sorted({(p.ndim, id(p) in sparse) for p in members}) for members in (own, parameters.values()))
    try:
        for ndim, is_sparse in known:
            _step(*_small(optimizer, ndim=ndim), sparse=is_sparse)
    except Exception as error:  # whatever the class raises at what it was given, it cannot be asked so
        if any(optimizer.state.get(p) for p in own):
            why = "It makes state for its parameters when it is built, so none can be added later."
            raise refusal(why) from error
        return {}
    try:
        other = _another(optimizer, list(parameters.values()))
        for ndim, is_sparse in new:
            _step(*_small(optimizer, ndim=ndim), sparse=is_sparse)
    except Exception as error:
        raise ValueError(
            f"The schedule trains what {name} was not given and does not take: {listed(parameters)}. It says: {error} "
            "Give them to an optimizer in configure_optimizers, or leave them out of the phases."
        ) from error
    return _states(other, parameters.values())


def try_scales(optimizer: Optimizer, group: Mapping[str, Any], phases: Iterable[Collection[float]]) -> None:
    """Step small tensors in one group, then in parts of it at different learning rates, as scales would have it.

    ``phases`` has, for each phase, the scales that are in the group at once.

    Raises:
        ValueError: If the optimizer refuses different learning rates; it says what the optimizer said.
    """
    rate = group.get("lr")
    if not isinstance(rate, float):
        return
    for factors in phases:
        rates = [(rate or 1.0) * factor for factor in factors]  # at 0, where a warmup begins, nothing moves
        try:
            other, tensors = _small(optimizer, len(rates))
            whole = _step(other, tensors)
            _another(optimizer, [{"params": [tensor]} for tensor in tensors])
        except Exception:  # whatever the class raises, it cannot be asked so
            return
        try:
            other, tensors = _small(optimizer, len(rates))
            parts = [{"params": [tensor], "lr": own} for tensor, own in zip(tensors, rates, strict=True)]
            other.param_groups[:1] = [{**other.param_groups[0], **part} for part in parts]
            resting = [own for own, moved in zip(rates, _step(other, tensors), strict=True) if own and not moved]
            if resting and all(whole):
                raise ValueError("it steps only as many groups as it was built with.")
            # Some refuse to be built with a rate of 0, where a ramp may begin, and step at one.
            _another(optimizer, [{key: value for key, value in part.items() if value} for part in parts])
        except Exception as error:
            raise ValueError(
                f"lr_scale makes groups of different learning rates, which {type(optimizer).__name__} refuses: {error} "
                "Leave lr_scale out."
            ) from error


def try_frozen(optimizer: Optimizer) -> None:
    """Step two small tensors in each kind of its groups, one of which is frozen, then trains, then is frozen again.

    Raises:
        ValueError: If the optimizer refuses that, or moves what has no gradient.
    """
    kinds = {}
    for group in [group for group in optimizer.param_groups if group["params"]]:
        own = {o: v for o, v in group.items() if o not in MEMBERS and o != "name" and not is_rate(o)}
        rate = group.get("lr") or group.get("initial_lr")  # at a rate of 0, where a warmup begins, nothing moves
        kinds[str(own)] = {**own, "lr": rate} if rate else own, group["params"][0]
    for options, like in kinds.values():
        try:
            other, twins = _small(optimizer, 2, like.ndim, like, options)
            for _ in range(2):
                _step(other, twins)
        except Exception:  # whatever the class raises, it cannot be asked so
            continue
        try:
            other, twins = _small(optimizer, 2, like.ndim, like, options)
            for number in (1, 2, 1):
                if any(_step(other, twins, number)[number:]):
                    raise ValueError("it moves what has no gradient.")
        except Exception as error:
            raise ValueError(
                f"{type(optimizer).__name__} cannot step while some of its parameters are frozen: {error} Let its "
                "step() pass by what has no gradient before anything else, with `if p.grad is None: continue`, use "
                "another optimizer, or give it only what always trains."
            ) from error


@_without_random_numbers()
def state_bytes(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> tuple[int, int] | None:
    """Return the bytes of state for a parameter in a group: of an optimizer just built, and after its first step.

    None if it cannot be asked. The parameter is not touched.
    """
    options = {key: value for key, value in group.items() if key not in MEMBERS}
    for device in ("meta", "cpu", parameter.device):  # without memory, if its step reads no value
        twin = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype, device=device))
        with suppress(Exception):  # whatever the class raises, it cannot be asked so
            other = _another(optimizer, [{"params": [twin], **options}])
            built = _size(other.state[twin])
            twin.grad = torch.zeros_like(twin)
            other.step()
            return built, _size(other.state[twin])
    return None


def state_anew(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> dict[nn.Parameter, Any]:
    """Return the state that the constructor makes for parameters of the optimizer, where it makes one."""
    wanted = set(parameters)
    groups = [{**group, "params": [p for p in group["params"] if p in wanted]} for group in optimizer.param_groups]
    for group in groups:
        group.pop("param_names", None)
    with suppress(Exception):  # whatever the class raises, it cannot be asked so
        return _states(_another(optimizer, [group for group in groups if group["params"]]), wanted)
    return {}


def _size(state: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def _saves_with_hooks(optimizer: Optimizer) -> bool:
    """Return whether saving and loading run torch's hooks; a class with methods of its own is asked."""
    cls, ran = type(optimizer), []
    if (cls.state_dict, cls.load_state_dict) == (Optimizer.state_dict, Optimizer.load_state_dict):
        return True
    with suppress(Exception):  # whatever the class raises, it cannot be asked so
        other, tensors = _small(optimizer)
        _step(other, tensors)
        for when in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            getattr(other, f"register_{when}_hook")(lambda *_, when=when: ran.append(when))
        other.load_state_dict(other.state_dict())
        return len(ran) == 4
    return False


def _small(
    optimizer: Optimizer,
    number: int = 1,
    ndim: int = 2,
    like: nn.Parameter | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Optimizer, list[nn.Parameter]]:
    """Build one of its class for small tensors, in a group with ``options``, and return both."""
    if like is None:
        like = next(p for group in optimizer.param_groups for p in group["params"])
    tensors = [nn.Parameter(torch.zeros((2,) * ndim, dtype=like.dtype, device=like.device)) for _ in range(number)]
    return _another(optimizer, [{"params": tensors, **options}] if options else tensors), tensors


@_without_random_numbers()
def _step(
    other: Optimizer, tensors: list[nn.Parameter], number: int | None = None, *, sparse: bool = False
) -> list[bool]:
    """Step with a gradient for the first ``number`` of the tensors, or all; return which have moved."""
    before = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    for tensor in tensors[:number]:
        ones: Tensor = torch.ones_like(tensor)  # at zero gradients some classes return before they look at rates
        tensor.grad = ones.to_sparse(1) if sparse else ones
    other.step()
    return [not torch.equal(old, tensor) for old, tensor in zip(before, tensors, strict=True)]


def _another(optimizer: Optimizer, parameters: Any) -> Optimizer:
    known = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in known}
    return type(optimizer)(parameters, **options)


def _states(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Any]:
    """Return the states of those parameters that have one."""
    return {p: optimizer.state[p] for p in parameters if optimizer.state.get(p)}
