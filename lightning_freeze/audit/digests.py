"""What values were, by digest, and which of them have changed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from torch import Tensor, nn

from lightning_freeze.tensors import digest


class Witness:
    """Remembers the digests of named tensors.

    Version counters would be cheaper, but a write to ``.data`` does not raise them. Sixteen bytes a tensor are kept.

    Example:
        >>> net, witness = nn.Linear(2, 1), Witness()
        >>> witness.look(dict(net.named_parameters()))
        []
        >>> net.bias.data.fill_(7).item()
        7.0
        >>> witness.look(dict(net.named_parameters()))
        ['bias']
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[nn.Parameter | None, bytes]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._seen

    def look(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Give the names of tensors that have changed since the last look; remember these, and forget all others.

        What the last look did not see is new: it cannot have changed. Nor has a parameter of which another object has
        taken the place; a buffer is what the module has under its name.
        """
        before, self._seen = self._seen, {}
        moved = []
        for name, tensor in tensors.items():
            parameter = tensor if isinstance(tensor, nn.Parameter) else None
            self._seen[name] = (parameter, digest(tensor))
            known = before.get(name)
            if known is not None and known[0] is parameter and known[1] != self._seen[name][1]:
                moved.append(name)
        return moved

    def keep(self, names: Container[str]) -> None:
        """Forget all but these."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}

    def forget(self) -> None:
        """Know nothing any longer."""
        self._seen = {}


def differing(digests: Sequence[Mapping[str, bytes]]) -> list[str]:
    """Give the names under which not all have the same digest.

    Args:
        digests: One mapping from name to digest for each process.

    Example:
        >>> differing([{"weight": b"1", "bias": b"2"}, {"weight": b"1", "bias": b"3"}])
        ['bias']
    """
    names = dict.fromkeys(name for one in digests for name in one)
    return [name for name in names if len({one.get(name) for one in digests}) > 1]
