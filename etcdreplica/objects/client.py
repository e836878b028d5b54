"""The client of an object: it finds the primary, sends it calls in batches, and follows it across fail-overs.

Every update has a number of its session, and is sent again, in order, to each new primary until it is answered; the object
remembers what it has answered to whom, so it is applied once. All of this runs in one event loop: that of `connection` for
`connect`, whose calls wait in the caller's thread, and the caller's own for `connect_async`.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from attrs import define, frozen

from etcdreplica.app.methods import UPDATE
from etcdreplica.app.protocol import default_socket
from etcdreplica.clock import boottime
from etcdreplica.errors import (
    ObjectError,
    OutcomeUnknownError,
    OverloadedError,
    ProtocolError,
    RemoteError,
    UnavailableError,
    UsageError,
)
from etcdreplica.objects.connection import Connection
from etcdreplica.objects.finder import Finder
from etcdreplica.objects.wire import (
    DONE,
    EXPIRED,
    FORGOTTEN,
    NO_METHOD,
    NOT_PRIMARY,
    OVERLOADED,
    RAISED,
    SESSION,
    TOO_FEW,
    TOO_OLD,
    Answers,
    Asks,
    Calls,
    Message,
    Refuse,
    Result,
    Results,
    Standing,
    encode_value,
)

log = logging.getLogger(__name__)

EXPIRE_S = 0.1
DEADLY = 2  # primaries that end while an update is under way, before it is not sent to another one
AGAIN_S = 0.02  # before something that was refused is tried again
BATCH_CALLS = 500
BATCH_BYTES = 1 << 20
MAX_CALL = 8 << 20
MAX_OUTSTANDING = 20_000  # updates of one client


@frozen
class Request:
    """One call. `until`: CLOCK_BOOTTIME; `max_age`: of a stale query. `done(error, value)` is called once, in its loop."""

    kind: str
    method: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    max_age: float | None
    until: float
    done: Callable[[Exception | None, bytes], None]


@define(eq=False)
class Pending:
    """A call that is not answered yet."""

    number: int
    request: Request
    call: tuple[int, str, Any, Any]  # as on the wire; the arguments are bytes already: the caller may change them
    size: int
    sent: int = 0  # how often
    primaries: int = 0  # that ended while it was under way

    @property
    def is_update(self) -> bool:
        """Whether it is no query."""
        return self.request.kind == UPDATE


class Client:
    """Calls of one object. Everything but `close` is for the loop that it was made in."""

    def __init__(self, app: str, socket_path: str | None = None) -> None:
        self.app = app
        self._session = os.urandom(SESSION)
        self._new = True
        self._number = 0
        self._updates: dict[int, Pending] = {}  # in order; not answered
        self._queries: dict[int, Pending] = {}
        self._unsent: deque[Pending] = deque()
        self._standing: dict[Connection, Standing] = {}  # of the copies that can be reached
        self._primary: Connection | None = None
        self._flushing = False
        self._refused: list[Pending] = []  # to be tried again
        self._handed_over: deque[Request] = deque()
        self._taking = False
        self._why = "no copy has been found yet"
        self._loop = asyncio.get_running_loop()
        self.methods: asyncio.Future[dict[str, str]] = self._loop.create_future()  # by name their kind
        self._expiring = self._loop.create_task(self._expire())
        self._finder = Finder(app, socket_path or default_socket(), self._on_message, self._on_lost, self._on_trouble)
        self._closed = False

    async def found(self, timeout_s: float) -> dict[str, str]:
        """Wait until a copy has been found; return its methods. Raises UnavailableError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.methods)
        except TimeoutError:
            raise UnavailableError(f"{self.app}: no copy was found within {timeout_s:g} s: {self._why}") from None

    async def close(self) -> None:
        """Hang up. What is not answered fails."""
        self._closed = True
        self._expiring.cancel()
        self._finder.close()
        for pending in (*self._updates.values(), *self._queries.values()):
            pending.request.done(self._given_up(pending, "the client was closed"), b"")
        self._updates.clear()
        self._queries.clear()
        await asyncio.sleep(0)

    # --- calls -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Pending:
        """Begin a call. Raises UsageError, OverloadedError."""
        if self._closed:
            raise UsageError(f"this connection to {self.app} was closed")
        waiting = self._updates if request.kind == UPDATE else self._queries
        if len(waiting) >= MAX_OUTSTANDING:
            raise OverloadedError(f"{self.app}: {MAX_OUTSTANDING} calls of this client are not answered yet")
        try:
            given = encode_value(list(request.args)), encode_value(dict(request.kwargs) or None)
            for data in given:
                msgspec.msgpack.decode(data)  # what can be written but not read would end the connection
        except Exception as error:
            raise UsageError(f"the arguments of {request.method} cannot be sent as msgpack: {error}") from None
        size = len(given[0]) + len(given[1])
        if size > MAX_CALL:
            raise UsageError(f"the arguments of {request.method} take {size} bytes; a call may take {MAX_CALL}")
        self._number += 1
        call = (self._number, request.method, msgspec.Raw(given[0]), msgspec.Raw(given[1]))
        pending = waiting[self._number] = Pending(self._number, request, call, size)
        self._unsent.append(pending)
        self._flush_soon()
        return pending

    def submit_from_thread(self, request: Request) -> None:
        """Do the same from another thread; all errors go to `done`."""
        self._handed_over.append(request)
        if not self._taking:  # one wake-up for all that is handed over meanwhile
            self._taking = True
            self._loop.call_soon_threadsafe(self._take_over)

    def _take_over(self) -> None:
        self._taking = False  # first: what comes from now on wakes us again
        self._flushing = True
        while self._handed_over:
            request = self._handed_over.popleft()
            try:
                self.submit(request)
            except Exception as error:
                request.done(error, b"")
        self._flush()

    async def _expire(self) -> None:
        """Give up what was not answered in time; all calls of a client have about the same patience."""
        while True:
            await asyncio.sleep(EXPIRE_S)
            now = boottime()
            for waiting in (self._updates, self._queries):
                for pending in [p for p in waiting.values() if p.request.until <= now] if waiting else ():
                    del waiting[pending.number]
                    pending.request.done(self._given_up(pending, self._why or "no answer came in time"), b"")

    def _given_up(self, pending: Pending, why: str) -> Exception:
        what = f"{self.app}.{pending.call[1]}"
        if pending.is_update and pending.sent:
            return OutcomeUnknownError(f"{what} was sent but not answered ({why}): it may have happened, but not twice")
        return UnavailableError(f"{what} was not answered ({why})")

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        unsent = [p for p in self._unsent if p.number in (self._updates if p.is_update else self._queries)]
        self._unsent.clear()
        updates: list[Pending] = []
        queries: dict[tuple[float | None, int], list[Pending]] = {}
        for pending in unsent:
            if pending.is_update:
                updates.append(pending)
            else:
                queries.setdefault((pending.request.max_age, pending.sent), []).append(pending)
        primary = self._primary
        if primary is None:
            self._unsent.extend(pending for pending in unsent if pending.request.max_age is None)
        else:
            for batch in _batches(updates):
                below = next(iter(self._updates))
                primary.send(Calls(self._session, self._new, below, [pending.call for pending in batch]))
        for (max_age, tries), asked in queries.items():
            connection = primary if max_age is None else self._any(tries)
            if connection is not None:
                for batch in _batches(asked):
                    connection.send(Asks([pending.call for pending in batch], max_age))
            elif max_age is not None:
                self._again(asked)

    def _any(self, tries: int) -> Connection | None:
        """A copy for queries that may be a little behind: the backups in turn, then the primary."""
        there = sorted((c for c in self._standing if c.is_open), key=lambda c: c is self._primary)
        return there[tries % len(there)] if there else None

    def _again(self, pendings: Iterable[Pending]) -> None:
        """Try these once more, a moment later. Updates go in order, all that are not answered."""
        if not self._refused:  # else what was refused before is tried in a moment, and these with it
            self._loop.call_later(AGAIN_S, self._retry)
        self._refused += pendings

    def _retry(self) -> None:
        refused, self._refused = self._refused, []
        if self._closed:
            return
        self._unsent.extend(pending for pending in refused if not pending.is_update)
        if any(pending.is_update for pending in refused):
            self._resend_updates()
        else:
            self._flush_soon()

    def _resend_updates(self) -> None:
        waiting = [pending for pending in self._unsent if not pending.is_update]
        self._unsent = deque((*self._updates.values(), *waiting))
        self._flush_soon()

    # --- answers ---------------------------------------------------------------------------------------------------

    def _on_message(self, connection: Connection, message: Message) -> None:
        if isinstance(message, Standing):
            self._standing[connection] = message
            if not self.methods.done():
                self.methods.set_result(message.methods)
            self._choose()
        elif isinstance(message, Results):
            self._take(message.results, self._updates)
        elif isinstance(message, Answers):
            self._take(message.results, self._queries)
        elif isinstance(message, Refuse):
            self._why = message.reason
            connection.close(message.reason)
        else:
            raise ProtocolError(f"a copy sent {type(message).__name__}")

    def _on_lost(self, connection: Connection) -> bool:
        was_of_use = self._standing.pop(connection, None) is not None
        self._choose()
        return was_of_use

    def _on_trouble(self, why: str) -> None:
        self._why = why

    def _choose(self) -> None:
        """Let the copy that is primary by the newest epoch have everything that is not answered."""
        leading = [c for c, standing in self._standing.items() if standing.primary and c.is_open]
        primary = max(leading, key=lambda c: self._standing[c].epoch, default=None)
        if primary is self._primary:
            return
        if self._primary is not None:
            self._give_up_deadly()
        self._primary = primary
        if primary is not None:
            self._why = ""
            self._unsent = deque((*self._updates.values(), *self._queries.values()))
            self._flush_soon()
        else:
            self._why = "there is no primary just now"

    def _give_up_deadly(self) -> None:
        """Send an update no more that was under way when several primaries ended: it may be what ends them."""
        for pending in list(self._updates.values()):
            pending.primaries += pending.sent > 0
            if pending.primaries >= DEADLY:
                del self._updates[pending.number]
                pending.request.done(self._given_up(pending, f"{DEADLY} primaries ended while it was under way"), b"")

    def _take(self, results: list[Result], waiting: dict[int, Pending]) -> None:
        refused: list[Pending] = []
        forgotten = 0
        for number, code, value in results:
            pending = waiting.get(number)
            if pending is None:
                continue
            if code in (DONE, RAISED):
                self._new = self._new and not pending.is_update
                del waiting[number]
                pending.request.done(None if code == DONE else _error_of(value), bytes(value))
            elif code in (NOT_PRIMARY, TOO_OLD) or (pending.sent > 1 and code in (OVERLOADED, TOO_FEW)):
                refused.append(pending)  # of what was sent before it cannot be said that it has not happened
            elif code == FORGOTTEN:
                forgotten = forgotten or number
            else:
                del waiting[number]
                pending.request.done(self._refusal(pending, code), b"")
        if forgotten:
            self._renew(forgotten)
        if refused:
            self._again(refused)

    def _renew(self, number: int) -> None:
        """Begin a new session: the object has forgotten ours, and whatever was sent from this number on, has not happened.

        Of what was sent more than once we do not know what the first time came to. The rest gets new numbers, since answers
        in the old session may still come.
        """
        self._session, self._new = os.urandom(SESSION), True
        pendings, self._updates = self._updates, {}
        for pending in pendings.values():
            if pending.sent > 1 or (pending.sent and pending.number < number):
                pending.request.done(self._given_up(pending, "it was silent for so long that its session is forgotten"), b"")
                continue
            self._number += 1
            pending.number, pending.sent = self._number, 0
            pending.call = (self._number, *pending.call[1:])
            self._updates[self._number] = pending
        self._resend_updates()

    def _refusal(self, pending: Pending, code: int) -> Exception:
        what = f"{self.app}.{pending.call[1]}"
        if code == OVERLOADED:
            return OverloadedError(f"{what} has not happened: the primary has too many updates waiting")
        if code == TOO_FEW:
            return UnavailableError(f"{what} has not happened: fewer copies are in sync than min_in_sync asks for")
        if code == EXPIRED:
            return OutcomeUnknownError(f"{what} may have happened, but not twice: what it came to is not kept any more")
        if code == NO_METHOD:
            return UsageError(f"{self.app} has no {pending.request.kind} {pending.call[1]} that takes these arguments")
        return ObjectError(f"{what}: unknown answer {code}")


def _batches(pendings: list[Pending]) -> Iterable[list[Pending]]:
    batch: list[Pending] = []
    size = 0
    for pending in pendings:
        if batch and (len(batch) >= BATCH_CALLS or size + pending.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        pending.sent += 1
        batch.append(pending)
        size += pending.size
    if batch:
        yield batch


def _error_of(value: bytes) -> Exception:
    """Make the error that a method raised, of the same class where this process has it."""
    try:
        module, name, text, args = msgspec.msgpack.decode(value, type=tuple[str, str, str, list[Any] | None])
    except msgspec.DecodeError as error:
        return RemoteError("unknown", str(error))
    found: Any = None
    with contextlib.suppress(Exception):
        found = builtins if module == "builtins" else sys.modules[module]  # nothing is imported because a copy says so
        for part in name.split("."):
            found = getattr(found, part)
    may_be_raised = isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, StopIteration)
    if may_be_raised and args is not None:  # StopIteration: a future takes none
        with contextlib.suppress(Exception):
            made: Exception = found(*args)
            return made
    return RemoteError(f"{module}.{name}", text)
