"""Loggers whose lines are printed once: on rank zero, by the root logger's handlers if it has any, else by ours."""

from __future__ import annotations

import logging

from lightning_utilities.core.rank_zero import rank_zero_only

_package = logging.getLogger("lightning_freeze")
_printer = logging.StreamHandler()
_printer.addFilter(lambda record: not logging.getLogger().handlers)
_package.addHandler(_printer)
if _package.level == logging.NOTSET:  # a level that the user has set is kept
    _package.setLevel(logging.INFO)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this package."""
    logger = logging.getLogger(name)
    logger.addFilter(lambda record: getattr(rank_zero_only, "rank", 0) == 0)  # every launcher of both sets it
    return logger
