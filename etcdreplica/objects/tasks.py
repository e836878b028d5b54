"""Work in the background of one copy, whose failures are not lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from etcdreplica.errors import EtcdReplicaError, ObjectError

log = logging.getLogger(__name__)


class Tasks:
    """Work in the background; what it raises goes to `fail`."""

    def __init__(self, app: str, fail: Callable[[EtcdReplicaError], None]) -> None:
        self._app, self._fail = app, fail
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin something."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def cancel(self) -> None:
        """Stop all of it."""
        for task in self._tasks:
            task.cancel()

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, EtcdReplicaError):
                log.error("%s: a bug ended this copy", self._app, exc_info=error)
                error = ObjectError(f"a bug ended this copy: {type(error).__name__}: {error}")
            self._fail(error)
