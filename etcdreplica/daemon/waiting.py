"""Waiting for etcd, and for the first of several things."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from etcdreplica.errors import CorruptValueError, StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_S = 0.2


async def insist(what: str, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until etcd has answered it. Only for what may happen twice. Raises CorruptValueError."""
    while True:
        try:
            return await call()
        except CorruptValueError:
            raise
        except StoreError as error:
            log.warning("%s: %s; trying again", what, error)
            await asyncio.sleep(RETRY_S)


async def first(*waits: object) -> None:
    """Return when the first of them is done, and cancel the rest but futures."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if isinstance(task, asyncio.Task):
                task.cancel()
