"""The WatchDog's end of the local socket, moved by hand, and a real application process at the other."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etcdreplica.app.protocol import DETACH_ENV, INCARNATION_ENV, SOCKET_ENV, STANDALONE_ENV, Decoder, Message, encode
from etcdreplica.clock import boottime

LIMIT_S = 30.0  # after which an expected event counts as missing
REPEATED = 8
INCARNATION = 42  # of every copy here
ANY_TIME = frozenset({"page", "notice", "running"})  # messages that may come between others
SOURCE = textwrap.dedent(
    '''
    """Print what happens; the first argument is the style, the second what the body does."""

    import asyncio, os, sys, threading
    from etcdreplica import EtcdReplicaError, protected

    style, action = sys.argv[1:3]

    def say(*words):
        print(*words, flush=True)

    def use(replica):
        say("body", replica.role, replica.epoch, replica.host, replica.name)

        @replica.on_role_change
        def first(role, epoch):
            if action == "callback-raises":
                raise ValueError("from the callback")
            if action == "callback-exits":
                sys.exit(3)

        @replica.on_role_change
        def second(role, epoch):
            say("role", role, epoch)

        say("registered callbacks")
        if action == "return":
            return 7
        if action == "raise":
            raise ValueError("b\\u00f6se")
        if action.startswith("exit-"):
            sys.exit(int(action[5:]))
        if action == "beat":
            for _ in range(1000):
                replica.heartbeat()
        if action in ("advertise", "beat"):
            replica.advertise("tcp:1")
        if action == "chatter":
            while not replica.stopping:
                replica.advertise("tcp:1")
        if action == "linger":
            return 7
        if action == "ignore":
            threading.Event().wait()
        return None

    @protected(style=style, degree=2, name="shop", stop_timeout=3.0)
    def main(replica):
        result = use(replica)
        if result is None:
            replica.wait()
            say("stopping", replica.epoch)
        return result

    @protected(style=style, degree=2, name="shop")
    async def main_async(replica):
        result = use(replica)
        while result is None and not replica.stopping:
            await asyncio.sleep(0.005)
        return result

    def run():
        return asyncio.run(main_async()) if "async" in sys.argv else main()

    try:
        if action == "repeat":
            for _ in range(8):
                action = "return"
                run()
                say("open files", len(os.listdir("/proc/self/fd")))
        say("returned", run())
        if action == "linger":
            threading.Event().wait()
    except EtcdReplicaError as error:
        say(type(error).__name__, error)
        sys.exit(4)
    '''
)


class Connection:
    """One application's connection as its WatchDog sees it."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer
        self._socket.settimeout(LIMIT_S)
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self.deadline = 0.0  # what `welcome` made of the seconds that are left

    def receive(self) -> Message | None:
        """Return the next message, or None when the application hung up."""
        while not self._messages:
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._messages.extend(self._decoder.feed(data))
        return self._messages.popleft()

    def expect(self, kind: str) -> Message:
        """Return the next message, which must be of this kind, but for those that may come at any time before."""
        passing = ANY_TIME - {kind}
        while (message := self.receive()) is not None and message["type"] in passing:
            continue
        assert message is not None, f"the application hung up instead of sending {kind}"
        assert message["type"] == kind, message
        return message

    def until(self, *kinds: str) -> dict[str, Message]:
        """Return all messages by kind, once there is one of each of these."""
        seen: dict[str, Message] = {}
        while not seen.keys() >= set(kinds):
            message = self.receive()
            assert message is not None, f"the application hung up instead of sending {kinds}, after {seen}"
            seen[message["type"]] = message
        return seen

    def rest(self) -> list[str]:
        """Return the kinds of all messages until the application hangs up, but for those that may come at any time."""
        kinds = []
        while (message := self.receive()) is not None:
            kinds.append(message["type"])
        return [kind for kind in kinds if kind not in ANY_TIME]

    def welcome(self, role: str = "primary", *, left: float | None = None, **fields: Any) -> None:
        """Give the application a place with epoch 5. With `until`, or with so many seconds `left`, it has a deadline."""
        if left is not None:
            fields["until"] = self.deadline = boottime() + left
        self.send("welcome", **{"host": "host-a", "role": role, "epoch": 5, "incarnation": INCARNATION, **fields})

    def send(self, kind: str, **fields: Any) -> None:
        """Send one message."""
        self.send_bytes(encode(kind, **fields))

    def send_bytes(self, data: bytes) -> None:
        """Send anything."""
        self._socket.sendall(data)

    def close(self) -> None:
        """Hang up, as a WatchDog that died."""
        self._socket.close()


