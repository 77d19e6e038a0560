"""What of a callback pickles and deep-copies."""

from __future__ import annotations

from typing import Any

# Lightning lends every callback the model's log functions, and with them the model.
_LENT = frozenset({"log", "log_dict"})


def without_fit(attributes: dict[str, Any], **instead: Any) -> dict[str, Any]:
    """Give a callback's attributes without what belongs to the model.

    Args:
        attributes: The callback's ``__dict__``.
        instead: What else to leave out, as attributes of a callback that is in no fit.

    Example:
        >>> without_fit({"tau": 0.1, "log": print, "_fit": "a fit"}, _fit=None)
        {'tau': 0.1, '_fit': None}
    """
    return {name: value for name, value in attributes.items() if name not in _LENT} | instead
