"""`@protected`: the whole public way in for functions and `async def`."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar, overload

from etcdreplica.app.keeping import Keeping
from etcdreplica.app.link import ASKING
from etcdreplica.app.program import default_name
from etcdreplica.app.session import Session, only_one
from etcdreplica.app.state import Codec
from etcdreplica.errors import UsageError
from etcdreplica.words import (
    PROBE_CALL,
    Style,
    check_count,
    check_degree,
    check_failsafe,
    check_hang_timeout,
    check_name,
    check_probe,
    check_seconds,
    check_stop_timeout,
    parse_failover,
    parse_keep,
    parse_style,
)

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
    from typing import Any, Concatenate

    from etcdreplica.app.replica import Replica
    from etcdreplica.model import Override, Probe

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
OBJECT_INTERVAL_S = 1.0  # between two checkpoints of an object that is not hot

_CO_VARARGS, _CO_COROUTINE = 0x04, 0x80  # as in inspect, which costs 8 ms to import


class Protect(Protocol):
    """What `protected` with arguments returns."""

    @overload
    def __call__(self, body: type[T], /) -> type[T]: ...
    @overload
    def __call__(self, body: Callable[Concatenate[Replica, P], R], /) -> Callable[P, R]: ...


@overload
def protected(cls: type[T], /) -> type[T]: ...
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
    start_timeout: float = 60.0,
    hang_timeout: float | None = 10.0,
    probes: Sequence[str | Probe] = (),
    health: Callable[[], object] | None = None,
    restarts_here: int = 0,
    max_restarts: int = 10,
    restart_window: float = 600.0,
    failover: str = "safe",
    checkpoint_interval: float | None = None,
    codec: Any = "msgpack",
    on_checkpoint: Callable[[Any], Any] | None = None,
    min_in_sync: int = 1,
    durable: bool = False,
    failsafe: bool = False,
    overrides: Mapping[str, Override] | None = None,
) -> Protect: ...
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
    start_timeout: float = 60.0,
    hang_timeout: float | None = 10.0,
    probes: Sequence[str | Probe] = (),
    health: Callable[[], object] | None = None,
    restarts_here: int = 0,
    max_restarts: int = 10,
    restart_window: float = 600.0,
    failover: str = "safe",
    checkpoint_interval: float | None = None,
    codec: Any = "msgpack",
    on_checkpoint: Callable[[Any], Any] | None = None,
    min_in_sync: int = 1,
    durable: bool = False,
    failsafe: bool = False,
    overrides: Mapping[str, Override] | None = None,
) -> Any:
    """Protect a function, an `async def` or a class: this process becomes a replica of an application.

    The decorated call registers the application with this host's WatchDog, waits until this copy's turn, and runs the
    body with a `Replica` as first argument (a body without parameters is called without). It returns what the body
    returns. The same program is started on the other hosts and reaches the same call there.

    A class with methods marked `@update` and `@query` becomes a replicated object: `etcdreplica.serve(TheClass)` is the call,
    and clients use `etcdreplica.connect`. The class itself stays as it is; its name in lower case is the application's.

    Args:
        style: "cold" (backups do not run), "warm" (they wait inside the call) or "hot" (the body runs on all).
        degree: number of copies, 1 to 30; the primary counts.
        name: of the application; by default that of the script or module.
        hosts: names of the hosts that may run it; by default all.
        labels: what a host's labels must contain.
        keep: "until-done" (a body that returns completes the application everywhere) or "always" (it is run again).
        stop_timeout: seconds a copy gets to end when it is asked to, or when its body has raised, before it is killed.
        start_timeout: seconds a started copy gets to reach this call.
        hang_timeout: seconds without a sign of life after which a copy is killed and replaced; None for never. Signs of
            life are the process's own pulse (no thread of Python runs while C code holds the GIL), the event loop's for an
            `async def`, and `replica.heartbeat()` once it has been called.
        probes: questions put to a running copy, as "tcp:6379", "http://127.0.0.1:8000/health" or "exec:COMMAND", or
            `etcdreplica.Probe` for other timings than every 2 s, 1 s each, 3 failures.
        health: called in a thread of this process every 2 s (or as a `Probe("call", ...)` among `probes` says): when it
            raises, returns False or does not return three times in a row, the copy counts as hung.
        restarts_here: how often in a row a failed primary is started again on its own host before another one takes over.
        max_restarts: failures within `restart_window` seconds after which the application is parked; 0 for never.
        failover: "safe" (a host is lost when its lease has ended) or "fast" (when its peers cannot reach it: sooner, but
            the old copy may run on beside the new one until its deadline; see docs/guarantees.md).
        checkpoint_interval: seconds between two calls of what `replica.state` has been given; None for only at handovers.
        codec: how a state becomes bytes: "msgpack", "pickle", a type (msgpack, decoded as that), or an object with
            `encode(state)` and `decode(data)`.
        on_checkpoint: called in warm backups, in a thread, with the state of each checkpoint that arrives.
        min_in_sync: of a replicated object: updates are refused while fewer copies are in sync.
        durable: of a replicated object: each update is on the disks of all in-sync copies before it is acknowledged, so that
            nothing is lost when all of them end at once.
        failsafe: let the primary run on while etcd is away, as long as the nodes of all its backups can be reached and vouch
            that none of them takes over (docs/etcd-outage.md). Needs a degree of 2 and nodes that reach each other.
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
        "start_timeout_s": check_seconds("start_timeout", start_timeout, 0.1),
        "hang_timeout_s": check_hang_timeout(hang_timeout),
        "probes": _plain_probes(probes, health),
        "restarts_here": check_count("restarts_here", restarts_here),
        "max_restarts": check_count("max_restarts", max_restarts),
        "restart_window_s": check_seconds("restart_window", restart_window, 1),
        "failover": parse_failover(failover).value,
        "failsafe": check_failsafe(failsafe, check_degree(degree, allowed)),
        "overrides": {check_name("host name", host): _plain(given) for host, given in (overrides or {}).items()},
    }
    if name is not None:
        options["name"] = check_name("application name", name)
    if on_checkpoint is not None:
        _check_ordinary("on_checkpoint", on_checkpoint)
    if checkpoint_interval is not None:
        check_seconds("checkpoint_interval", checkpoint_interval, 0.01)
    keeping = Keeping(Codec(codec), checkpoint_interval, on_checkpoint)

    def protect(body: Any) -> Any:
        if isinstance(body, type):
            return _protect_class(body, {**options, "min_in_sync": min_in_sync, "durable": durable}, health, keeping)
        if min_in_sync != 1 or durable:
            raise UsageError("min_in_sync and durable are for classes")
        return _protect(body, options, health, keeping)

    return protect if function is None else protect(function)


