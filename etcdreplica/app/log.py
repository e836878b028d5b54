"""The logger of this package, fetched when there is something to say: importing `logging` would cost every program 5 ms."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logging import Logger


def logger() -> Logger:
    """Return it."""
    import logging

    return logging.getLogger("etcdreplica")
