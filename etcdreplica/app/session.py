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

from etcdreplica.app.kernel import Notice, die_with_parent
from etcdreplica.app.link import ASKING, Link
from etcdreplica.app.program import capture
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
    """The connection of one protected call: `connect`, then under `signals`: `wait_for_turn`, `begin`, `end`; last `close`."""

    def __init__(self, registration: Mapping[str, Any]) -> None:
        """`registration` has the fields of `model.Registration`, as JSON knows them, but for the program."""
        self._registration = registration
        self._name: str = registration["name"]
        self._link: Link | None = None
        self._replica: Replica | None = None
        self._listener: threading.Thread | None = None
        self._notice: Notice | None = None
        self._begun = threading.Event()
        self._told = threading.Event()  # the WatchDog has been told that the body runs
        self._ended = threading.Event()
        self._acknowledged = threading.Event()
        self._leaving = False
        self._body_at = 0.0

    def connect(self) -> None:
        """Reach the WatchDog, unless this is to run without one. Raises NoWatchDogError."""
        if os.environ.get(STANDALONE_ENV) != "1":
            self._link = Link(default_socket())

    def close(self) -> None:
        """Hang up, and give back what the connection took."""
        self._ended.set()
        self._begun.set()
        if self._link is not None:
            self._link.shut()
            if self._listener is not None:
                self._listener.join()
            self._link.close()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Make SIGTERM and Ctrl-C ask this copy to hand over; the second one acts as ever.

        The kernel may give a signal to any thread, and Python runs its handler only when the main thread runs code again.
        So the number also goes straight into the link's pipe, where whoever listens finds it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in ASKING}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, frame: FrameType | None) -> None:
            restore()
            self.ask_to_leave()

        fd = signal.set_wakeup_fd(self._link.wake_fd, warn_on_full_buffer=False) if self._link else None
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()
            if fd is not None:
                signal.set_wakeup_fd(fd)

    def ask_to_leave(self) -> None:
        """End this copy in order and hand its role over."""
        self._leaving = True
        if self._replica:
            self._replica._ask_to_stop()
        if self._link:
            self._link.wake()

    def wait_for_turn(self) -> Replica:
        """Get a place, and return when the body may run there.

        Raises SystemExit when this copy is to end before, RegisteredOnly, RefusedError, NoWatchDogError, ProtocolError.
        """
        link = self._link
        if link is None:
            self._replica = Replica(self._name, socket.gethostname(), Role.PRIMARY, 1, None)
            return self._replica
        replica = self._replica = self._meet(link)
        self._listener = threading.Thread(target=self._listen, args=(link,), name="etcdreplica", daemon=True)
        self._listener.start()
        while self._registration["style"] != Style.HOT and replica.role is not Role.PRIMARY:
            self._take(self._next(link, patience=None))
            if self._leaving:
                self._leave(link)
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
        self._told.wait(DONE_S)
        if self._leaving:
            link.send("leaving")  # the listening thread may not have come to it
        elif self._replica and self._replica.stopping:
            return  # the WatchDog asked for it
        elif error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            link.send("done")
        else:
            link.send("failed", reason=f"{type(error).__name__}: {error}"[:2000])
        self._acknowledged.wait(DONE_S)

    def _meet(self, link: Link) -> Replica:
        incarnation = os.environ.get(INCARNATION_ENV)
        if incarnation is None:
            adopt = os.environ.get(DETACH_ENV) != "1"
            link.send("hello", version=VERSION, adopt=adopt, registration={**self._registration, "program": capture()})
        else:
            link.send("hello", version=VERSION, app=self._name, incarnation=int(incarnation))
        welcome = self._next(link, patience=PATIENCE_S)
        if welcome["type"] == "ok":
            raise RegisteredOnly(self._name)
        try:
            return Replica(self._name, welcome["host"], Role(welcome["role"]), int(welcome["epoch"]), link)
        except (KeyError, TypeError, ValueError):
            raise ProtocolError(f"the WatchDog answered hello with {dict(welcome)}") from None

    def _next(self, link: Link, patience: float | None) -> Message:
        """Return the next message that is not about this process's own signals."""
        while True:
            message = link.receive(patience)
            if message is not None:
                if message["type"] == "error":
                    raise RefusedError(str(message.get("message")))
                return message
            if link.signalled:
                self._leave(link)
            import logging

            logging.getLogger("etcdreplica").warning("%s: still waiting for a place from the ReplicaManager", self._name)

    def _leave(self, link: Link) -> NoReturn:
        """End before the body began, once the WatchDog knows that this is no failure."""
        link.send("leaving")
        with contextlib.suppress(NoWatchDogError):
            while (message := link.receive(DONE_S)) is not None and message["type"] != "stop":
                pass
        raise SystemExit(0)

    def _listen(self, link: Link) -> None:
        """Serve the connection once the body has begun, in a thread of its own."""
        try:
            if self._replica and self._replica.role is Role.BACKUP:
                self._tie_to_watchdog(link)  # while there is time: promotion must find it done
                self._tell_begun(link)
            else:
                self._tell_begun(link)
                self._tie_to_watchdog(link)
            while True:
                message = link.receive()
                if message is not None:
                    self._take(message)
                elif link.signalled and not self._ended.is_set():
                    self._leaving = True
                    if self._replica:
                        self._replica._ask_to_stop()
                    link.send("leaving")
        except (NoWatchDogError, ProtocolError) as error:
            if not self._ended.is_set():
                self._die(error)
        finally:
            if self._notice is not None:
                self._notice.release()

    def _tell_begun(self, link: Link) -> None:
        self._begun.wait()
        if self._body_at:
            link.send("running", at=self._body_at)
        self._told.set()

    def _tie_to_watchdog(self, link: Link) -> None:
        """Have the WatchDog learn early of this process's death, and this process die with a WatchDog that started it."""
        with contextlib.suppress(Exception):  # a Python without ctypes, or a C library without robust mutexes
            self._notice = Notice()
            link.send("notice", fd=self._notice.fd)
        with contextlib.suppress(Exception):
            if INCARNATION_ENV in os.environ:
                die_with_parent(signal.SIGKILL)

    def _take(self, message: Message) -> None:
        kind, replica = message["type"], self._replica
        assert replica is not None
        if kind == "role":
            try:
                replica._become(Role(message["role"]), int(message["epoch"]))
            except (KeyError, TypeError, ValueError):
                raise ProtocolError(f"the WatchDog sent an unknown role: {dict(message)}") from None
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
