"""One protected call: meet the WatchDog, wait for one's turn, run the body, and tell how it ended.

Until the body begins, the calling thread itself reads the socket, so that a promotion costs no thread switch. From then
on a daemon thread does. When the WatchDog goes away nobody can tell this copy any more that it is no longer primary, so
a running copy kills itself at once; its lease then outlives it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

from etcdreplica.app.kernel import die_with_parent, hold_notice
from etcdreplica.app.link import Link
from etcdreplica.app.protocol import DETACH_ENV, INCARNATION_ENV, STANDALONE_ENV, VERSION, default_socket
from etcdreplica.app.replica import Replica
from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError, NoWatchDogError, ProtocolError, RefusedError
from etcdreplica.words import Role, Style

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType
    from typing import Any, NoReturn

    from etcdreplica.app.protocol import Message

PATIENCE_S = 5.0  # after this long without a place, say so
DONE_S = 5.0  # how long to wait until the WatchDog has taken note of the end

_active = threading.Lock()  # a process is one replica at a time


class RegisteredOnly(SystemExit):
    """The application was only registered, as asked: the hosts start its copies, and this process is none of them."""

    def __init__(self, name: str) -> None:
        super().__init__(0)
        self.name = name


class Session:
    """The connection of one protected call. `open`, then `wait_for_turn`, then `begin`, then `end`."""

    def __init__(self, registration: Mapping[str, Any]) -> None:
        """`registration` has the fields of `model.Registration`, as JSON knows them."""
        self._registration = registration
        self._name: str = registration["name"]
        self._link: Link | None = None
        self._begun = threading.Event()
        self._ended = threading.Event()
        self._acknowledged = threading.Event()
        self._leaving = False
        self._body_at = 0.0
        self.replica: Replica | None = None

    def open(self) -> None:
        """Meet the WatchDog and get a place. Raises NoWatchDogError, RefusedError, ProtocolError, RegisteredOnly."""
        name = self._name
        if os.environ.get(STANDALONE_ENV) == "1":
            self.replica = Replica(name, socket.gethostname(), Role.PRIMARY, 1, None)
            return
        self._link = Link(default_socket())
        if self._leaving:
            raise SystemExit(0)
        incarnation = os.environ.get(INCARNATION_ENV)
        if incarnation is None:
            adopt = os.environ.get(DETACH_ENV) != "1"
            self._link.send("hello", version=VERSION, adopt=adopt, registration=self._registration)
        else:
            self._link.send("hello", version=VERSION, app=name, incarnation=int(incarnation))
        try:
            welcome = self._next()
        except BaseException:
            self._link.shut()
            raise
        if welcome["type"] == "ok":
            raise RegisteredOnly(name)
        if welcome["type"] != "welcome":
            raise ProtocolError(f"the WatchDog answered hello with {welcome['type']!r}")
        self.replica = Replica(name, welcome["host"], Role(welcome["role"]), welcome["epoch"], self._link)
        threading.Thread(target=self._listen, name="etcdreplica", daemon=True).start()

    def wait_for_turn(self) -> Replica:
        """Return the handle when the body may run. Raises SystemExit when this copy is to end before."""
        replica = self.replica
        assert replica is not None
        while self._link and self._registration["style"] != Style.HOT and replica.role is not Role.PRIMARY:
            self._take(self._next(patience=None))
            if replica.stopping:
                raise SystemExit(0)
        return replica

    def begin(self) -> None:
        """Note that the body's next line is its first."""
        self._body_at = boottime()
        self._begun.set()

    def end(self, error: BaseException | None) -> None:
        """Tell how the body ended, and wait until the WatchDog knows."""
        self._ended.set()
        link = self._link
        if link is None:
            return
        if self._leaving:
            link.send("leaving")  # the listening thread may not have come to it
        elif self.replica and self.replica.stopping:
            return  # the WatchDog asked for it
        elif error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            link.send("done")
        else:
            link.send("failed", reason=f"{type(error).__name__}: {error}"[:2000])
        self._acknowledged.wait(DONE_S)
        link.shut()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Make SIGTERM and Ctrl-C ask this copy to hand over; the second one acts as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, _: FrameType | None) -> None:
            restore()
            self._leaving = True
            if self.replica:
                self.replica._ask_to_stop()
            if self._link:
                self._link.wake()

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()

    def _next(self, patience: float | None = PATIENCE_S) -> Message:
        """Return the next message that is not about this process's own signals."""
        assert self._link is not None
        while True:
            message = self._link.receive(patience)
            if message is not None:
                if message["type"] == "error":
                    raise RefusedError(str(message.get("message")))
                return message
            if self._leaving:
                self._leave(self._link)
            import logging

            logging.getLogger("etcdreplica").warning("%s: still waiting for a place from the ReplicaManager", self._name)

    def _leave(self, link: Link) -> NoReturn:
        """End before the body began, once the WatchDog knows that this is no failure."""
        link.send("leaving")
        with contextlib.suppress(NoWatchDogError):
            while (message := link.receive(DONE_S)) is not None and message["type"] != "stop":
                pass
        raise SystemExit(0)

    def _listen(self) -> None:
        assert self._link is not None
        if self.replica and self.replica.role is Role.BACKUP:
            self._tie_to_watchdog(self._link)  # while there is time: promotion must find it done
            self._begun.wait()
            self._link.send("running", at=self._body_at)
        else:
            self._begun.wait()
            self._link.send("running", at=self._body_at)
            self._tie_to_watchdog(self._link)
        try:
            while True:
                message = self._link.receive()
                if message is None:
                    self._link.send("leaving")
                else:
                    self._take(message)
        except (NoWatchDogError, ProtocolError) as error:
            if not self._ended.is_set():
                self._die(error)

    def _tie_to_watchdog(self, link: Link) -> None:
        """Have the WatchDog learn early of this process's death, and this process die with a WatchDog that started it."""
        with contextlib.suppress(OSError):
            link.send("notice", fd=hold_notice())
        if INCARNATION_ENV in os.environ:
            die_with_parent(signal.SIGKILL)

    def _take(self, message: Message) -> None:
        kind, replica = message["type"], self.replica
        assert replica is not None
        if kind == "role":
            replica._become(Role(message["role"]), message["epoch"])
        elif kind == "stop":
            replica._ask_to_stop()
            self._acknowledged.set()
        elif kind == "ok":
            self._acknowledged.set()

    def _die(self, error: EtcdReplicaError) -> None:
        """Stop being a replica: without a WatchDog another copy may be primary soon."""
        with contextlib.suppress(OSError):
            os.write(2, f"etcdreplica: {self._name}: {error}; this copy stops at once\n".encode())
        leads_group = os.getpgid(0) == os.getpid()
        (os.killpg if leads_group else os.kill)(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Refuse a second protected call while one runs."""
    if not _active.acquire(blocking=False):
        raise RefusedError("this process is a replica already: one protected call runs at a time")
    try:
        yield
    finally:
        _active.release()
