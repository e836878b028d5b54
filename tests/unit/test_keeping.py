"""`replica.checkpoint`, `restore` and `state` in a protected call; the test is WatchDog and CheckpointServer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdreplica import protected
from etcdreplica.app.protocol import STANDALONE_ENV, Message
from etcdreplica.errors import UsageError
from tests.unit.checkpoint_end import ServerEnd
from tests.unit.watchdog_end import Application, Connection, WatchDogEnd

PROGRAM = textwrap.dedent(
    '''
    """Store what is asked for; the first argument is the style, the second the interval or "-", the third what to do."""

    import asyncio, sys, threading
    from etcdreplica import EtcdReplicaError, protected

    style, interval, action = sys.argv[1:4]
    options = {"style": style, "degree": 2, "name": "shop", "checkpoint_interval": None if interval == "-" else float(interval)}
    state = {"count": 0}
    seen = threading.Event()

    def say(*words):
        print(*words, flush=True)

    def begin(replica):
        def provider():
            state["count"] += 1
            state["thread"] = threading.current_thread().name
            if action == "raise" and state["count"] == 1:
                raise ValueError("from the provider")
            return state

        replica.state(provider)
        try:
            say("restored", replica.restore({"count": -1}) if action == "restore" else "nothing")
            if action == "wait":
                replica.checkpoint(b"mine", wait=True, timeout=2.0)
                say("stored")
        except EtcdReplicaError as error:
            say(type(error).__name__, error)

    @protected(**options, on_checkpoint=lambda state: say("seen", state))
    def main(replica):
        begin(replica)
        replica.wait()
        say("stopping")

    @protected(**options)
    async def main_async(replica):
        begin(replica)
        while not replica.stopping:
            await asyncio.sleep(0.005)
        say("stopping")

    # No debug mode: it tells of slow steps, which every machine that is busy has.
    asyncio.run(main_async(), debug=False) if "async" in sys.argv else main()
    say("returned")
    '''
)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Return the application."""
    path = tmp_path / "app.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def server(watchdog: WatchDogEnd, tmp_path: Path) -> Iterator[ServerEnd]:
    """Be the CheckpointServer beside the WatchDog."""
    end = ServerEnd(tmp_path)
    yield end
    end.close()


def started(watchdog: WatchDogEnd, program: Path, *arguments: str, role: str = "primary") -> tuple[Application, Connection]:
    """Start the application and give it a place."""
    application = watchdog.start(program, *arguments)
    connection = watchdog.accept()
    connection.expect("hello")
    connection.welcome(role)
    return application, connection


def handed(application: Application, message: Message) -> bytes:
    """Return the state that a message of another process hands over."""
    fd = os.open(f"/proc/{application.process.pid}/fd/{message['fd']}", os.O_RDONLY)
    try:
        return os.pread(fd, int(message["size"]), 0)
    finally:
        os.close(fd)


def decoded(application: Application, message: Message) -> Any:
    """Return that state as what it was."""
    import msgspec

    return msgspec.msgpack.decode(handed(application, message))


def keep(server: Connection) -> Message:
    """Take the next state, and say that it is durable."""
    message = server.expect("store")
    server.send("kept", sequence=message["sequence"])
    if message["wait"]:
        server.send("reached", sequence=message["sequence"], hosts=2, done=True, trouble="")
    return message


# --- protected -----------------------------------------------------------------------------------------------------------


def test_body_stores_and_waits(watchdog: WatchDogEnd, server: ServerEnd, program: Path) -> None:
    """With the epoch that the WatchDog gave."""
    application, connection = started(watchdog, program, "warm", "-", "wait")
    assert application.line() == "restored nothing"
    states = server.accept()
    message = states.expect("store")
    assert (message["epoch"], message["copies"], handed(application, message)) == (5, 2, b"mine")
    states.send("reached", sequence=1, hosts=2, done=True, trouble="")
    assert application.line() == "stored"
    connection.until("running")


def test_body_restores(watchdog: WatchDogEnd, server: ServerEnd, program: Path) -> None:
    """As the primary that it is: the server refuses older ones from then on."""
    application, _ = started(watchdog, program, "cold", "-", "restore")
    states = server.accept()
    question = states.expect("restore")
    assert question["epoch"] == 5
    states.send("found", question=question["question"], **server.file(b"\x81\xa5count\x07", codec="msgpack"))
    assert application.line() == "restored {'count': 7}"


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
def test_provider_is_asked_again_and_again(
    watchdog: WatchDogEnd, server: ServerEnd, program: Path, mode: tuple[str, ...]
) -> None:
    """In a thread of its own, for an `async def` in its event loop."""
    application, _ = started(watchdog, program, "warm", "0.01", "-", *mode)
    assert application.line() == "restored nothing"
    states = server.accept()
    counts = []
    for _ in range(3):
        message = states.expect("store")
        state = decoded(application, message)
        counts.append(state["count"])
        assert state["thread"] == ("MainThread" if mode else "etcdreplica state")
        states.send("kept", sequence=message["sequence"])
    assert counts == sorted(set(counts))


