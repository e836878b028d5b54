"""`@protected`: what it refuses at once, running unprotected, and what a call says when no WatchDog answers."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from etcdreplica import NoWatchDogError, Override, RefusedError, Replica, Role, UsageError, protected, update
from etcdreplica.app.protocol import SOCKET_ENV, STANDALONE_ENV


@pytest.fixture
def standalone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run unprotected."""
    monkeypatch.setenv(STANDALONE_ENV, "1")


@pytest.fixture
def no_watchdog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Point to a socket on which nobody listens."""
    path = tmp_path / "s"
    monkeypatch.delenv(STANDALONE_ENV, raising=False)
    monkeypatch.setenv(SOCKET_ENV, str(path))
    return path


def body(replica: Replica) -> tuple[Role, int]:
    """Tell what the replica is."""
    return replica.role, replica.epoch


# --- at decoration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "lukewarm"}, "unknown style 'lukewarm': use one of cold, warm, hot"),
        ({"style": None}, "unknown style None"),
        ({"degree": 0}, "bad degree 0"),
        ({"degree": -1}, "bad degree -1"),
        ({"degree": True}, "bad degree True"),
        ({"degree": 1.5}, r"bad degree 1\.5"),
        ({"degree": "2"}, "bad degree '2'"),
        ({"degree": 31}, "bad degree 31: .* from 1 to 30"),
        ({"degree": 3, "hosts": ["a", "b"]}, "degree 3 cannot be met on 2 host"),
        ({"degree": 2, "hosts": ["a", "a"]}, "degree 2 cannot be met on 1 host"),
        ({"name": ""}, "bad application name ''"),
        ({"name": "a/b"}, "bad application name 'a/b'"),
        ({"name": 7}, "bad application name 7"),
        ({"hosts": "host-a"}, "hosts must be a list of names, not the text 'host-a'"),
        ({"hosts": ["a", "b/c"]}, "bad host name 'b/c'"),
        ({"hosts": [1, 2]}, "bad host name 1"),
        ({"keep": "for ever"}, "unknown keep 'for ever': use one of until-done, always"),
        ({"stop_timeout": -1}, "bad stop_timeout -1"),
        ({"stop_timeout": "soon"}, "bad stop_timeout 'soon'"),
        ({"overrides": {"a": {"cwd": "/"}}}, "overrides takes etcdreplica.Override"),
        ({"overrides": {"a/b": Override()}}, "bad host name 'a/b'"),
        ({"labels": "zone=x"}, "labels"),
        ({"probes": "tcp:80"}, "probes must be a list, not the text 'tcp:80'"),
        ({"probes": ["tcp:0"]}, "bad probe 'tcp:0'"),
        ({"probes": ["call"]}, 'a probe "call" needs a function'),
        ({"probes": ["call", "call"], "health": int}, 'only one probe "call"'),
        ({"probes": [80]}, "a probe is a text or an etcdreplica.Probe, not 80"),
        ({"health": 7}, "health must be a function, not 7"),
        ({"health": asyncio.sleep}, "health must be an ordinary function, not the async"),
        ({"health": functools.partial(asyncio.sleep, 1)}, "health must be an ordinary function, not the async"),
        ({"health": body}, "health is called without arguments"),
        ({"labels": {"zone": 1}}, "labels"),
    ],
)
def test_bad_option_is_refused_at_decoration(options: dict[str, Any], message: str) -> None:
    """A mistake shows where it is made, not when the application starts, and not as somebody else's error."""
    with pytest.raises(UsageError, match=message):
        protected(**options)(body)


@pytest.mark.parametrize("health", [dict, time.time, [].clear, functools.partial(max, 1, 2), lambda x=1: x])
def test_health_may_be_whatever_can_be_called(health: Callable[..., object]) -> None:
    """Functions, methods, types and builtins, as long as they ask for nothing."""
    protected(health=health)(body)


def test_unknown_option_is_a_type_error() -> None:
    """As with any function."""
    with pytest.raises(TypeError, match="styl"):
        protected(styl="warm")  # type: ignore[call-overload]


@pytest.mark.parametrize("thing", [7, "main", object()])
def test_only_functions_and_classes_are_decorated(thing: Any) -> None:
    """Other things never."""
    with pytest.raises(UsageError, match="takes a function, an async function or a class"):
        protected(thing)
    with pytest.raises(UsageError, match="takes a function, an async function or a class"):
        protected(style="hot")(thing)


