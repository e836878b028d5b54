"""`connect`: objects that stand for a replicated one, and call its methods."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, Self, TypeVar, overload

import msgspec
from attrs import evolve, frozen

from etcdreplica.app.methods import QUERY
from etcdreplica.clock import boottime
from etcdreplica.errors import RemoteError, UsageError
from etcdreplica.objects.client import Client, Request
from etcdreplica.objects.connection import in_background, refuse_to_wait_here
from etcdreplica.words import check_name, check_seconds

TIMEOUT_S = 30.0

T = TypeVar("T")


@overload
def connect(name: str, cls: type[T], *, timeout: float = TIMEOUT_S) -> T: ...
@overload
def connect(name: str, cls: None = None, *, timeout: float = TIMEOUT_S) -> Any: ...
def connect(name: str, cls: type[Any] | None = None, *, timeout: float = TIMEOUT_S) -> Any:
    """Return an object that stands for the replicated object of this name; calls of its methods are calls of that.

    It is found through the node of this host, and followed across fail-overs. An update returns when every in-sync copy has it,
    and is applied once, however often it had to be sent. `ledger.deposit.submit(...)` returns a `concurrent.futures.Future`
    instead of waiting, `ledger.balance.stale(0.5)(...)` asks any copy whose state is at most half a second behind, and
    `ledger.deposit.within(2.0)(...)` has a timeout of its own. Use it from any thread, and in a `with` statement to close it.

    Args:
        name: of the application.
        cls: its class, for type checkers; it is not needed to run.
        timeout: seconds that this, and every call, waits for an answer.

    Raises:
        UnavailableError: no copy was found, or none answered in time; a query can be asked again.
        OutcomeUnknownError: an update was sent but not answered in time. It may have happened, or still happen; never twice.
        OverloadedError: the call was refused, and has not happened: there is too much to do.
        UsageError: the object has no such method, or the arguments cannot be sent.
        RemoteError: a method raised an error of a class that is not there in this process; others are raised as they are.
    """
    check_name("application name", name)
    limit = check_seconds("timeout", timeout, 0.001)

    async def make() -> tuple[Client, dict[str, str]]:
        client = Client(name)
        try:
            return client, await client.found(limit)
        except BaseException:
            await client.close()
            raise

    client, methods = in_background(make())
    return SyncProxy(client, methods, limit)


@overload
async def connect_async(name: str, cls: type[T], *, timeout: float = TIMEOUT_S) -> Any: ...
@overload
async def connect_async(name: str, cls: None = None, *, timeout: float = TIMEOUT_S) -> Any: ...
async def connect_async(name: str, cls: type[Any] | None = None, *, timeout: float = TIMEOUT_S) -> Any:
    """Do the same as `connect` for the running event loop: calls of the methods are awaited. Close it by `async with`."""
    check_name("application name", name)
    limit = check_seconds("timeout", timeout, 0.001)
    client = Client(name)
    try:
        return AsyncProxy(client, await client.found(limit), limit)
    except BaseException:
        await client.close()
        raise


@frozen
class Method:
    """One method of an object."""

    _client: Client
    _name: str
    _kind: str
    _timeout_s: float
    _max_age: float | None = None

    def stale(self, max_age: float) -> Self:
        """Return this query, answered by any copy that is at most so many seconds behind."""
        if self._kind != QUERY:
            raise UsageError(f"{self._name} is an update: only a query can be stale")
        return evolve(self, max_age=check_seconds("max_age", max_age, 0))

    def within(self, timeout: float) -> Self:
        """Return this method with another timeout, in seconds."""
        return evolve(self, timeout_s=check_seconds("timeout", timeout, 0.001))

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any], future: Future[Any] | asyncio.Future[Any]) -> Request:
        until = boottime() + self._timeout_s
        return Request(self._kind, self._name, args, kwargs, self._max_age, until, _settle(future))


class SyncMethod(Method):
    """Call it, or `submit` the call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, and wait."""
        refuse_to_wait_here()
        return self.submit(*args, **kwargs).result()

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Begin the call; the future has its outcome, at the latest after the timeout."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled: what was sent may happen
        self._client.submit_from_thread(self._request(args, kwargs, future))
        return future


class AsyncMethod(Method):
    """Await its calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Begin the call."""
        future = asyncio.get_running_loop().create_future()
        self._client.submit(self._request(args, kwargs, future))
        return future


def _settle(future: Future[Any] | asyncio.Future[Any]) -> Callable[[Exception | None, bytes], None]:
    def done(error: Exception | None, value: bytes) -> None:
        result: Any = None
        if error is None:
            try:
                result = msgspec.msgpack.decode(value)
            except Exception as reason:
                error = RemoteError(type(reason).__qualname__, f"what was returned cannot be read here: {reason}")
        elif isinstance(error, StopIteration):  # which no future can carry
            error = RemoteError("builtins.StopIteration", str(error))
        with contextlib.suppress(InvalidStateError, asyncio.InvalidStateError):  # its caller was cancelled
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

    return done


class _Proxy:
    """What both kinds share. Names that begin with an underscore are ours, all others the object's."""

    def __init__(self, client: Client, methods: dict[str, str], timeout_s: float) -> None:
        self._client = client
        self._methods = methods
        self._timeout_s = timeout_s

    def _kind_of(self, name: str) -> str:
        if name not in self._methods:
            raise AttributeError(f"{self._client.app} has no method {name} marked with @update or @query")
        return self._methods[name]

    def __dir__(self) -> list[str]:
        return sorted((*super().__dir__(), *self._methods))

    def __repr__(self) -> str:
        return f"<replicated object {self._client.app}>"


class SyncProxy(_Proxy):
    """Stands for an object; its calls wait."""

    def __getattr__(self, name: str) -> SyncMethod:
        method = SyncMethod(self._client, name, self._kind_of(name), self._timeout_s)
        setattr(self, name, method)
        return method

    def __enter__(self) -> SyncProxy:
        return self

    def __exit__(self, *_: object) -> None:
        in_background(self._client.close())


class AsyncProxy(_Proxy):
    """Stands for an object; its calls are awaited."""

    def __getattr__(self, name: str) -> AsyncMethod:
        method = AsyncMethod(self._client, name, self._kind_of(name), self._timeout_s)
        setattr(self, name, method)
        return method

    async def __aenter__(self) -> AsyncProxy:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()
