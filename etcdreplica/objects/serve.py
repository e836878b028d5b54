"""`etcdreplica.serve`: this process as one copy of an object."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etcdreplica.app.decorator import ObjectDefinition
from etcdreplica.app.log import logger
from etcdreplica.app.protocol import Message
from etcdreplica.app.replica import Replica
from etcdreplica.errors import ConfigurationError, EtcdReplicaError, UsageError
from etcdreplica.objects.connection import background_loop, here, in_background
from etcdreplica.objects.copies import WatchDogLine, copies_of
from etcdreplica.objects.machine import Machine
from etcdreplica.objects.proxy import connect
from etcdreplica.objects.server import ObjectServer, Settings
from etcdreplica.words import Failover, Role, Style

FAILED_S = 1.0  # for the WatchDog to hear why this copy ends
EXIT_FAILED = 70
PULSE_S = 0.1
ALONE_S = 0.02  # between two looks whether another copy has all there is
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  (what nodes may listen on)


def serve(cls: type[Any], *args: Any, body: Callable[..., Any] | None = None) -> Any:
    """Make this process a copy of the replicated object that a protected class describes, until it is to end.

    Call it where a function under `@protected` would be called: `python ledger.py` on any host registers the application, and
    the other hosts start the same program.

    Args:
        cls: a class under `@protected`.
        args: of its constructor, which only the first copy of all calls; the others get their state from that one.
        body: if given, called as `body(replica, ledger)` in the main thread of every copy, with what `connect` returns. What it
            returns, this returns; without it, this returns None when the copy is to end.

    Raises:
        UsageError: `cls` is not protected.
        NoWatchDogError, RefusedError: as of every protected call.
    """
    definition = vars(cls).get("__etcdreplica__") if isinstance(cls, type) else None
    if not isinstance(definition, ObjectDefinition):
        raise UsageError(f"serve takes a class under @protected, not {cls!r}")
    return definition.run(lambda replica: _Serving(definition, cls, args, replica).run(body))


class _Serving:
    """One copy, between the session with the WatchDog and the loop of objects."""

    def __init__(self, definition: ObjectDefinition, cls: type[Any], args: tuple[Any, ...], replica: Replica) -> None:
        self._definition = definition
        self._replica = replica
        self._machine = Machine(cls, definition.codec, args)
        self._is_hot = definition.options["style"] == Style.HOT
        self._loop = background_loop()
        self._error: EtcdReplicaError | None = None
        self._has_body = False
        self._over = False
        self._server: ObjectServer | None = None
        self._line: WatchDogLine | None = None

    def run(self, body: Callable[..., Any] | None) -> Any:
        """Serve until the end."""
        replica = self._replica
        self._has_body = body is not None
        if not self._is_hot:
            kept = replica.restore()
            if kept is not None:
                self._machine.load(kept)
            replica.state(lambda: in_background(self._snapshot()))
        replica._serve(in_background(self._start()))
        replica._listen(self._listen)
        try:
            if body is not None:
                with connect(replica.name) as ledger:
                    return body(replica, ledger)
            while not replica.wait(0.2) and self._error is None:
                pass
            if self._error is not None:
                raise self._error
            return None
        finally:
            in_background(self._stop(handover=self._error is None and replica.stopping))

    async def _snapshot(self) -> bytes:
        return self._machine.snapshot()

    async def _start(self) -> str:
        replica, options = self._replica, self._definition.options
        welcome = replica._heard.get("welcome", {})
        if self._is_hot and replica._link is not None:
            self._line = WatchDogLine(replica._link.send)
        durable = None
        if options["durable"] and self._line is not None:  # of this application only: an earlier one of its name had another
            durable = Path(welcome["state_dir"]) / str(welcome["born"])
        settings = Settings(replica.name, options["min_in_sync"], options["failover"] == Failover.FAST, durable)
        self._server = ObjectServer(
            settings, self._machine, int(welcome.get("incarnation", 1)), replica.host, self._line, self._fail
        )
        listen = str(welcome.get("listen", "127.0.0.1"))
        if not listen:
            raise ConfigurationError(
                f"{replica.name}: replicated objects know no TLS yet, and the node of this host is to be reached only by TLS: "
                "start it with --insecure if you trust its network, or with --peer-listen on 127.0.0.1"
            )
        try:
            port = await self._server.start(listen)
        except OSError as error:
            raise ConfigurationError(f"{replica.name} cannot listen on {listen}: {error.strerror or error}") from None
        self._server.become(replica.epoch, primary=replica.role is Role.PRIMARY)
        self._pulse()
        host = str(welcome.get("address", listen)) if listen in EVERYWHERE else listen
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        here[address] = self._loop, self._server.accept
        return address

    def _pulse(self) -> None:
        """Give a sign of life of the loop: a method that does not return is a hang."""
        if not self._over:
            self._replica._beat_loop()
            self._loop.call_later(PULSE_S, self._pulse)

    async def _stop(self, *, handover: bool) -> None:
        """End. The only copy that is in sync waits a while for another one: the state would end with it."""
        assert self._server is not None
        until = self._loop.time() + self._definition.options["stop_timeout_s"] / 2
        while handover and self._server.is_alone and self._loop.time() < until:  # noqa: ASYNC110  (several things end it)
            await asyncio.sleep(ALONE_S)
        self._over = True
        here.clear()
        await self._server.stop()

    def _listen(self, message: Message) -> None:
        self._loop.call_soon_threadsafe(self._hear, message)

    def _hear(self, message: Message) -> None:
        """Take what the WatchDog says, in the loop."""
        assert self._server is not None
        kind = message["type"]
        if kind == "role":
            self._server.become(int(message["epoch"]), primary=message["role"] == Role.PRIMARY)
        elif kind == "replicas":
            self._server.see(copies_of(message))
        elif self._line is not None:
            if kind == "welcome":
                self._line.lost()
            elif kind in ("members", "changed"):
                self._line.take(message)

    def _fail(self, error: EtcdReplicaError) -> None:
        """End this copy: it cannot go on."""
        if self._error is not None:
            return
        self._error = error
        logger().error("%s: this copy ends: %s", self._replica.name, error)
        if self._has_body and self._replica._link is not None:  # which we cannot interrupt
            self._replica._link.send("failed", reason=f"{type(error).__name__}: {error}"[:2000])
            asyncio.get_running_loop().call_later(FAILED_S, os._exit, EXIT_FAILED)
