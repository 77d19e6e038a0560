from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze.feature_cache.interceptor import Interceptor, Run, is_compiled, is_intercepted


def doubled(run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return run(*args, **kwargs) * 2


X = torch.randn(3, 4)


@pytest.mark.parametrize("attribute", [None, "a compiled call"])
def test_what_was_there_is_put_back_unless_somebody_else_has(attribute: Any) -> None:
    module: Any = nn.Linear(4, 4)
    module._compiled_call_impl = attribute and module._call_impl
    before = dict(vars(module))
    assert is_compiled(module) == (attribute is not None)
    interceptor = Interceptor(module, doubled)
    assert is_intercepted(module)
    assert torch.equal(module(X), module.forward(X) * 2)
    interceptor.remove()
    assert vars(module) == before
    assert not is_intercepted(module)
    interceptor = Interceptor(module, doubled)
    module.compile(backend="eager")
    compiled = module._compiled_call_impl
    interceptor.remove()
    assert module._compiled_call_impl is compiled


def test_two_for_one_module_are_refused() -> None:
    module = nn.Linear(4, 4)
    interceptor = Interceptor(module, doubled)
    with pytest.raises(ValueError, match="intercepted already"):
        Interceptor(module, doubled)
    interceptor.remove()
    assert torch.equal(module(X), module.forward(X))


class Everything(nn.Module):
    """Leaves nothing out of its pickle, as ``nn.Module`` would."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


def test_copies_run_by_themselves() -> None:
    module = Everything()
    Interceptor(module, doubled)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(copy.deepcopy(module))):
        assert not is_intercepted(twin)
        assert "forward" not in vars(twin)
        assert torch.equal(twin(X), module.forward(X))
        nn.init.zeros_(next(iter(twin.parameters())))
        assert not torch.equal(twin(X), module.forward(X))