class Plain:
    """A class that can be an object."""

    @update
    def change(self) -> None:
        """Do nothing."""


def test_class_stays_as_it_is() -> None:
    """It can be made and called without a cluster; only serve makes a replica of this process."""
    found = protected(style="hot", degree=3)(Plain)
    assert found is Plain
    Plain().change()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"style": "hot", "degree": 2, "min_in_sync": 3}, "min_in_sync"),
        ({"style": "warm", "min_in_sync": 2}, "style hot"),
        ({"style": "cold", "durable": True}, "style hot"),
        ({"style": "hot", "on_checkpoint": print}, "on_checkpoint is for functions"),
    ],
)
def test_options_that_do_not_fit_a_class(options: dict[str, Any], what: str) -> None:
    """They are refused where they stand."""
    with pytest.raises(UsageError, match=what):
        protected(**options)(Plain)


def test_options_of_classes_are_refused_for_functions() -> None:
    """A function has no in-sync set and no log."""
    for options in ({"min_in_sync": 2}, {"durable": True}):
        with pytest.raises(UsageError, match="are for classes"):
            protected(**options)(body)


def test_class_without_methods_for_clients() -> None:
    """It could do nothing."""
    with pytest.raises(UsageError, match="no method marked"):
        protected(type("Nothing", (), {}))


def test_decorated_function_looks_like_itself() -> None:
    """Name, documentation and module stay, and the body can still be had."""
    decorated = protected(body)
    assert (decorated.__name__, decorated.__doc__) == ("body", body.__doc__)
    assert decorated.__wrapped__ is body  # type: ignore[attr-defined]


# --- unprotected ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("standalone")
def test_bare_decorator() -> None:
    """`@protected` without parentheses takes the defaults."""
    assert protected(body)() == (Role.PRIMARY, 1)


@pytest.mark.usefixtures("standalone")
@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_standalone_runs_the_body_as_primary(style: str) -> None:
    """On a laptop every style is one primary, with the first epoch."""
    assert protected(style=style, degree=3)(body)() == (Role.PRIMARY, 1)


@pytest.mark.usefixtures("standalone")
def test_arguments_and_result_pass_through() -> None:
    """The caller gives the body's own arguments; the replica comes before them."""

    @protected(name="shop")
    def main(replica: Replica, a: int, *more: int, key: str) -> list[object]:
        """Return everything."""
        return [replica.name, a, more, key]

    assert main(1, 2, 3, key="x") == ["shop", 1, (2, 3), "x"]


@pytest.mark.usefixtures("standalone")
def test_body_without_parameters() -> None:
    """A body that takes nothing is called with nothing."""

    def main() -> str:
        """Return a word."""
        return "ran"

    decorate: Callable[[Any], Callable[[], str]] = protected(name="shop")
    assert decorate(main)() == "ran"


@pytest.mark.usefixtures("standalone")
def test_body_under_another_decorator() -> None:
    """What counts is the function somebody wrote, not the wrapper around it."""

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @logged
    def alone() -> str:
        """Take nothing."""
        return "ran"

    assert protected(alone)() == "ran"
    assert protected(logged(body))() == (Role.PRIMARY, 1)


@pytest.mark.usefixtures("standalone")
def test_bound_method_and_partial() -> None:
    """Anything callable with a signature can be a body."""

    class Service:
        """Has a method."""

        def run(self, replica: Replica) -> Role:
            """Return the role."""
            return replica.role

        def stay(self) -> str:
            """Return a word."""
            return "ran"

    assert protected(name="shop")(Service().run)() is Role.PRIMARY
    alone: Any = Service().stay
    assert protected(name="shop")(alone)() == "ran"


@pytest.mark.usefixtures("standalone")
def test_async_body() -> None:
    """An `async def` is awaited by its caller."""

    @protected
    async def main(replica: Replica, word: str) -> tuple[str, Role]:
        """Return after a turn of the loop."""
        await asyncio.sleep(0)
        return word, replica.role

    assert asyncio.run(main("x")) == ("x", Role.PRIMARY)


@pytest.mark.usefixtures("standalone")
def test_async_body_without_parameters() -> None:
    """An `async def` that takes nothing is called with nothing."""

    async def main() -> str:
        """Return a word."""
        return "ran"

    decorate: Callable[[Any], Any] = protected(name="shop")
    assert asyncio.run(decorate(main)()) == "ran"