class Application:
    """A script at work; `line` returns what it prints."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.errors = ""
        self._lines: queue.Queue[str] = queue.Queue()
        self._readers = [threading.Thread(target=self._read_lines), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def line(self) -> str:
        """Return the next line; empty once there is no more."""
        return self._lines.get(timeout=LIMIT_S)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Return the exit code, negative for a signal, once it has ended; `errors` is complete then."""
        code = self.process.wait(LIMIT_S)
        for reader in self._readers:
            reader.join()
        return code

    def end(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.wait()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line.rstrip("\n"))
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as errors:
            self.errors = errors.read()


class WatchDogEnd:
    """Listens on a socket in a directory, starts applications and accepts them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "s"
        self._applications: list[Application] = []
        self._connections: list[Connection] = []
        self.listen()

    def listen(self) -> None:
        """Be there."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.settimeout(LIMIT_S)

    def vanish(self) -> None:
        """Leave no socket to connect to."""
        self._listener.close()
        self.path.unlink()

    def start(self, script: Path, *arguments: str, incarnation: int | None = None, detach: bool = False) -> Application:
        """Start a script, by hand or as a WatchDog does."""
        environment = {name: value for name, value in os.environ.items() if name != STANDALONE_ENV}
        environment[SOCKET_ENV] = str(self.path)
        environment |= {INCARNATION_ENV: str(incarnation)} if incarnation is not None else {}
        environment |= {DETACH_ENV: "1"} if detach else {}
        application = Application([sys.executable, "-X", "dev", str(script), *arguments], environment)
        self._applications.append(application)
        return application

    def accept(self) -> Connection:
        """Return the connection of the next application that reaches its protected call."""
        connection = Connection(self._listener.accept()[0])
        self._connections.append(connection)
        return connection

    def close(self) -> None:
        """End everything."""
        for application in self._applications:
            application.end()
        for connection in self._connections:
            connection.close()
        self._listener.close()


Held = Callable[[], dict[str, Any]]


def guarded() -> dict[str, Any]:
    """Started by a guardian, which ends it at its deadline."""
    return {"incarnation": INCARNATION}


def by_hand() -> dict[str, Any]:
    """Started by hand, with a deadline that the kernel enforces."""
    return {"until": boottime() + 600, "mark": "guardian/shop.1"}


def deadline_of(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of it stands in a welcome."""
    return {name: value for name, value in held.items() if name != "incarnation"}


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something is so that raises no event."""
    until = boottime() + LIMIT_S
    while not condition():
        assert boottime() < until, "it never came true"
        time.sleep(0.005)


def welcomed(
    watchdog: WatchDogEnd,
    script: Path,
    *arguments: str,
    role: str = "primary",
    incarnation: int | None = None,
    **fields: Any,
) -> tuple[Application, Connection]:
    """Start the application, by hand unless it has an incarnation, and give it a place with epoch 5."""
    application = watchdog.start(script, *arguments, incarnation=incarnation)
    connection = watchdog.accept()
    connection.expect("hello")
    connection.welcome(role, **fields)
    return application, connection


def begun(
    watchdog: WatchDogEnd,
    script: Path,
    *arguments: str,
    role: str = "primary",
    incarnation: int | None = None,
    **fields: Any,
) -> tuple[Application, Connection]:
    """Have the body run, with its callbacks registered and, unless it is a short one, announced."""
    application, connection = welcomed(watchdog, script, *arguments, role=role, incarnation=incarnation, **fields)
    assert application.line() == f"body {role} 5 host-a shop"
    assert application.line() == "registered callbacks"
    return application, connection
