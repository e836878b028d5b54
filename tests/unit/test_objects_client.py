"""What clients of an object see when something is in the way, on copies in one process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from etcdreplica import query, update
from etcdreplica.errors import (
    DivergedError,
    EtcdReplicaError,
    OutcomeUnknownError,
    OverloadedError,
    RemoteError,
    UnavailableError,
    UsageError,
)
from etcdreplica.objects import client as client_module
from etcdreplica.objects import leading as leading_module
from etcdreplica.objects import server as server_module
from etcdreplica.objects.client import Client
from etcdreplica.objects.connection import Connection, dial, in_background
from etcdreplica.objects.machine import TICK, record_of
from etcdreplica.objects.proxy import AsyncProxy, SyncProxy
from etcdreplica.objects.wire import VERSION, Asks, Calls, Hello
from etcdreplica.testing.objects import Copies, CopyHandle, values


class OwnError(Exception):
    """One that clients have as well."""


class Register:
    """A value, and odd methods."""

    def __init__(self) -> None:
        self.value: Any = 0
        self.applied = 0

    @update
    def put(self, value: Any) -> Any:
        """Set it; return the old one."""
        self.applied += 1
        self.value, old = value, self.value
        return old

    @update
    def fail(self, kind: str) -> None:
        """Raise something."""
        if kind == "local":

            class LocalError(Exception):
                pass

            raise LocalError("text")
        raise {"own": OwnError("a", 1), "key": KeyError("k"), "stop": StopIteration(), "exit": ValueError(object())}[kind]

    @update
    def chance(self) -> None:
        """Do what no update may."""
        self.value = os.urandom(8)

    @query
    def get(self) -> Any:
        """Look at it."""
        return self.value

    @query
    def big(self, size: int) -> bytes:
        """Return much."""
        return bytes(size)


@pytest.fixture
async def copies(tmp_path: Path) -> AsyncIterator[Copies]:
    """Two copies in sync."""
    async with Copies(Register, tmp_path) as copies:
        await copies.start("a")
        await copies.start("b")
        await copies.in_sync(2)
        yield copies


def primary(copies: Copies) -> CopyHandle:
    """Return it."""
    assert copies.primary is not None
    return copies.primary


def backup(copies: Copies) -> CopyHandle:
    """Return one."""
    return next(copy for copy in copies.copies if copy is not copies.primary)


def freeze(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the backup acknowledge nothing any more, and the primary wait for it."""
    monkeypatch.setattr(leading_module, "SLOW_S", 1000.0)
    monkeypatch.setattr(backup(copies).server._following, "_on_message", lambda *_: None)


async def test_no_copy_is_found(tmp_path: Path) -> None:
    """Nobody listens, or nobody serves: both are told."""
    client = Client("register", str(tmp_path / "nobody.sock"))
    with pytest.raises(UnavailableError, match=r"no WatchDog listens on .*nobody\.sock"):
        await client.found(0.05)
    await client.close()
    async with Copies(Register, tmp_path) as copies:
        with pytest.raises(UnavailableError, match="has no copy that answers"):
            await copies.client(0.2)


