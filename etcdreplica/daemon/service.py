"""Running a daemon's coroutine as a process: signals, and a garbage collector that stays out of the way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Coroutine
from typing import Any


def serve(work: Coroutine[Any, Any, None]) -> None:
    """Run until the work ends or SIGTERM or SIGINT cancels it."""
    asyncio.run(_until_signalled(work))


async def _until_signalled(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    gc.collect()
    gc.freeze()  # what was loaded so far lives as long as the process
    with contextlib.suppress(asyncio.CancelledError):
        await task
