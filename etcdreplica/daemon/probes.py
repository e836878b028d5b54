"""Probes that the WatchDog asks from outside: a port, a URL, a command.

Whatever is asked, an answer costs bounded time, memory, threads and processes: a silent peer runs into the timeout, of an
endless one only a status line is read, of a name that cannot be resolved only one look-up is under way, and nothing that
a command has started stays behind, unless it has left the command's session.

`core.probing` says what the answers mean. "call" probes are asked by the application itself (`app.health`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ipaddress
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from urllib.parse import SplitResult, quote, urlsplit

from etcdreplica.clock import Clock, boottime
from etcdreplica.core.probing import Answer, after, begin
from etcdreplica.model import Probe
from etcdreplica.words import PROBE_CALL

log = logging.getLogger(__name__)

Run = Callable[[str, float], Awaitable[int | None]]
"""Runs a shell command for at most so many seconds; its exit code, or None when it was killed for taking longer."""

TICKS = 20  # looks at the loop's lateness in one timeout
REAP_S = 1.0  # how long a killed command may take to vanish before it is left to the loop
LINE_LIMIT = 1024
_KEPT = "/?%:@!$&'()*+,;=~"  # as it stands in a URL
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n]*)?\r?\n")
# We lack what it takes to ask: that says nothing of the application.
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EADDRNOTAVAIL}


class Prober:
    """Asks the probes of one running copy, each at its interval, until `stop` or until the copy is hung.

    `on_hung` is called once, in the loop, with the reason in words; nothing is asked after it. Made and started when the
    copy begins to run: the probes' grace counts from `start`.
    """

    def __init__(self, probes: Iterable[Probe], run: Run, on_hung: Callable[[str], None], clock: Clock = boottime) -> None:
        self._probes = [probe for probe in probes if probe.target != PROBE_CALL]
        self._run = run
        self._on_hung = on_hung
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; the first question of each probe comes after its interval."""
        self._tasks = [asyncio.create_task(self._watch(probe)) for probe in self._probes]

    def stop(self) -> None:
        """Ask no more, and give up what is being asked. May be called at any time and again."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def closed(self) -> None:
        """Return when nothing is being asked any more and the commands are gone."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _watch(self, probe: Probe) -> None:
        asking = begin(probe, self._clock())
        while not asking.hung:
            await asyncio.sleep(max(0.0, asking.due_at - self._clock()))
            asking = after(asking, await self._question(probe, asking.due_at))
        self.stop()
        self._on_hung(asking.hung)

    async def _question(self, probe: Probe, due_at: float) -> Answer:
        asked_at, reason, asked = self._clock(), "", True
        lateness = _Lateness(probe.timeout_s / TICKS, self._clock)
        try:
            reason = await ask(probe, self._run)
        except Exception as error:
            asked = False
            log.warning("probe %s could not be asked: %s", probe.target, error, exc_info=not isinstance(error, OSError))
        finally:
            late_s = lateness.stop()
        return Answer(asked_at, self._clock(), max(asked_at - due_at, late_s), reason, asked)


class _Lateness:
    """How late the loop is at worst, from now to `stop`: looked at every `tick_s`, and at the end."""

    def __init__(self, tick_s: float, clock: Clock) -> None:
        self._tick_s = tick_s
        self._clock = clock
        self._worst_s = 0.0
        self._arm()

    def stop(self) -> float:
        self._timer.cancel()
        return self._look()

    def _arm(self) -> None:
        self._due_at = self._clock() + self._tick_s
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        self._look()
        self._arm()

    def _look(self) -> float:
        self._worst_s = max(self._worst_s, self._clock() - self._due_at)
        return self._worst_s


async def ask(probe: Probe, run: Run) -> str:
    """Return "" for a good answer, or in words why it was a bad one.

    Raises OSError when this process lacks descriptors, memory or ports to ask at all.
    """
    kind, _, rest = probe.target.partition(":")
    try:
        if kind == "exec":
            return _of_exit(probe, await run(rest, probe.timeout_s))
        async with asyncio.timeout(probe.timeout_s):
            return await (_ask_tcp(rest) if kind == "tcp" else _ask_http(probe.target))
    except TimeoutError:
        return _of_exit(probe, None)
    except ssl.SSLCertVerificationError as error:
        return f"bad certificate: {error.verify_message}"
    except OSError as error:
        if error.errno in _OURS:
            raise
        return _of_error(error)
    except ValueError as error:
        return f"bad target: {error}"


def _of_exit(probe: Probe, code: int | None) -> str:
    if code is None:
        return f"no answer within {probe.timeout_s:g} s"
    if code < 0:
        return f"killed by signal {-code}"
    return f"exited with code {code}" if code else ""