async def test_updates_that_are_not_answered(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that was sent the outcome is unknown; a query and an update that never left are only not answered."""
    register = await copies.client(0.3)
    freeze(copies, monkeypatch)
    with pytest.raises(UsageError, match="timeout"):
        register.put.within(0)
    patient = asyncio.ensure_future(register.put.within(60)(0))
    with pytest.raises(OutcomeUnknownError, match="may have happened, but not twice"):
        await register.put(1)
    assert not patient.done()
    patient.cancel()
    with pytest.raises(UnavailableError, match=r"get was not answered") as caught:
        await register.get()
    assert not isinstance(caught.value, OutcomeUnknownError)
    await copies.kill(primary(copies))
    await copies.until(lambda: register._client._primary is None)
    for _ in range(3):
        with pytest.raises(UnavailableError, match="there is no primary just now") as caught:
            await register.put(2)
        assert not isinstance(caught.value, OutcomeUnknownError)
    assert len(register._client._unsent) <= 1, "what was given up is kept no longer than to the next call"


async def test_too_few_copies(tmp_path: Path) -> None:
    """Updates are refused, and have not happened; queries are answered."""
    async with Copies(Register, tmp_path, min_in_sync=2) as copies:
        await copies.start("a")
        await copies.in_sync(1)
        register = await copies.client()
        with pytest.raises(UnavailableError, match="has not happened: fewer copies are in sync than min_in_sync"):
            await register.put(1)
        assert await register.get() == 0
        await copies.start("b")
        await copies.in_sync(2)
        assert await register.put(1) == 0


async def test_what_was_sent_before_waits_for_enough_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have happened, so it is tried again, at a bounded rate, and happens once."""
    monkeypatch.setattr(client_module, "BATCH_CALLS", 1)
    async with Copies(Register, tmp_path, min_in_sync=2) as copies:
        for host in "ab":
            await copies.start(host)
        await copies.in_sync(2)
        register = await copies.client()
        await register.put(0)
        freeze(copies, monkeypatch)
        futures = [register.put(number) for number in range(1, 31)]
        await copies.until(lambda: primary(copies).machine.instance.applied == 31)
        monkeypatch.undo()
        monkeypatch.setattr(client_module, "BATCH_CALLS", 1)
        await copies.fail_over()
        await copies.in_sync(1)
        sent = 0

        def count(connection: Connection, message: object, send: Any = Connection.send) -> None:
            nonlocal sent
            sent += isinstance(message, Calls)
            send(connection, message)

        monkeypatch.setattr(Connection, "send", count)
        await copies.until(lambda: sent > 300)
        began, loop = sent, asyncio.get_running_loop()
        at = loop.time()
        await copies.until(lambda: sent > began + 300)
        assert loop.time() - at > 0.1, "all of it about every 20 ms, not each for each refusal"
        await copies.start("c")
        await copies.in_sync(2)
        await asyncio.gather(*futures)
        assert values(copies.copies, "applied") == [31, 31] or await register.get() == 30


async def test_overloaded(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of both kinds are refused, by a primary that has too much to do, and by a client that waits for too many."""
    register = await copies.client()
    await register.put(0)
    freeze(copies, monkeypatch)
    monkeypatch.setattr(server_module, "MAX_WAITING", 10)
    held = [register.put(number) for number in range(10)]
    await copies.until(lambda: primary(copies).server._waiting_calls == 10)
    for call in (register.put, register.get):
        with pytest.raises(OverloadedError, match="has not happened: the primary has too many"):
            await (call(1) if call is register.put else call())
    monkeypatch.setattr(client_module, "MAX_OUTSTANDING", 10)
    with pytest.raises(OverloadedError, match="10 calls of this client are not answered yet"):
        await register.put(1)
    assert len(primary(copies).server._waiting) <= 10
    await copies.kill(backup(copies))
    monkeypatch.undo()
    await asyncio.gather(*held)


async def test_a_client_that_does_not_read(copies: Copies) -> None:
    """It is not read from either, so what it is to be sent does not grow; others are served."""
    connection = await dial(primary(copies).address, 1)
    connection.send(Hello(VERSION, "register"))
    transport = connection._transport
    assert transport is not None
    transport.pause_reading()
    await copies.until(lambda: len(primary(copies).server._clients) == 1)
    (there,) = primary(copies).server._clients
    for _ in range(30):
        connection.send(Asks([(1, "big", [1 << 20], None)], None))
    await copies.until(lambda: there.paused)
    for _ in range(50):
        connection.send(Asks([(1, "big", [1 << 20], None)], None))
        await asyncio.sleep(0)
    register = await copies.client()
    assert await register.put(1) == 0
    assert there._transport is not None
    assert there._transport.get_write_buffer_size() < 40 << 20
    connection.close()
    transport.abort()


async def test_errors_of_methods(copies: Copies) -> None:
    """They are raised as they are where their class is known; nothing else is lost by one."""
    register = await copies.client()
    with pytest.raises(OwnError, match=r"\('a', 1\)"):
        await register.fail("own")
    with pytest.raises(KeyError, match="'k'"):
        await register.fail("key")
    with pytest.raises(RemoteError, match=r"LocalError: text") as caught:
        await register.fail("local")
    assert "fail.<locals>.LocalError" in caught.value.kind
    with pytest.raises(RemoteError, match="ValueError"):
        await register.fail("exit")
    connection = register._client._primary
    with pytest.raises(RemoteError, match="StopIteration"):
        await register.fail("stop")
    assert register._client._primary is connection


async def test_calls_that_cannot_be_sent(copies: Copies) -> None:
    """They are errors at once, and so is an answer that is too long."""
    register = await copies.client()
    for value in (object(), 1 << 64, bytes((8 << 20) + 1)):
        with pytest.raises(UsageError, match="the arguments of put"):
            await register.put(value)
    with pytest.raises(UsageError, match="over the limit"):
        await register.big(17 << 20)
    with pytest.raises(AttributeError, match="no method missing"):
        register.missing()
    with pytest.raises(UsageError, match="only a query can be stale"):
        register.put.stale(1)
    assert await register.put(1) == 0


async def test_arguments_are_those_of_the_call(copies: Copies) -> None:
    """Whatever the caller does with them before they are sent."""
    register = await copies.client()
    value = [1]
    future = register.put(value)
    value.append(2)
    await future
    assert await register.get() == [1]


async def test_stale_queries(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup answers if it is fresh enough, else another copy."""
    register = await copies.client(2.0)
    await register.put(7)
    await copies.until(lambda: backup(copies).server._following.fresh_at is not None)
    await copies.until(lambda: values(copies.copies, "value") == [7, 7])
    leading = primary(copies)
    with monkeypatch.context() as patch:
        patch.setattr(leading.machine, "ask", lambda _: pytest.fail("the primary was asked"))
        assert await register.get.stale(20.0)() == 7
    assert await register.get.stale(0)() == 7, "only the primary can say that"


async def test_a_snapshot_is_not_shown_before_it_is_committed(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it may be lost with its primary: no query may see it."""
    register = await copies.client()
    freeze(copies, monkeypatch)
    future = register.put("never")
    late = await copies.start("c")
    await copies.until(lambda: late.machine.instance is not None)
    loop = asyncio.get_running_loop()
    at = loop.time()
    await copies.until(lambda: late.server._following._asked > 3 and loop.time() > at + 0.3)
    assert late.machine.instance.value == "never"
    assert late.server._following.fresh_at is None
    monkeypatch.undo()
    await copies.kill(backup(copies))
    await future


async def test_a_forgotten_session_is_begun_anew(copies: Copies) -> None:
    """A client that was silent for long goes on; what it sends then happens once."""
    register = await copies.client()
    for round_ in range(3):
        assert await register.put(round_) == (round_ - 1 if round_ else 0)
        for _ in range(62):
            primary(copies).server._log(record_of(TICK, 0.0))
        await copies.until(lambda: not primary(copies).machine.sessions)
    futures = [register.put(number) for number in range(2, 12)]
    assert await asyncio.gather(*futures) == list(range(2, 3)) + list(range(2, 11))
    assert primary(copies).machine.instance.applied == 13


async def test_a_diverged_copy_is_told(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup whose state is another one ends; the primary goes on."""
    register = await copies.client()
    await register.chance()
    leading = primary(copies).server.leading
    assert leading is not None
    primary(copies).server._check(leading)
    other = backup(copies)
    await copies.until(lambda: other.error is not None)
    assert isinstance(other.error, DivergedError)
    assert "does not depend on its arguments" in str(other.error)
    assert primary(copies).error is None


async def test_close(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not answered fails, and nothing new is taken."""
    client = Client("register", copies.socket)
    register = AsyncProxy(client, await client.found(5), 30.0)
    freeze(copies, monkeypatch)
    future = register.put(1)
    await copies.until(lambda: primary(copies).server._waiting_calls == 1)
    async with register:
        assert repr(register) == "<replicated object register>"
        assert {"put", "get"} <= set(dir(register))
    with pytest.raises(OutcomeUnknownError, match="the client was closed"):
        await future
    with pytest.raises(UsageError, match="was closed"):
        register.put(2)


async def test_sync_proxies_in_several_threads(copies: Copies) -> None:
    """Calls of all threads go through one client; `submit` does not wait, and an answer cannot be waited for in the loop."""

    async def make() -> tuple[Client, dict[str, str]]:
        client = Client("register", copies.socket)
        return client, await client.found(5)

    def work() -> list[Any]:
        client, methods = in_background(make())
        with SyncProxy(client, methods, 20.0) as register, ThreadPoolExecutor(4) as pool:
            done = list(pool.map(lambda number: register.put(number), range(100)))
            futures: list[Future[Any]] = [register.put.submit(number) for number in range(100)]
            assert not futures[-1].cancel(), "it may have been sent"
            done += [future.result(20) for future in futures]
            caught: list[BaseException] = []
            over = threading.Event()

            def in_callback(_: Future[Any]) -> None:
                try:
                    register.get()
                except EtcdReplicaError as error:
                    caught.append(error)
                over.set()

            register.get.submit().add_done_callback(in_callback)
            assert over.wait(5)
            if caught:
                assert "would wait for itself" in str(caught[0])
            with pytest.raises(UsageError):
                register.put.submit(object()).result(5)
        with pytest.raises(UsageError, match="was closed"):
            register.get()
        return done

    assert len(await asyncio.to_thread(work)) == 200
    assert primary(copies).machine.instance.applied == 200


async def test_more_clients_than_sessions(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """No session that somebody may still need is forgotten for another one."""
    monkeypatch.setattr("etcdreplica.objects.server.SESSIONS", 2)
    one, two, three = [await copies.client() for _ in range(3)]
    await one.put(1)
    await two.put(2)
    with pytest.raises(OverloadedError):
        await three.put(3)
    await one.put(4)
