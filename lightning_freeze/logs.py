"""Loggers whose lines are printed once: by the root logger's handlers if it has any, else by the package itself."""

from __future__ import annotations

import logging


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
    return logging.getLogger(name)