def _of_error(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    if isinstance(error, socket.gaierror) or not error.errno:
        return (error.strerror or str(error) or type(error).__name__).lower()
    return os.strerror(error.errno).lower()  # asyncio's own text repeats the address


# --- ports and URLs --------------------------------------------------------------------------------------------------


async def _ask_tcp(address: str) -> str:
    host, _, port = address.rpartition(":")
    async with _connection(host.strip("[]") or "127.0.0.1", int(port)):
        return ""


async def _ask_http(url: str) -> str:
    """Ask for a page, and look at nothing but its status."""
    parts = urlsplit(url)
    host, request, secure = _ascii_host(parts), _request(parts), parts.scheme == "https"
    async with _connection(host, parts.port or (443 if secure else 80), secure) as (reader, writer):
        writer.write(request)
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return "no HTTP answer" if error.partial else "the connection was closed without an answer"
        except asyncio.LimitOverrunError:
            return "no HTTP answer"
    found = _STATUS.fullmatch(line)
    if found is None:
        return "no HTTP answer"
    status = int(found[1])
    return "" if 200 <= status < 400 else f"HTTP status {status}"


def _ascii_host(parts: SplitResult) -> str:
    if not parts.hostname:
        raise ValueError("no host")
    return parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()


def _request(parts: SplitResult) -> bytes:
    host = _ascii_host(parts)
    host = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port else "")
    target = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    lines = (f"GET {target} HTTP/1.1", f"Host: {host}", "User-Agent: etcdreplica", "Accept: */*", "Connection: close", "", "")
    return "\r\n".join(lines).encode("ascii")


@contextlib.asynccontextmanager
async def _connection(
    host: str, port: int, secure: bool = False
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect to the first address of a host that accepts. Raises OSError."""
    context, name = (_tls(), host) if secure else (None, None)
    error: OSError = OSError("no address")
    for address in await _addresses(host):
        try:
            reader, writer = await asyncio.open_connection(address, port, limit=LINE_LIMIT, ssl=context, server_hostname=name)
            break
        except OSError as failure:
            error = failure
    else:
        raise error
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # nobody waits for what the other side still has to say


@functools.cache
def _tls() -> ssl.SSLContext:
    """Trust what this machine trusts; reading all that takes tens of milliseconds."""
    return ssl.create_default_context()


async def _addresses(host: str) -> list[str]:
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    return await asyncio.wrap_future(_look_up(host))


_look_ups: dict[str, Future[list[str]]] = {}  # those under way


def _look_up(host: str) -> Future[list[str]]:
    """Resolve a name in a thread that nobody has to wait for: the resolver knows no timeout and cannot be called off."""
    found = _look_ups.get(host)
    if found is not None:
        return found
    future: Future[list[str]] = Future()
    future.set_running_or_notify_cancel()  # whoever asked may lose patience; the next one takes this answer

    def work() -> None:
        try:
            names = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except Exception as error:
            _look_ups.pop(host, None)
            future.set_exception(error)
        else:
            _look_ups.pop(host, None)
            future.set_result([str(name[4][0]) for name in names])

    _look_ups[host] = future
    try:
        threading.Thread(target=work, name="etcdreplica-resolve", daemon=True).start()
    except RuntimeError:
        del _look_ups[host]
        raise
    return future


# --- commands --------------------------------------------------------------------------------------------------------


def shell_runner(cwd: str, env: Mapping[str, str]) -> Run:
    """Return what runs a probe's command for a program with this directory and environment. Its output goes nowhere.

    However the command ends, all that is left of its session's process group is killed before its answer is taken.
    Raises OSError when it cannot be started.
    """

    async def run(command: str, timeout_s: float) -> int | None:
        child = _spawn(command, cwd, env)
        ended = _reaped(child)
        try:
            return await asyncio.wait_for(asyncio.shield(ended), timeout_s)
        except TimeoutError:
            return None
        finally:
            if not ended.done():
                _kill_group(child)
                await asyncio.wait([ended], timeout=REAP_S)

    return run


def _spawn(command: str, cwd: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    nowhere = subprocess.DEVNULL
    shell = ["/bin/sh", "-c", command]
    return subprocess.Popen(shell, cwd=cwd, env=env, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def _reaped(child: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Return the exit code to come. The child is reaped even if nobody waits any more.

    Its group is killed while it is a zombie, for until then no other group can have its number.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    try:
        fd = os.pidfd_open(child.pid)
    except OSError:
        _kill_group(child)
        child.wait()
        raise

    def reap() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        _kill_group(child)
        code = child.wait()
        if not ended.done():
            ended.set_result(code)

    loop.add_reader(fd, reap)
    return ended


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
