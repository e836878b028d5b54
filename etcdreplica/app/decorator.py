"""`@protected`: the whole public way in for functions and `async def`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from attrs import evolve, frozen

from etcdreplica.app.program import capture, default_name
from etcdreplica.app.replica import Replica
from etcdreplica.app.session import Session, only_one
from etcdreplica.errors import UsageError
from etcdreplica.model import Keep, Override, Program, Registration, parse_style

P = ParamSpec("P")
R = TypeVar("R")
ATTRIBUTE = "__etcdreplica__"


@frozen
class Protection:
    """What the decorator was told; `registration` adds what only the running process knows."""

    function: Callable[..., Any]
    template: Registration
    name: str | None

    def registration(self) -> Registration:
        """Return the registration of the program this process runs."""
        return evolve(self.template, name=self.name or default_name(self.function), program=capture())


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
    if function is None:
        return functools.partial(
            _protect,
            style=style,
            degree=degree,
            name=name,
            hosts=hosts,
            labels=labels,
            keep=keep,
            stop_timeout=stop_timeout,
            overrides=overrides,
        )
    return _protect(
        function,
        style=style,
        degree=degree,
        name=name,
        hosts=hosts,
        labels=labels,
        keep=keep,
        stop_timeout=stop_timeout,
        overrides=overrides,
    )


def _protect(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    if inspect.isclass(function) or not callable(function):
        raise UsageError(f"@protected takes a function or an async function, not {function!r}")
    protection = Protection(function, _template(**options), options["name"])
    takes_replica = bool(inspect.signature(function).parameters)

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            return await _run_async(protection, (lambda r: (r, *args)) if takes_replica else (lambda _: args), kwargs)

        wrapper: Callable[..., Any] = run_async
    else:

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return _run(protection, (lambda r: (r, *args)) if takes_replica else (lambda _: args), kwargs)

        wrapper = run
    setattr(wrapper, ATTRIBUTE, protection)
    return wrapper


def _template(
    *,
    style: str,
    degree: int,
    name: str | None,
    hosts: Sequence[str] | None,
    labels: Mapping[str, str] | None,
    keep: str,
    stop_timeout: float,
    overrides: Mapping[str, Override] | None,
) -> Registration:
    if isinstance(hosts, str):
        raise UsageError(f"hosts must be a list of names, not the text {hosts!r}")
    if keep not in list(Keep):
        raise UsageError(f"unknown keep {keep!r}: use one of {', '.join(Keep)}")
    return Registration(
        name="unnamed" if name is None else name,
        style=parse_style(style),
        degree=degree,
        program=Program((), ""),
        hosts=tuple(dict.fromkeys(hosts or ())),
        labels=dict(labels or {}),
        keep=Keep(keep),
        stop_timeout_s=float(stop_timeout),
        overrides=dict(overrides or {}),
    )


def _run(protection: Protection, arguments: Callable[[Replica], tuple[Any, ...]], kwargs: Mapping[str, Any]) -> Any:
    with only_one():
        session = Session(protection.registration())
        with session.signals():
            session.open()
            replica = session.wait_for_turn()
            return _ended(session, protection.function, arguments(replica), kwargs)


def _ended(session: Session, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    session.begin()
    try:
        result = function(*args, **kwargs)
    except BaseException as error:
        session.end(error)
        raise
    session.end(None)
    return result


async def _run_async(protection: Protection, arguments: Callable[[Replica], tuple[Any, ...]], kwargs: Mapping[str, Any]) -> Any:
    import asyncio

    def prepare() -> Replica:
        session.open()
        return session.wait_for_turn()

    with only_one():
        session = Session(protection.registration())
        with session.signals():
            replica = await asyncio.to_thread(prepare)
            session.begin()
            body: Coroutine[Any, Any, Any] = protection.function(*arguments(replica), **kwargs)
            try:
                result = await body
            except BaseException as error:
                await asyncio.to_thread(session.end, error)
                raise
            await asyncio.to_thread(session.end, None)
            return result
