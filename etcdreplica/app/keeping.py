"""How one application keeps its state: what its decorator said, and the thread that asks for the state again and again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from etcdreplica.app.log import logger
from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.words import Role

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable
    from typing import Any

    from etcdreplica.app.checkpoints import Checkpoints
    from etcdreplica.app.replica import Replica
    from etcdreplica.app.state import Codec

LAST_S = 5.0  # how long a copy that hands over tries to make its last state durable


class Keeping:
    """`codec`, `interval_s` and `on_checkpoint` as `protected` has them."""

    def __init__(self, codec: Codec, interval_s: float | None, on_checkpoint: Callable[[Any], Any] | None) -> None:
        self.codec = codec
        self.interval_s = interval_s
        self.on_checkpoint = on_checkpoint


class Keeper:
    """Asks one replica's provider for its state from `start` to `stop`, and a last time in `finish`."""

    def __init__(self, replica: Replica, interval_s: float | None, loop: AbstractEventLoop | None) -> None:
        self._replica = replica
        self._interval_s = interval_s
        self._loop = loop
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; nothing happens before there is a provider."""
        if self._interval_s is not None:
            self._thread = threading.Thread(target=self._run, name="etcdreplica state", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask no more. A call under way is not waited for: it may need the loop or a lock of the body."""
        self._stopped.set()

    def finish(self, checkpoints: Checkpoints, *, handover: bool) -> None:
        """The body has ended: see that what it has stored gets to this host, at a handover also its last state."""
        until = boottime() + LAST_S
        provider = self._replica._provider
        if handover and provider is not None and self._replica.role is Role.PRIMARY:
            try:
                self._replica._store_provided(lambda: self._ask(provider), wait=True, timeout=LAST_S)
            except Exception as error:
                logger().warning("%s: the last state before a handover: %s", self._replica.name, error)
        checkpoints.flush(max(0.0, until - boottime()))

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            provider = self._replica._provider
            if provider is None:
                continue
            try:
                self._replica._store_provided(lambda asked=provider: self._ask(asked))  # type: ignore[misc]
            except EtcdReplicaError as error:
                logger().error("%s: its state was not stored: %s", self._replica.name, error)
            except BaseException:
                if not self._stopped.is_set():  # then its loop has ended, too
                    logger().exception("the state function of %s raised", self._replica.name)

    def _ask(self, provider: Callable[[], Any]) -> Any:
        """Call it where the body runs, if that is an event loop."""
        if self._loop is None:
            return provider()
        import asyncio

        async def ask() -> Any:
            return provider()

        asking = ask()
        try:
            return asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        finally:
            asking.close()  # if the loop has ended before it came to it
