"""Loggers whose lines are printed once: on rank zero, by the root logger's handlers if it has any, else by ours."""

from __future__ import annotations

import logging

from lightning_utilities.core.rank_zero import rank_zero_only


class _UnlessConfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints unless the user has configured logging."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print, unless the root logger has handlers that will."""
        if not logging.getLogger().handlers:
            super().emit(record)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this package; a level that the user has set on the package's is kept."""
    package = logging.getLogger("lightning_freeze")
    if not any(isinstance(handler, _UnlessConfigured) for handler in package.handlers):
        package.addHandler(_UnlessConfigured())
        if package.level == logging.NOTSET:
            package.setLevel(logging.INFO)
    logger = logging.getLogger(name)
    logger.addFilter(_is_rank_zero)
    return logger


def _is_rank_zero(record: logging.LogRecord) -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0  # every launcher of both Lightnings sets it