def test_provider_that_raises_is_asked_again(watchdog: WatchDogEnd, server: ServerEnd, program: Path) -> None:
    """What it raised is in the log."""
    application, connection = started(watchdog, program, "warm", "0.01", "raise")
    states = server.accept()
    assert decoded(application, states.expect("store"))["count"] > 1
    application.end()
    assert "the state function of shop raised" in application.errors
    connection.close()


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
def test_last_state_is_stored_at_a_handover(
    watchdog: WatchDogEnd, server: ServerEnd, program: Path, mode: tuple[str, ...]
) -> None:
    """Durably, before the WatchDog is told, and asked for where the body ran."""
    application, connection = started(watchdog, program, "warm", "-", "-", *mode)
    assert application.line() == "restored nothing"
    connection.until("running")
    connection.send("stop")
    assert application.line() == "stopping"
    states = server.accept()
    message = states.expect("store")
    assert message["wait"] is True
    assert decoded(application, message) == {"count": 1, "thread": "MainThread"}
    states.send("reached", sequence=message["sequence"], hosts=2, done=True, trouble="")
    assert application.line() == "returned"
    assert application.wait() == 0
    assert application.errors == ""


def test_backup_follows_and_sees(watchdog: WatchDogEnd, server: ServerEnd, program: Path) -> None:
    """A warm backup is told of each checkpoint while it waits, and restores what it holds."""
    application, connection = started(watchdog, program, "warm", "-", "restore", role="backup")
    states = server.accept()
    states.expect("follow")
    told = server.file(b"\x81\xa5count\x07", codec="msgpack", sequence=3)
    states.send("newest", **told)
    assert application.line() == "seen {'count': 7}"
    connection.send("role", role="primary", epoch=6)
    question = states.expect("restore")
    assert (question["epoch"], question["loaded"]) == (6, [1, 3])
    Path(told["path"]).unlink()
    states.send("found", question=question["question"], **told)
    assert application.line() == "restored {'count': 7}"


@pytest.mark.parametrize("style", ["cold", "hot"])
def test_only_warm_backups_follow(watchdog: WatchDogEnd, server: ServerEnd, program: Path, style: str) -> None:
    """A hot one has its state by itself; its first word to the server is a question as one that only reads."""
    application, connection = started(watchdog, program, style, "-", "restore", role="backup")
    if style == "cold":
        connection.send("role", role="primary", epoch=6)
    question = server.accept().expect("restore")
    assert question["epoch"] == (6 if style == "cold" else 0)
    application.end()


# --- unprotected ---------------------------------------------------------------------------------------------------------


def test_standalone() -> None:
    """The default is restored, nothing is kept, and what cannot be stored fails here too."""
    source = textwrap.dedent(
        """
        import json
        from etcdreplica import EtcdReplicaError, protected

        @protected(style="warm", degree=2, name="shop", checkpoint_interval=0.01)
        def main(replica):
            found = replica.restore({"count": 0})
            replica.checkpoint(found, wait=True, timeout=0)
            replica.checkpoint(found)
            replica.state(lambda: found)
            try:
                replica.checkpoint(object())
            except EtcdReplicaError as error:
                return found, type(error).__name__, replica.restore()

        print(json.dumps(main()))
        """
    )
    environment = {**os.environ, STANDALONE_ENV: "1"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [{"count": 0}, "UsageError", None]
    assert done.stderr == ""


# --- arguments -----------------------------------------------------------------------------------------------------------


async def asynchronous(state: object) -> None:
    """Be no callback."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec": "json"}, "a codec is 'msgpack', 'pickle', a type"),
        ({"codec": None}, "a codec is"),
        ({"codec": object()}, "a codec is"),
        ({"checkpoint_interval": 0}, "checkpoint_interval"),
        ({"checkpoint_interval": 0.001}, "checkpoint_interval"),
        ({"checkpoint_interval": -1.0}, "checkpoint_interval"),
        ({"checkpoint_interval": float("nan")}, "checkpoint_interval"),
        ({"checkpoint_interval": float("inf")}, "checkpoint_interval"),
        ({"checkpoint_interval": "1"}, "checkpoint_interval"),
        ({"on_checkpoint": "print"}, "on_checkpoint must be a function, not 'print'"),
        ({"on_checkpoint": 0}, "on_checkpoint must be a function, not 0"),
        ({"on_checkpoint": asynchronous}, "on_checkpoint must be an ordinary function, not the async"),
    ],
)
def test_bad_arguments_are_refused_at_decoration(arguments: dict[str, Any], message: str) -> None:
    """Before anything has happened; the message names what is wrong."""
    with pytest.raises(UsageError, match=message):
        protected(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"codec": "pickle", "checkpoint_interval": 0.01, "on_checkpoint": print},
        {"codec": dict[str, int], "checkpoint_interval": None, "on_checkpoint": None},
    ],
)
def test_good_arguments(arguments: dict[str, Any]) -> None:
    """They are taken as they are."""
    assert callable(protected(**arguments)(lambda replica: None))
