"""`python -m etcdreplica.guardian COMMAND...`: run COMMAND as the WatchDog of this host, again and again, and guard it.

The WatchDog finds one end of a socket in $ETCDREPLICA_GUARDIAN and speaks frames of `app.protocol` on it. First it is told
every ward there is, then `ready`. It sends: keep (remember this), spawn, watch (a process that somebody else started), until
(new deadlines), backstop, release (forget the process, and the ward if no memo is given). It is told: spawned, refused, exited.

SIGTERM and SIGINT end the WatchDog in order, and the guardian after it. SIGHUP replaces the WatchDog by a new one, as after
an upgrade or a change of its configuration: nothing it watches notices. systemd is told what goes on, if it asked for that
(`guardian.notify`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
import uuid
from typing import TYPE_CHECKING

from etcdreplica.app.kernel import Deadline, become_subreaper, set_precedence
from etcdreplica.app.protocol import FINAL_CODES, GUARDIAN_ENV, Decoder, Message, encode
from etcdreplica.clock import boottime
from etcdreplica.errors import ProtocolError
from etcdreplica.guardian.notify import Notifier
from etcdreplica.guardian.tree import Tree, control_group, kill_all
from etcdreplica.guardian.undertaker import Undertaker
from etcdreplica.guardian.wards import URGENT_NICE, Ward

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

BACKSTOP_S = 0.2  # the kernel kills a guardian that has not acted on a deadline for this long, unless it is told another
SWEEP_S = 0.005
LINE_LIMIT = 500  # of characters: what a pipe takes at once
LITTER_ROUNDS = 200
RESTART_S = (0.0, 0.0, 0.2, 0.5, 1.0, 2.0)  # after so many WatchDogs that did not live for STEADY_S
STEADY_S = 10.0
HUNG_S = 60.0  # a WatchDog that has let its session end so long ago, and says nothing of it, is replaced
WATCHDOG, SESSION = "@watchdog", "@session"
LONGEST_S = 1e9


class Guardian:
    """One host's guardian."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._id = uuid.uuid4().hex[:16]
        self._wards: dict[str, Ward] = {}
        self._watchdog = Ward(WATCHDOG)
        self._began_at = 0.0
        self._short_lives = 0
        self._start_at: float | None = boottime()
        self._ending = False
        self._code: int | None = None
        self._line: socket.socket | None = None
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._poll = select.poll()
        self._signals, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._signals, select.POLLIN)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        self._backstop = Deadline()
        self._backstop_s = BACKSTOP_S
        self._undertaker = Undertaker(self._id)
        self._spent: list[Tree] = []  # what is left of wards that were released
        self._systemd = Notifier()

    def run(self) -> int:
        """Guard until the WatchDog has ended for good; return its exit code."""
        become_subreaper()
        set_precedence(URGENT_NICE)
        while self._code is None:
            ready = dict(self._poll.poll(self._wait_ms()))
            if self._signals in ready:
                self._safely(self._take_signals)
            if self._line is not None and self._line.fileno() in ready:
                self._safely(self._listen)
            for ward in list(self._wards.values()):
                if ward.starting in ready:
                    self._tell_outcome(ward)
            self._safely(self._reap)
            self._safely(self._enforce)
            self._safely(self._supervise)
            self._safely(self._notify)
        self._safely(self._end_all)
        return self._code

    def _safely(self, step: Callable[[], None]) -> None:
        """Whatever goes wrong in one step (no memory, no descriptors), the others must follow."""
        try:
            step()
        except Exception as error:
            _say(f"{step.__name__.strip('_')} failed, trying again: {error!r}")
            time.sleep(SWEEP_S)

    # --- the WatchDog ----------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        now = boottime()
        if self._undertaker.pid is None:
            self._undertaker.start(ward.tree for ward in self._wards.values() if ward.is_child and ward.tree is not None)
        session = self._wards.get(SESSION)
        if session is not None and session.until is not None and now > session.until + HUNG_S:
            _say("the WatchDog does nothing any more: replacing it")
            session.until = None
            self._signal_watchdog(signal.SIGKILL)
        if self._watchdog.pid is not None and self._watchdog.status is not None:
            self._lost_watchdog(now)
        if self._start_at is not None and now >= self._start_at and self._code is None:
            self._start_at = now + RESTART_S[-1]  # if it cannot be started now
            self._start_watchdog(now)

    def _lost_watchdog(self, now: float) -> None:
        code = os.waitstatus_to_exitcode(self._watchdog.status or 0)
        while self._line is not None and self._hear():
            continue  # what it said last counts
        self._hang_up()
        mark, self._watchdog = self._watchdog.mark, Ward(WATCHDOG)
        in_order = code in FINAL_CODES.values() and SESSION not in self._wards  # else what it watched needs another one
        if in_order or self._ending:
            self._code = next((meant for meant, told in FINAL_CODES.items() if told == code), max(0, code))
            return
        self._short_lives = 0 if now - self._began_at > STEADY_S else self._short_lives + 1
        self._start_at = now + RESTART_S[min(self._short_lives, len(RESTART_S) - 1)]
        _say(f"the WatchDog ended ({_in_words(code)}); starting it again, {len(self._wards)} ward(s) go on meanwhile")
        Tree(mark, 0, None).kill()  # it may have left a probe behind

    def _start_watchdog(self, now: float) -> None:
        self._hang_up()
        ours, its = socket.socketpair()
        ours.setblocking(False)
        self._line, self._decoder, self._unsent = ours, Decoder(), bytearray()
        self._poll.register(ours, select.POLLIN)
        os.set_inheritable(its.fileno(), True)
        environment = {**os.environ, GUARDIAN_ENV: f"{its.fileno()},{self._id}"}
        with its:
            self._watchdog.start(f"{self._id}/{WATCHDOG}", {"argv": self._command, "env": environment}, grouped=False)
        self._watchdog.abandon()
        self._began_at, self._start_at = now, None
        for ward in self._wards.values():
            self._send("ward", **ward.described())
        self._send("ready")

    def _notify(self) -> None:
        is_ready = SESSION in self._wards
        is_alive = self._watchdog.pid is not None and self._watchdog.status is None
        copies = sum(1 for ward in self._wards.values() if ward.pid is not None and not ward.name.startswith("@"))
        if self._ending:
            state = "ending"
        elif not is_alive:
            state = "starting the WatchDog again"
        else:
            state = "holding the host lease" if is_ready else "waiting for etcd to grant the host lease"
        self._systemd.tell(
            boottime(), f"{state}; replicas here: {copies}", is_ready=is_ready, is_stopping=self._ending, is_alive=is_alive
        )

    def _take_signals(self) -> None:
        for number in os.read(self._signals, 4096):
            if number == signal.SIGHUP:
                _say("asked to replace the WatchDog")
                self._signal_watchdog(signal.SIGKILL)
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._ending = True
                self._signal_watchdog(signal.SIGTERM)
                if self._watchdog.pid is None:
                    self._code = 0

    def _signal_watchdog(self, number: signal.Signals) -> None:
        if self._watchdog.pid is not None and self._watchdog.status is None:
            os.kill(self._watchdog.pid, number)

    # --- what it says ----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._flush()
        if not self._hear():
            self._signal_watchdog(signal.SIGKILL)  # it has closed the line: it is of no use any more
            self._hang_up()

    def _hear(self) -> bool:
        """Take what there is to hear; False at the end of the line, and when nothing is there."""
        assert self._line is not None
        try:
            data = self._line.recv(1 << 16)
        except BlockingIOError:
            return self._watchdog.status is None
        except OSError:
            data = b""
        if not data:
            return False
        try:
            for message in self._decoder.feed(data):
                self._take(message)
        except (ProtocolError, KeyError, TypeError, ValueError, AttributeError) as error:
            _say(f"the WatchDog sent what is not the protocol ({error!r}): hung up on it")
            self._signal_watchdog(signal.SIGKILL)
        return True

    def _take(self, message: Message) -> None:
        kind = message["type"]
        if kind == "until":
            for name, until in message["wards"].items():
                if name in self._wards and not self._wards[name].condemned:
                    self._wards[name].until = _seconds(until)
            return
        if kind == "backstop":
            self._backstop_s = _seconds(message["after"])
            return
        ward = self._wards.get(message["ward"]) or Ward(message["ward"])
        if kind == "keep":
            ward.memo = message["memo"]
            if "until" in message and not ward.condemned:
                ward.until = _seconds(message["until"])
        elif kind == "spawn":
            self._spawn(ward, message)
        elif kind == "watch":
            ward.pid, ward.started, ward.mark = int(message["pid"]), int(message["started"]), str(message["mark"])
        elif kind == "release":
            self._release(ward, message)
            return
        else:
            raise ValueError(f"unknown message {kind}")
        self._wards[ward.name] = ward

    def _spawn(self, ward: Ward, message: Message) -> None:
        try:
            ward.start(f"{self._id}/{message['ward']}.{message['number']}", message)
        except OSError as error:
            self._send("refused", ward=ward.name, errno=error.errno or 0)
        else:
            self._poll.register(ward.starting or 0, select.POLLIN)

    def _tell_outcome(self, ward: Ward) -> None:
        pipe = ward.starting
        code = ward.outcome()
        if code is None:
            return
        self._poll.unregister(pipe or 0)
        if code:
            self._send("refused", ward=ward.name, errno=code)
        else:
            if ward.tree is not None:
                self._undertaker.add(ward.tree)
            self._send("spawned", ward=ward.name, pid=ward.pid, started=ward.started, mark=ward.mark)
        if ward.status is not None:
            self._send("exited", ward=ward.name, pid=ward.pid, status=ward.status)

    def _release(self, ward: Ward, message: Message) -> None:
        self._wards.pop(ward.name, None)
        if ward.starting is not None:
            self._poll.unregister(ward.starting)
            ward.abandon()
        if ward.tree is not None:
            if ward.is_child:
                ward.tree.strike()
                self._undertaker.drop(ward.tree)
            self._spent.append(ward.tree)
        if message.get("memo") is not None:
            kept = self._wards[ward.name] = Ward(ward.name)
            kept.memo = message["memo"]

    def _send(self, kind: str, **fields: Any) -> None:
        self._unsent += encode(kind, **fields)
        self._flush()

    def _flush(self) -> None:
        """Send what can be sent; a WatchDog that does not read never stops us."""
        if self._line is None:
            return
        with contextlib.suppress(OSError):
            while self._unsent:
                del self._unsent[: self._line.send(self._unsent)]
        self._poll.modify(self._line, select.POLLIN | (select.POLLOUT if self._unsent else 0))

    def _hang_up(self) -> None:
        if self._line is not None:
            self._poll.unregister(self._line)
            self._line.close()
            self._line = None

    # --- processes -------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Collect every child that has ended, also those that were somebody else's before."""
        by_pid = {ward.pid: ward for ward in (self._watchdog, *self._wards.values()) if ward.is_child}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self._undertaker.pid:
                self._undertaker.pid = None
            ward = by_pid.get(pid)
            if ward is not None and ward.status is None:
                ward.status = status
                if ward is not self._watchdog and ward.starting is None:
                    self._send("exited", ward=ward.name, pid=pid, status=status)
        self._spent = [tree for tree in self._spent if not tree.forget()]

    def _enforce(self) -> None:
        """Kill what has reached its deadline, the whole of it, as often as it takes."""
        now = boottime()
        due = [w for w in self._wards.values() if w.until is not None and w.until <= now and w.pid and not w.condemned]
        for ward in due:
            ward.condemned = True
        sweeping = {ward.tree: ward for ward in self._wards.values() if ward.condemned and not ward.swept and ward.tree}
        left = kill_all(sweeping)
        for tree, ward in sweeping.items():
            ward.swept = tree not in left
        self._backstop.arm(min((at + self._backstop_s for at in self._deadlines()), default=None))
        for ward in due:
            late_ms = 1000 * (now - (ward.until or now))
            _say(f"{ward.name}: its lease was not confirmed again: killed, {late_ms:.1f} ms after its deadline")

    def _deadlines(self) -> list[float]:
        return [w.until for w in self._wards.values() if w.until is not None and not w.condemned and w.pid is not None]

    def _wait_ms(self) -> int:
        sweeping = any(w.condemned and not w.swept and w.pid is not None for w in self._wards.values())
        due = [SWEEP_S + boottime()] if sweeping else []
        others = (at for at in (self._start_at, self._systemd.due) if at is not None)
        next_at = min((*self._deadlines(), *due, *others), default=None)
        return -1 if next_at is None else max(0, int((next_at - boottime()) * 1000) + 1)

    def _end_all(self) -> None:
        """Leave nothing behind."""
        self._backstop.arm(None)
        trees = [ward.tree for ward in self._wards.values() if ward.tree is not None]
        left = trees
        while left := kill_all(left):
            self._reap()
            time.sleep(SWEEP_S)
        self._spent += trees
        for _ in range(LITTER_ROUNDS):
            self._reap()
            if not self._spent:
                break
            time.sleep(SWEEP_S)
        if group := control_group(self._id):
            with contextlib.suppress(OSError):
                os.rmdir(group)  # noqa: PTH106
        self._undertaker.end()


def _seconds(value: Any) -> float:
    """Return a moment or a time. Raises ValueError for what no timer can be set to: JSON of Python knows NaN and Infinity."""
    seconds = float(value)
    if not abs(seconds) < LONGEST_S:
        raise ValueError(f"not a time: {value}")
    return seconds


def _in_words(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _say(text: str) -> None:
    """Write one line, unless whoever should read it does not: nothing may keep the guardian waiting."""
    ready = select.poll()
    ready.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if ready.poll(0):
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} etcdreplica guardian: {text}"[:LINE_LIMIT]
            os.write(2, f"{line}\n".encode(errors="replace"))


if __name__ == "__main__":
    sys.exit(Guardian(sys.argv[1:]).run())
