"""One protected call: meet the WatchDog, wait for one's turn, run the body, and tell how it ended.

Until the body begins, the calling thread itself reads the socket, so that a promotion costs no thread switch. From then
on a daemon thread does. When the WatchDog goes away this copy goes on, and looks for the next one: its guardian, or for a
copy started by hand a timer of the kernel, kills it before its lease could end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from etcdreplica.app.keeping import Keeper
from etcdreplica.app.kernel import Deadline, Notice, Page, Slot
from etcdreplica.app.link import ASKING, Link
from etcdreplica.app.log import logger
from etcdreplica.app.program import capture
from etcdreplica.app.protocol import DETACH_ENV, INCARNATION_ENV, MARK_ENV, STANDALONE_ENV, VERSION, default_socket
from etcdreplica.app.replica import Replica
from etcdreplica.app.stacks import Stacks
from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError, NoWatchDogError, ProtocolError, RefusedError
from etcdreplica.words import PROBE_CALL, Role, Style

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType
    from typing import Any, NoReturn

    from etcdreplica.app.checkpoints import Checkpoints
    from etcdreplica.app.health import HealthCheck
    from etcdreplica.app.keeping import Keeping
    from etcdreplica.app.protocol import Message

PATIENCE_S = 5.0  # after this long without a place, say so
DONE_S = 5.0  # how long to wait until the WatchDog has taken note of the end
REJOIN_S = 0.05  # between two attempts to find the next WatchDog
PULSE_S = 1.0  # unless the WatchDog wants it more often

_active = threading.Lock()  # a process is one replica at a time


class RegisteredOnly(SystemExit):
    """The application was only registered, as asked: the hosts start its copies, and this process is none of them."""

    def __init__(self, name: str) -> None:
        super().__init__(0)
        self.name = name


class Session:
    """The connection of one protected call: `connect`, then under `signals`: `wait_for_turn`, `begin`, `end`; last `close`."""

    def __init__(
        self,
        registration: Mapping[str, Any],
        health: Callable[[], object] | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        """`registration` has the fields of `model.Registration`, as JSON knows them, but for the program."""
        self._registration = registration
        self._health = self._check_of(health) if health else None
        self._keeping = keeping
        self._keeper: Keeper | None = None
        self._checkpoints: Checkpoints | None = None
        self._name: str = registration["name"]
        self._link: Link | None = None
        self._replica: Replica | None = None
        self._listener: threading.Thread | None = None
        self._incarnation: int | None = None
        self._page: Page | None = None
        self._stacks: Stacks | None = None
        self._notice: Notice | None = None
        self._deadline: Deadline | None = None  # of a copy started by hand; others have a guardian
        self._last_words: tuple[str, dict[str, str]] | None = None
        self._closed = threading.Event()
        self._begun = threading.Event()
        self._told = threading.Event()  # the WatchDog has been told that the body runs
        self._ended = threading.Event()
        self._acknowledged = threading.Event()  # the WatchDog asked for the end, or knows of it
        self._dismissed = threading.Event()  # it knows how the body ended: nothing is left to tell
        self._leaving = False
        self._body_at = 0.0

    def connect(self) -> None:
        """Reach the WatchDog, unless this is to run without one. Raises NoWatchDogError."""
        while os.environ.get(STANDALONE_ENV) != "1" and self._link is None:
            try:
                self._link = Link(default_socket())
            except NoWatchDogError:
                if INCARNATION_ENV not in os.environ:
                    raise
                time.sleep(REJOIN_S)  # its WatchDog is just being replaced, and the guardian knows how long to wait

    def close(self) -> None:
        """Hang up, and give back what the connection took."""
        self._ended.set()
        self._begun.set()
        self._closed.set()
        if self._link is not None:
            self._link.shut()
            if self._listener is not None:
                self._listener.join()
            self._link.close()
            if self._checkpoints is not None:
                self._checkpoints.close()
            self._link.on_pulse = lambda: None  # no cycle: the page's memory holds a descriptor until it is freed
        if self._deadline is not None:
            os.environ.pop(MARK_ENV, None)
        for held in (self._deadline, self._stacks, self._page):
            if held is not None:
                held.close()

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
        if self._link:
            self._link.wake()  # whoever listens does the rest: a signal handler must take no lock that the body may hold
        else:
            self._stop_body()

    def wait_for_turn(self) -> Replica:
        """Get a place, and return when the body may run there.

        Raises SystemExit when this copy is to end before, RegisteredOnly, RefusedError, NoWatchDogError, ProtocolError.
        """
        link = self._link
        if link is None:
            self._replica = Replica(self._name, socket.gethostname(), Role.PRIMARY, 1, None)
            self._replica._codec = self._keeping.codec if self._keeping is not None else None
            return self._replica
        replica = self._replica = self._meet(link)
        self._listener = threading.Thread(target=self._listen, args=(link,), name="etcdreplica", daemon=True)
        self._listener.start()
        self._keep(replica)
        while self._registration["style"] != Style.HOT and replica.role is not Role.PRIMARY:
            try:
                self._take(self._next(link, patience=None))
            except NoWatchDogError as error:
                self._rejoin(link, error)
            if self._leaving:
                self._leave(link)
            if replica.stopping:
                raise SystemExit(0)
        return replica

    def begin(self, loop: AbstractEventLoop | None = None) -> None:
        """Note that the body's next line is its first; `loop`: the one that it runs in."""
        self._body_at = boottime()
        self._begun.set()
        if loop is not None:
            self._watch_loop(loop)
        if self._keeping is not None and self._replica is not None and self._checkpoints is not None:
            self._keeper = Keeper(self._replica, self._keeping.interval_s, loop)
            self._keeper.start()
        if self._health is not None and self._link is not None:
            self._health.start()

    def end(self, error: BaseException | None) -> None:
        """Tell how the body ended, and wait until the WatchDog knows."""
        self._ended.set()
        if self._health is not None:
            self._health.stop()
        link = self._link
        if link is None:
            return
        for slot in (Slot.LOOP, Slot.PROGRESS, Slot.HEALTH):
            self._beat(slot, 0.0)
        if self._keeper is not None and self._checkpoints is not None:
            self._keeper.stop()
            handover = self._leaving or (self._replica is not None and self._replica.stopping)
            self._keeper.finish(self._checkpoints, handover=handover and error is None)
        self._told.wait(DONE_S)
        if self._leaving:
            self._last_words = ("leaving", {})  # the listening thread may not have come to it
        elif self._replica and self._replica.stopping:
            return  # the WatchDog asked for it
        elif error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self._last_words = ("done", {})
        else:
            self._last_words = ("failed", {"reason": f"{type(error).__name__}: {error}"[:2000]})
        link.send(self._last_words[0], **self._last_words[1])
        self._acknowledged.wait(DONE_S)

    def _keep(self, replica: Replica) -> None:
        """Let the body store its state, and hold that of the primary while this copy waits for its turn."""
        if self._keeping is None:
            return
        from etcdreplica.app.checkpoints import Checkpoints

        registration = self._registration
        replica._codec = self._keeping.codec
        self._checkpoints = replica._checkpoints = Checkpoints(self._name, self._keeping.codec, registration["degree"])
        if registration["style"] == Style.WARM and replica.role is Role.BACKUP:
            self._checkpoints.follow(self._keeping.on_checkpoint)

    def _want(self, degree: int) -> None:
        """Have each checkpoint on so many hosts from now on."""
        if self._checkpoints is not None:
            self._checkpoints.want(degree)

    def _watch_loop(self, loop: AbstractEventLoop) -> None:
        """Give a sign of life of the event loop that runs the body, until the body has ended."""
        if self._page is not None and not self._ended.is_set():
            self._beat(Slot.LOOP, boottime())
            loop.call_later(self._pulse_s, self._watch_loop, loop)

    @property
    def _pulse_s(self) -> float:
        return (self._link and self._link.pulse_s) or PULSE_S

    def _pulse(self) -> None:
        self._beat(Slot.PULSE, boottime())
        if self._health is not None and self._body_at and not self._ended.is_set():
            self._beat(Slot.HEALTH, self._health.answered_at or self._body_at)

    def _check_of(self, health: Callable[[], object]) -> HealthCheck:
        from etcdreplica.app.health import HealthCheck

        def report(bad: int, reason: str) -> None:
            if self._link is not None:
                self._link.send("health", bad=bad, reason=reason)

        probe = next(probe for probe in self._registration["probes"] if probe["target"] == PROBE_CALL)
        return HealthCheck.of(health, probe, report)

    def _beat(self, slot: Slot, at: float) -> None:
        if self._page is not None:
            self._page.beat(slot, at)

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
            replica = Replica(self._name, welcome["host"], Role(welcome["role"]), int(welcome["epoch"]), link)
            self._incarnation = int(welcome["incarnation"])
            now = {key: welcome[key] for key in ("style", "degree") if key in welcome}  # they may have been changed since
            self._registration = {**self._registration, **now}
        except (KeyError, TypeError, ValueError):
            raise ProtocolError(f"the WatchDog answered hello with {dict(welcome)}") from None
        with contextlib.suppress(OSError):  # no descriptors, no memory: then without signs of life
            self._page = replica._page = Page()
            self._stacks = Stacks()
        self._tie(link, welcome)
        replica._hear(welcome)
        return replica

    def _tie(self, link: Link, welcome: Message) -> None:
        """Give the WatchDog signs of life, and where no guardian does it, have the kernel enforce the deadline."""
        link.pulse_s = float(welcome.get("pulse", PULSE_S))
        link.on_pulse = self._pulse
        link.on_pulse()
        if self._page is not None:
            stacks = {"stacks": self._stacks.fd, "signal": self._stacks.signal} if self._stacks else {}
            link.send("page", fd=self._page.fd, **stacks)
        self._arm(welcome)

    def _arm(self, message: Message) -> None:
        if "until" in message:
            os.environ[MARK_ENV] = str(message.get("mark", ""))  # so that what this process starts is found and ended too
            with contextlib.suppress(Exception):  # a Python without ctypes: then it dies with the WatchDog instead
                self._deadline = self._deadline or Deadline()
                self._deadline.arm(float(message["until"]))

    def _rejoin(self, link: Link, error: NoWatchDogError) -> None:
        """Find the next WatchDog of this host, for as long as the deadline lets this process live.

        Raises `error` when there is no deadline, RefusedError, ProtocolError.
        """
        if self._incarnation is None or (self._deadline is None and INCARNATION_ENV not in os.environ):
            raise error
        while not self._closed.is_set():
            try:
                link.reconnect("hello", version=VERSION, app=self._name, incarnation=self._incarnation)
                welcome = link.receive(PATIENCE_S)
            except NoWatchDogError:
                welcome = None
            if link.signalled:
                self._leaving = True
                self._stop_body()  # also while there is nobody to tell
            if welcome is None:
                link.pause(REJOIN_S)
                link.on_pulse()
            elif welcome["type"] == "error":
                raise RefusedError(str(welcome.get("message")))
            else:
                self._tell_all(link, welcome)
                return

    def _tell_all(self, link: Link, welcome: Message) -> None:
        """Tell a WatchDog that has just begun what its predecessor knew."""
        replica = self._replica
        assert replica is not None
        self._tie(link, welcome)
        if self._notice is not None:
            link.send("notice")
        if self._told.is_set() and self._body_at:
            link.send("running", at=self._body_at)
        if replica._endpoint is not None:
            link.send("advertise", endpoint=replica._endpoint)
        if replica._serves is not None:
            link.send("serves", endpoint=replica._serves)
        replica._hear(welcome)
        if self._last_words is not None:
            link.send(self._last_words[0], **self._last_words[1])
        elif self._leaving:
            link.send("leaving")
        self._want(int(welcome.get("degree", self._registration["degree"])))
        self._take({**welcome, "type": "role"})

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
            logger().warning("%s: still waiting for a place from the ReplicaManager", self._name)

    def _leave(self, link: Link) -> NoReturn:
        """End before the body began, once the WatchDog knows that this is no failure."""
        link.send("leaving")
        until = boottime() + DONE_S
        with contextlib.suppress(NoWatchDogError):
            while (left := until - boottime()) > 0:
                message = link.receive(left)  # None also when the signal that asked for this is still in the pipe
                if message is not None and message["type"] == "stop":
                    break
        raise SystemExit(0)

    def _listen(self, link: Link) -> None:
        """Serve the connection once the body has begun, in a thread of its own."""
        try:
            if self._replica and self._replica.role is Role.BACKUP:
                self._hold_notice(link)  # while there is time: promotion must find it done
                self._tell_begun(link)
            else:
                self._tell_begun(link)
                self._hold_notice(link)
            while not self._closed.is_set():
                self._listen_once(link)
        except (NoWatchDogError, ProtocolError, RefusedError) as error:
            if not self._ended.is_set():
                self._die(error)
        finally:
            if self._notice is not None:
                self._notice.release()

    def _listen_once(self, link: Link) -> None:
        try:
            message = link.receive()
        except NoWatchDogError as error:
            if not (self._closed.is_set() or self._dismissed.is_set()):
                self._rejoin(link, error)
                return
            raise
        if message is not None:
            self._take(message)
        elif link.signalled and not self._ended.is_set():
            self._leaving = True
            self._stop_body()
            link.send("leaving")

    def _stop_body(self) -> None:
        if self._replica:
            self._replica._ask_to_stop()

    def _tell_begun(self, link: Link) -> None:
        self._begun.wait()
        if self._body_at:
            link.send("running", at=self._body_at)
        self._told.set()

    def _hold_notice(self, link: Link) -> None:
        """Have the WatchDog learn early of this process's death."""
        with contextlib.suppress(Exception):  # a Python without ctypes, or a C library without robust mutexes
            if self._page is not None:
                self._notice = Notice(self._page)
                link.send("notice")

    def _take(self, message: Message) -> None:
        kind, replica = message["type"], self._replica
        assert replica is not None
        if kind == "role":
            try:
                replica._become(Role(message["role"]), int(message["epoch"]))
            except (KeyError, TypeError, ValueError):
                raise ProtocolError(f"the WatchDog sent an unknown role: {dict(message)}") from None
            replica._hear(message)
        elif kind == "degree":
            self._want(int(message["degree"]))
        elif kind == "renew":
            self._arm(message)
        elif kind == "stop":
            replica._ask_to_stop()
            self._acknowledged.set()
        elif kind == "ok":
            self._dismissed.set()
            self._acknowledged.set()
        else:
            replica._hear(message)

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
