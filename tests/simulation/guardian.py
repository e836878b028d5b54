"""The guardian of a simulated host: the rules of `etcdreplica.guardian`, without the system calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from attrs import define

from etcdreplica.app.protocol import Decoder, Message, encode
from etcdreplica.testing.simulated_loop import Handle
from tests.simulation.machine import SOCKET_S, Host, Process

RESTART_S = (0.0, 0.0, 0.2, 0.5, 1.0, 2.0)
STEADY_S = 10.0
BACKSTOP_S = 0.2
HUNG_S = 60.0
FINAL = 77


@define
class Ward:
    """As `guardian.wards.Ward`."""

    name: str
    memo: Any = None
    until: float | None = None
    process: Process | None = None
    pid: int | None = None
    mark: str = ""
    status: int | None = None
    is_child: bool = False
    condemned: bool = False

    def described(self) -> dict[str, Any]:
        """Return what a WatchDog is told of it."""
        names = ("memo", "until", "pid", "mark", "status", "is_child")
        return {"ward": self.name, "started": 1, **{name: getattr(self, name) for name in names}}


class Guardian(Process):
    """One host's guardian. `start_watchdog` and `start_program` make the processes."""

    def __init__(
        self,
        host: Host,
        start_watchdog: Callable[[Guardian], Process],
        start_program: Callable[[Guardian, str, Message], Process],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(host, "guardian")
        self.wards: dict[str, Ward] = {}
        self.watchdog: Process | None = None
        self._start_watchdog = start_watchdog
        self._start_program = start_program
        self._on_end = on_end
        self._line: _Line | None = None
        self._short_lives = 0
        self._began_at = 0.0
        self._ending = False
        self._backstop_s = BACKSTOP_S
        self._backstop: Handle | None = None
        self._enforcing: Handle | None = None
        host.guardian = self
        self.loop.call_soon(self._start)

    def line(self) -> asyncio.BaseProtocol:
        """Return our end of the line to a new WatchDog."""
        self._line = _Line(self)
        return self._line

    def terminate(self) -> None:
        """End the WatchDog in order, and then itself."""

        def end() -> None:
            self._ending = True
            if self.watchdog is not None and self.watchdog.is_alive:
                self.watchdog.terminate()
            else:
                self._end_all()

        self.loop.call_soon(end)

    def ended(self, code: int) -> None:
        """The kernel has killed it, or it has ended: what it started dies."""
        if self._backstop is not None:
            self._backstop.cancel()
        if self.host.guardian is self:
            self.host.guardian = None
        self._on_end()

    # --- the WatchDog ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self.watchdog is not None and self.watchdog.is_alive:
            return
        self._began_at = self.loop.time()
        self.watchdog = watchdog = self._start_watchdog(self)
        world = self.host.world  # what it said last counts, as in the real one: that is heard before its end is
        watchdog.on_exit.append(lambda: world.after(SOCKET_S, self.loop.call_soon, self._lost_watchdog, watchdog))

    def greet(self) -> None:
        """Tell a new WatchDog everything there is."""
        for ward in self.wards.values():
            self.send("ward", **ward.described())
        self.send("ready")

    def _lost_watchdog(self, watchdog: Process) -> None:
        self._line = None
        code = (watchdog.status or 0) >> 8
        if code == FINAL or self._ending or watchdog.status == 0:
            self._end_all()
            return
        now = self.loop.time()
        self._short_lives = 0 if now - self._began_at > STEADY_S else self._short_lives + 1
        self.loop.call_later(RESTART_S[min(self._short_lives, len(RESTART_S) - 1)], self._start)

    def _end_all(self) -> None:
        for ward in self.wards.values():
            if ward.process is not None:
                ward.process.kill()
        if any(ward.process is not None and ward.process.is_alive for ward in self.wards.values()):
            self.loop.call_later(0.005, self._end_all)
        else:
            self.exit(0)

    # --- what it says ----------------------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """Take what the WatchDog says."""
        kind = message["type"]
        if kind == "until":
            for name, until in message["wards"].items():
                if name in self.wards and not self.wards[name].condemned:
                    self.wards[name].until = until
        elif kind == "backstop":
            self._backstop_s = message["after"]
        elif kind == "release":
            self._release(message)
        else:
            ward = self.wards.setdefault(message["ward"], Ward(message["ward"]))
            if kind == "keep":
                ward.memo = message["memo"]
                if "until" in message and not ward.condemned:
                    ward.until = message["until"]
            elif kind == "spawn":
                self._spawn(ward, message)
            elif kind == "watch":
                ward.pid, ward.mark = message["pid"], message["mark"]
                ward.process = self.host.processes.get(message["pid"])
        self._enforce()

    def send(self, kind: str, **fields: Any) -> None:
        """Tell the WatchDog something."""
        if self._line is not None:
            self._line.send(kind, **fields)

    def _spawn(self, ward: Ward, message: Message) -> None:
        if message["argv"][0] == "app" and message["argv"][1] in self.host.unable:
            self.send("refused", ward=ward.name, errno=2)
            return
        if ward.process is not None and ward.process.is_alive:
            self.host.network.complain(f"{ward.process.name} lives although another process was started in its place")
        ward.mark, ward.is_child = f"{self.name}/{ward.name}.{message['number']}", True
        process = ward.process = self._start_program(self, ward.name, message)
        ward.pid = process.pid
        process.on_exit.append(lambda: self.loop.call_soon(self._reap, ward, process))
        self.send("spawned", ward=ward.name, pid=ward.pid, started=1, mark=ward.mark)

    def _reap(self, ward: Ward, process: Process) -> None:
        ward.status = process.status
        self.send("exited", ward=ward.name, pid=process.pid, status=process.status)

    def _release(self, message: Message) -> None:
        ward = self.wards.pop(message["ward"], None)
        if ward is not None and ward.process is not None and ward.is_child:
            ward.process.kill()
        if message.get("memo") is not None:
            self.wards[message["ward"]] = Ward(message["ward"], message["memo"])

    # --- deadlines -------------------------------------------------------------------------------------------------------

    def _enforce(self) -> None:
        now = self.loop.time()
        for ward in self.wards.values():
            if ward.until is not None and ward.until <= now and ward.process is not None and not ward.condemned:
                ward.condemned = True
                if ward.process.is_alive:
                    self._complain_of_watchdog(ward)
                ward.process.kill()
        session = self.wards.get("@session")
        if session is not None and session.until is not None and now > session.until + HUNG_S and self.watchdog is not None:
            session.until = None
            self.watchdog.kill()
        next_at = min((w.until for w in self._guarded()), default=None)  # type: ignore[type-var]
        if self._backstop is not None:
            self._backstop.cancel()
            self._backstop = None
        if next_at is None:
            return
        self._backstop = self.host.world.at(self.loop.global_(next_at + self._backstop_s), self._backstopped)
        if self._enforcing is not None:
            self._enforcing.cancel()
        self._enforcing = self.loop.call_at(next_at + 0.0005, self._enforce)

    def _complain_of_watchdog(self, ward: Ward) -> None:
        """The WatchDog should have ended it before, if it could. A new one cannot before it has read what it took over."""
        ttl_s = self.host.settings.lease_ttl_s
        if self.watchdog is not None and self.watchdog.was_steady(2 * ttl_s) and self.was_steady(ttl_s):
            self.host.network.complain(f"the WatchDog of {self.host.name} has not ended {ward.name} before its deadline")

    def _backstopped(self) -> None:
        if self.was_steady(self.host.settings.lease_ttl_s):
            self.host.network.complain(f"the guardian of {self.host.name} has missed a deadline")
        self.kill()

    def _guarded(self) -> list[Ward]:
        return [w for w in self.wards.values() if w.until is not None and not w.condemned and w.process is not None]


class _Line(asyncio.Protocol):
    """The guardian's end of the line to one WatchDog."""

    def __init__(self, guardian: Guardian) -> None:
        self._guardian = guardian
        self._decoder = Decoder()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tell everything."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        if self._guardian._line is self:
            self._guardian.greet()

    def data_received(self, data: bytes) -> None:
        """Take what it says."""
        for message in self._decoder.feed(data):
            self._guardian.take(message)

    def send(self, kind: str, **fields: Any) -> None:
        """Say something."""
        if self._transport is not None:
            self._transport.write(encode(kind, **fields))
