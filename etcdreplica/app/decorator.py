"""`@protected`: the whole public way in for functions and `async def`."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from typing import TYPE_CHECKING, overload

from etcdreplica.app.link import ASKING
from etcdreplica.app.program import default_name
from etcdreplica.app.session import Session, only_one
from etcdreplica.errors import UsageError
from etcdreplica.words import check_degree, check_name, check_stop_timeout, parse_keep, parse_style

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
    from typing import Any, Concatenate, ParamSpec, TypeVar

    from etcdreplica.app.replica import Replica
    from etcdreplica.model import Override

    P = ParamSpec("P")
    R = TypeVar("R")

_CO_VARARGS, _CO_COROUTINE = 0x04, 0x80  # as in inspect, which costs 8 ms to import


@overload
def protected(function: Callable[Concatenate[Replica, P], R], /) -> Callable[P, R]: ...
@overload
def protected(
    *,
    style: str = "warm",
    degree: int = 2,
    name: str | None = None,
    hosts: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    keep: str = "until-done",
    stop_timeout: float = 10.0,
    overrides: Mapping[str, Override] | None = None,
) -> Callable[[Callable[Concatenate[Replica, P], R]], Callable[P, R]]: ...
def protected(
    function: Callable[..., Any] | None = None,
    /,
    *,
    style: str = "warm",
    degree: int = 2,
    name: str | None = None,
    hosts: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    keep: str = "until-done",
    stop_timeout: float = 10.0,
    overrides: Mapping[str, Override] | None = None,
) -> Any:
    """Protect a function or `async def`: calling it makes this process a replica of an application.

    The decorated call registers the application with this host's WatchDog, waits until this copy's turn, and runs the
    body with a `Replica` as first argument (a body without parameters is called without). It returns what the body
    returns. The same program is started on the other hosts and reaches the same call there.

    Args:
        style: "cold" (backups do not run), "warm" (they wait inside the call) or "hot" (the body runs on all).
        degree: number of copies, 1 to 30; the primary counts.
        name: of the application; by default that of the script or module.
        hosts: names of the hosts that may run it; by default all.
        labels: what a host's labels must contain.
        keep: "until-done" (a body that returns completes the application everywhere) or "always" (it is run again).
        stop_timeout: seconds a copy gets to end when it is asked to, before it is killed.
        overrides: by host name, what differs there (interpreter, command, directory, environment).

    Raises:
        UsageError: here, for a bad argument; nothing has been changed.
        NoWatchDogError, RefusedError: when the decorated function is called.
    """
    if isinstance(hosts, str):
        raise UsageError(f"hosts must be a list of names, not the text {hosts!r}")
    allowed = tuple(dict.fromkeys(check_name("host name", host) for host in hosts or ()))
    options = {
        "style": parse_style(style).value,
        "degree": check_degree(degree, allowed),
        "hosts": allowed,
        "labels": _check_labels(labels or {}),
        "keep": parse_keep(keep).value,
        "stop_timeout_s": check_stop_timeout(stop_timeout),
        "overrides": {check_name("host name", host): _plain(given) for host, given in (overrides or {}).items()},
    }
    if name is not None:
        options["name"] = check_name("application name", name)

    def protect(body: Callable[..., Any]) -> Callable[..., Any]:
        return _protect(body, options)

    return protect if function is None else protect(function)


def is_protected(function: object) -> bool:
    """Whether `@protected` made it."""
    return hasattr(function, "__etcdreplica__")


def _protect(body: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    if isinstance(body, type) or not callable(body):
        raise UsageError(f"@protected takes a function or an async function, not {body!r}")
    is_async, takes_replica = _shape(body)

    def session() -> Session:
        return Session({"name": default_name(body), **options})

    def call(replica: Replica, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return body(replica, *args, **kwargs) if takes_replica else body(*args, **kwargs)

    if is_async:

        @functools.wraps(body)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            return await _run_async(session, lambda replica: call(replica, args, kwargs))

        wrapper: Callable[..., Any] = run_async
    else:

        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> Any:
            return _run(session, lambda replica: call(replica, args, kwargs))

        wrapper = run
    wrapper.__etcdreplica__ = True  # type: ignore[attr-defined]
    return wrapper


def _shape(body: Callable[..., Any]) -> tuple[bool, bool]:
    """Return whether it is an `async def`, and whether it takes a replica."""
    code = getattr(body, "__code__", None)
    if code is not None and not hasattr(body, "__self__") and not hasattr(body, "__wrapped__"):
        return bool(code.co_flags & _CO_COROUTINE), bool(code.co_argcount or code.co_flags & _CO_VARARGS)
    import inspect

    return inspect.iscoroutinefunction(body), bool(inspect.signature(body).parameters)


def _check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    if not hasattr(labels, "items") or not all(isinstance(x, str) for pair in labels.items() for x in pair):
        raise UsageError(f"labels must be texts by name, as {{'zone': 'a'}}, not {labels!r}")
    return dict(labels)


def _plain(override: Override) -> dict[str, Any]:
    import attrs

    if not attrs.has(type(override)):
        raise UsageError(f"overrides takes etcdreplica.Override for each host, not {override!r}")
    return attrs.asdict(override)


@contextlib.contextmanager
def _connected(make_session: Callable[[], Session]) -> Iterator[Session]:
    with only_one():
        session = make_session()
        session.connect()
        try:
            yield session
        finally:
            session.close()


def _run(make_session: Callable[[], Session], call: Callable[[Replica], Any]) -> Any:
    with _connected(make_session) as session, session.signals():
        replica = session.wait_for_turn()
        session.begin()
        try:
            result = call(replica)
        except BaseException as error:
            session.end(error)
            raise
        session.end(None)
        return result


async def _run_async(make_session: Callable[[], Session], call: Callable[[Replica], Coroutine[Any, Any, Any]]) -> Any:
    import asyncio

    with _connected(make_session) as session, _loop_signals(session, asyncio.get_running_loop()):
        replica = await asyncio.to_thread(session.wait_for_turn)
        session.begin()
        try:
            result = await call(replica)
        except BaseException as error:
            await asyncio.to_thread(session.end, error)
            raise
        await asyncio.to_thread(session.end, None)
        return result


@contextlib.contextmanager
def _loop_signals(session: Session, loop: AbstractEventLoop) -> Iterator[None]:
    """The same as `Session.signals` for a body that runs in a loop, which has its own way to be woken by signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ASKING}

    def restore() -> None:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def ask() -> None:
        restore()
        session.ask_to_leave()

    for number in ASKING:
        loop.add_signal_handler(number, ask)
    try:
        yield
    finally:
        restore()