class ObjectDefinition:
    """What `serve` finds at a protected class. `run(call)` makes this process a replica, and calls `call(replica)`."""

    def __init__(self, options: Mapping[str, Any], codec: Codec, run: Callable[[Callable[[Replica], Any]], Any]) -> None:
        self.options, self.codec, self.run = options, codec, run


def is_protected(function: object) -> bool:
    """Whether `@protected` made it."""
    return hasattr(function, "__etcdreplica__")


def _protect(
    body: Callable[..., Any], options: Mapping[str, Any], health: Callable[[], object] | None, keeping: Keeping
) -> Callable[..., Any]:
    if not callable(body):
        raise UsageError(f"@protected takes a function, an async function or a class, not {body!r}")
    is_async, takes_replica = _shape(body)

    def session() -> Session:
        return Session({"name": default_name(body), **options}, health, keeping)

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


def _protect_class(cls: type[Any], options: dict[str, Any], health: Callable[[], object] | None, keeping: Keeping) -> type[Any]:
    from etcdreplica.app.methods import methods_of

    methods_of(cls)
    if not cls.__dictoffset__ and not (hasattr(cls, "snapshot") and hasattr(cls, "restore")):
        raise UsageError(f"{cls.__name__} has __slots__: give it methods snapshot() and restore(state), which keep its state")
    check_count("min_in_sync", options["min_in_sync"], 1, options["degree"])
    if keeping.on_checkpoint is not None:
        raise UsageError("on_checkpoint is for functions: an object loads its checkpoints itself")
    if options["style"] != Style.HOT and (options["durable"] or options["min_in_sync"] != 1):
        raise UsageError("min_in_sync and durable are for style hot: under the others a state is kept by its checkpoints")
    options = {"name": check_name("application name", cls.__name__.lower()), **options, "object": True}
    kept = None if options["style"] == Style.HOT else Keeping(Codec(), keeping.interval_s or OBJECT_INTERVAL_S, None)

    def run(call: Callable[[Replica], Any]) -> Any:
        return _run(lambda: Session(options, health, kept), call)

    cls.__etcdreplica__ = ObjectDefinition(options, keeping.codec, run)
    return cls


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


def _plain_probes(probes: Sequence[str | Probe], health: Callable[[], object] | None) -> list[dict[str, Any]]:
    if isinstance(probes, str):
        raise UsageError(f"probes must be a list, not the text {probes!r}")
    if health is not None:
        _check_health(health)
    plain = [{"target": check_probe(probe)} if isinstance(probe, str) else _plain_probe(probe) for probe in probes]
    called = [probe for probe in plain if probe["target"] == PROBE_CALL]
    if called and health is None:
        raise UsageError('a probe "call" needs a function to call: give it as health=')
    if len(called) > 1:
        raise UsageError('there can be only one probe "call", as there is one function to call')
    return plain if health is None or called else [*plain, {"target": PROBE_CALL}]


def _check_ordinary(name: str, given: Callable[..., object]) -> None:
    """Refuse what is no function, and what would only return a coroutine."""
    if not callable(given):
        raise UsageError(f"{name} must be a function, not {given!r}")
    import inspect

    if inspect.iscoroutinefunction(given) or inspect.iscoroutinefunction(type(given).__call__):
        raise UsageError(f"{name} must be an ordinary function, not the async {given!r}: it is called in a thread of its own")


def _check_health(health: Callable[[], object]) -> None:
    """Refuse what cannot be called in a thread without arguments."""
    import inspect

    _check_ordinary("health", health)
    try:
        signature = inspect.signature(health)
    except ValueError:  # a builtin that does not tell
        return
    try:
        signature.bind()
    except TypeError as error:
        raise UsageError(f"health is called without arguments, but {health!r} takes some: {error}") from None


def _plain_probe(probe: Probe) -> dict[str, Any]:
    import attrs

    if not attrs.has(type(probe)):
        raise UsageError(f"a probe is a text or an etcdreplica.Probe, not {probe!r}")
    return attrs.asdict(probe)


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
        session.begin(asyncio.get_running_loop())
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