@pytest.mark.usefixtures("standalone")
def test_error_of_the_body_reaches_the_caller() -> None:
    """Nothing is swallowed, and the next call works."""

    @protected
    def main(replica: Replica, fail: bool) -> str:
        """Fail if told to."""
        if fail:
            raise KeyError(replica.name)
        return "ran"

    @protected
    async def main_async(replica: Replica) -> None:
        """Fail."""
        raise KeyError(replica.name)

    with pytest.raises(KeyError):
        main(True)
    with pytest.raises(KeyError):
        asyncio.run(main_async())
    assert main(False) == "ran"


@pytest.mark.usefixtures("standalone")
def test_handle_works_unprotected() -> None:
    """All that a body may call does nothing harmful without a WatchDog."""

    @protected
    def main(replica: Replica) -> bool:
        """Use everything."""
        replica.heartbeat()
        replica.advertise("tcp:1")
        assert replica.host
        seen = replica.on_role_change(lambda role, epoch: None)
        assert callable(seen)
        return replica.stopping or replica.wait(0)

    assert main() is False


@pytest.mark.usefixtures("standalone")
@pytest.mark.parametrize("endpoint", ["", "x" * 1025, None, 7])
def test_bad_endpoint(endpoint: Any) -> None:
    """An endpoint is a text of some length."""
    with pytest.raises(UsageError, match="bad endpoint"):
        protected(lambda replica: replica.advertise(endpoint))()


@pytest.mark.usefixtures("standalone")
def test_callback_must_be_callable() -> None:
    """The mistake shows at once, not at the fail-over."""
    with pytest.raises(UsageError, match="on_role_change needs something to call"):
        protected(lambda replica: replica.on_role_change(None))()  # type: ignore[arg-type]


def test_standalone_program_may_be_typed_in() -> None:
    """What runs unprotected is started nowhere else, so it need not be a file: interpreters and notebooks will do."""
    source = "from etcdreplica import protected\n@protected\ndef main(replica): print(replica.role)\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-"], input=source, env={**os.environ, STANDALONE_ENV: "1"}, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.returncode) == ("primary\n", 0), done.stderr


# --- protected -----------------------------------------------------------------------------------------------------------


def test_no_watchdog(no_watchdog: Path) -> None:
    """The error names the socket and what to do, and the body does not run."""
    with pytest.raises(NoWatchDogError) as caught:
        protected(lambda replica: pytest.fail("the body ran"))()
    message = str(caught.value)
    assert str(no_watchdog) in message
    assert "etcdreplica node" in message
    assert f"{STANDALONE_ENV}=1" in message
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.usefixtures("no_watchdog")
def test_no_watchdog_async() -> None:
    """The same for an `async def`."""

    @protected
    async def main(replica: Replica) -> None:
        """Do not run."""
        pytest.fail("the body ran")

    with pytest.raises(NoWatchDogError):
        asyncio.run(main())


def test_socket_path_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that the kernel cannot take is no WatchDog either."""
    monkeypatch.delenv(STANDALONE_ENV, raising=False)
    monkeypatch.setenv(SOCKET_ENV, "/" + "x" * 200)
    with pytest.raises(NoWatchDogError, match="too long"):
        protected(body)()


@pytest.mark.usefixtures("standalone")
def test_one_protected_call_at_a_time() -> None:
    """A process is one replica; a call inside or beside another is refused, and a later one is not."""

    @protected
    def inner(replica: Replica) -> str:
        """Return a word."""
        return "ran"

    @protected
    def outer(replica: Replica) -> None:
        """Call the other one, here and in another thread."""
        with pytest.raises(RefusedError, match="one protected call runs at a time"):
            inner()
        refused: list[RefusedError] = []

        def beside() -> None:
            """Call it in a thread."""
            try:
                inner()
            except RefusedError as error:
                refused.append(error)

        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        assert len(refused) == 1

    outer()
    assert inner() == "ran"


@pytest.mark.usefixtures("no_watchdog")
def test_failed_call_can_be_tried_again() -> None:
    """A call that found no WatchDog leaves nothing locked."""
    for _ in range(2):
        with pytest.raises(NoWatchDogError):
            protected(body)()
