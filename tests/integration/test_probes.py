"""Probes against real servers, sockets and commands: every answer that counts as good or bad, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.daemon import probes
from etcdreplica.daemon.probes import Prober, Run, ask, shell_runner
from etcdreplica.model import Probe
from etcdreplica.testing.journal import written_lines
from tests.integration.conftest import wait_dead

pytestmark = pytest.mark.integration

PATIENCE_S = 60.0
SOON_S = 0.3  # for questions that are to run out of time
ENVIRONMENT = {"PATH": os.environ["PATH"]}
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def no_command(command: str, timeout_s: float) -> int | None:
    """Be asked for no command."""
    raise AssertionError(command)


def patient(target: str) -> Probe:
    """Return a probe whose answer comes long before its timeout."""
    return Probe(target, timeout_s=PATIENCE_S)


def saying(answer: bytes) -> Serve:
    """Serve by reading a request and answering with this, whatever was asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    return serve


def endless(start: bytes) -> Serve:
    """Serve by never ending to answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(b"x" * 4096)
            await writer.drain()

    return serve


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve by reading and saying nothing."""
    await reader.read()


@contextlib.asynccontextmanager
async def serving(serve: Serve, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Run a server, and yield its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await serve(reader, writer)
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, host, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port at which nobody listens, and nobody else can either."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def dropping() -> Iterator[int]:
    """A port that answers no packet: the queue of its listener is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# --- ports -----------------------------------------------------------------------------------------------------------


async def test_tcp() -> None:
    """Accepting is enough, by port, by address and by name."""
    async with serving(silent) as port:
        for target in (f"tcp:{port}", f"tcp:127.0.0.1:{port}", f"tcp:localhost:{port}"):
            assert await ask(patient(target), no_command) == ""


async def test_tcp_ipv6() -> None:
    """An address in brackets."""
    try:
        async with serving(saying(b"HTTP/1.1 200 OK\r\n\r\n"), "::1") as port:
            assert await ask(patient(f"tcp:[::1]:{port}"), no_command) == ""
            assert await ask(patient(f"http://[::1]:{port}/"), no_command) == ""
    except OSError:
        pytest.skip("no IPv6 here")


async def test_tcp_refused(refusing: int) -> None:
    """Nobody listens."""
    for target in (f"tcp:{refusing}", f"tcp:localhost:{refusing}"):
        assert await ask(patient(target), no_command) == "connection refused"


async def test_tcp_dropped(dropping: int) -> None:
    """No answer at all ends with the timeout."""
    assert await ask(Probe(f"tcp:{dropping}", timeout_s=SOON_S), no_command) == "no answer within 0.3 s"


async def test_unknown_name() -> None:
    """A name that does not exist is a bad answer; the name was looked up once for all who asked at the same time."""
    asked = [ask(patient("tcp:no.such.host.invalid:80"), no_command) for _ in range(3)]
    reasons = await asyncio.gather(*asked)
    assert len(set(reasons)) == 1
    assert reasons[0] != ""
    assert probes._look_ups == {}


async def test_name_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many questions leave one thread behind, not one each."""
    release, calls = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def getaddrinfo(host: str, *_: object, **__: object) -> object:
        calls.append(host)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(PATIENCE_S)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", getaddrinfo)
        for _ in range(3):
            assert await ask(Probe("tcp:slow.example:80", timeout_s=0.05), no_command) == "no answer within 0.05 s"
        assert calls == ["slow.example"]
        found = asyncio.wrap_future(probes._look_up("slow.example"))
        release.set()
        assert await asyncio.wait_for(found, PATIENCE_S) == ["127.0.0.1"]


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ""),
        (b"HTTP/1.0 204\r\n\r\n", ""),
        (b"HTTP/1.1 204 \r\n\r\n", ""),
        (b"HTTP/1.1 200 OK\n\n", ""),
        (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\n\r\n", ""),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP status 404"),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", "HTTP status 500"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "HTTP status 100"),
        (b"", "the connection was closed without an answer"),
        (b"HTTP/1.1 200", "no HTTP answer"),
        (b"HTTP/1.1 20 OK\r\n", "no HTTP answer"),
        (b"HTTP/1.1 2000 OK\r\n", "no HTTP answer"),
        (b"220 mail.example ESMTP\r\n", "no HTTP answer"),
        (b"\x00\xff\n", "no HTTP answer"),
        (b"\n", "no HTTP answer"),
    ],
    ids=repr,
)
async def test_http_answers(answer: bytes, reason: str) -> None:
    """2xx and 3xx are good; anything else is named."""
    async with serving(saying(answer)) as port:
        assert await ask(patient(f"http://127.0.0.1:{port}/health"), no_command) == reason


@pytest.mark.parametrize(
    ("start", "reason"),
    [(b"HTTP/1.1 200 OK\r\nX-Endless: ", ""), (b"HTTP/1.1 200 ", "no HTTP answer"), (b"", "no HTTP answer")],
    ids=["header", "status line", "garbage"],
)
async def test_http_answer_that_never_ends(start: bytes, reason: str) -> None:
    """Only a status line is read, and only so much of it."""
    async with serving(endless(start)) as port:
        assert await ask(patient(f"http://127.0.0.1:{port}"), no_command) == reason


async def test_http_silence() -> None:
    """A server that accepts and never answers ends with the timeout."""
    async with serving(silent) as port:
        assert await ask(Probe(f"http://127.0.0.1:{port}", timeout_s=SOON_S), no_command) == "no answer within 0.3 s"


async def test_http_refused(refusing: int) -> None:
    """Nobody listens."""
    assert await ask(patient(f"http://127.0.0.1:{refusing}/"), no_command) == "connection refused"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("", b"GET / HTTP/1.1"),
        ("/a/b?c=d&e#f", b"GET /a/b?c=d&e HTTP/1.1"),
        ("?x", b"GET /?x HTTP/1.1"),
        ("/a%20b", b"GET /a%20b HTTP/1.1"),
        ("/ä", b"GET /%C3%A4 HTTP/1.1"),
    ],
)
async def test_http_request(path: str, line: bytes) -> None:
    """What the server gets is a request of its own path, under its own name."""
    got = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async with serving(serve) as port:
        assert await ask(patient(f"http://user:secret@localhost:{port}{path}"), no_command) == ""
        lines = (await got).split(b"\r\n")
        assert lines[0] == line
        assert f"Host: localhost:{port}".encode() in lines


@pytest.mark.parametrize("target", ["http://:80/", "http://x:99999/", "http://[::1/", "http://" + "é" * 70 + "/"])
async def test_bad_url(target: str) -> None:
    """A URL that names no place is a bad answer like any other."""
    assert (await ask(patient(target), no_command)).startswith("bad target: ")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for localhost that signs itself, and a server's context that uses it."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


async def test_https(certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of a trusted authority for that very name, and no other."""
    cert, context = certificate
    async with serving(saying(b"HTTP/1.1 200 OK\r\n\r\n"), context=context) as port:
        reason = await ask(patient(f"https://localhost:{port}/"), no_command)
        assert reason.startswith("bad certificate: self")
        with monkeypatch.context() as patched:
            patched.setattr(probes, "_tls", lambda: ssl.create_default_context(cafile=cert))
            assert await ask(patient(f"https://localhost:{port}/"), no_command) == ""
            reason = await ask(patient(f"https://127.0.0.1:{port}/"), no_command)
            assert reason.startswith("bad certificate: ")


async def test_https_of_what_speaks_no_tls() -> None:
    """Garbage and silence during the handshake."""
    async with serving(endless(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        assert (await ask(patient(f"https://127.0.0.1:{port}/"), no_command)).startswith("TLS failed: ")
    async with serving(silent) as port:
        assert await ask(Probe(f"https://127.0.0.1:{port}/", timeout_s=SOON_S), no_command) == "no answer within 0.3 s"


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run commands in a directory of the test."""
    return shell_runner(str(tmp_path), ENVIRONMENT)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("true", ""),
        ("exit 0", ""),
        ("false", "exited with code 1"),
        ("exit 77", "exited with code 77"),
        ("/no/such/command", "exited with code 127"),
        ("kill -TERM $$", "killed by signal 15"),
        ("yes | head -c 1000000; yes | head -c 1000000 >&2", ""),  # output goes nowhere
        ("! read line", ""),  # there is no input
    ],
)
async def test_exec(run: Run, command: str, reason: str) -> None:
    """A command that exits with 0 is good."""
    assert await ask(patient(f"exec:{command}"), run) == reason


async def test_exec_has_directory_and_environment(tmp_path: Path) -> None:
    """Those of the program, not those of the WatchDog."""
    run = shell_runner(str(tmp_path), {**ENVIRONMENT, "ONLY_HERE": "yes"})
    (tmp_path / "marker").touch()
    command = 'test -e marker && test "$ONLY_HERE" = yes && test -z "$HOME"'
    assert await ask(patient(f"exec:{command}"), run) == ""


async def test_exec_without_its_directory(tmp_path: Path) -> None:
    """A command that cannot be started is a bad answer."""
    run = shell_runner(str(tmp_path / "gone"), ENVIRONMENT)
    assert await ask(patient("exec:true"), run) == "no such file or directory"


def tree(pids: Path) -> str:
    """Return a command that starts children and grandchildren, writes their pids, and hangs."""
    note = f"echo $! >> {pids}"
    return f"(sleep 600 & {note}; trap '' TERM; sleep 600) & {note}; sleep 600 & {note}; echo $$ >> {pids}; wait"


async def wait_pids(path: Path, count: int) -> list[int]:
    """Wait until so many processes have written their pids."""

    def wait() -> list[int]:
        deadline = time.monotonic() + PATIENCE_S
        while len(lines := written_lines(path)) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)  # a file raises no event here
        return [int(line) for line in lines]

    return await asyncio.to_thread(wait)


def zombies() -> list[str]:
    """Return our own children that nobody has reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            found += [stat.parent.name] if state == "Z" and int(parent) == os.getpid() else []
    return found


async def test_exec_that_hangs_leaves_nothing(run: Run, tmp_path: Path) -> None:
    """When its time is over, its whole family is killed."""
    pids = tmp_path / "pids"
    assert await ask(Probe(f"exec:{tree(pids)}", timeout_s=1.0), run) == "no answer within 1 s"
    for pid in await wait_pids(pids, 4):
        wait_dead(pid)
    assert not zombies()


async def test_exec_that_ends_leaves_nothing(run: Run, tmp_path: Path) -> None:
    """Children that outlive their command are killed with it."""
    assert await ask(patient("exec:sleep 600 & echo $! > pid"), run) == ""
    wait_dead(int((tmp_path / "pid").read_text()))


async def test_exec_that_is_cancelled_leaves_nothing(run: Run, tmp_path: Path) -> None:
    """Nobody wants its answer any more."""
    pids = tmp_path / "pids"
    asking = asyncio.create_task(ask(patient(f"exec:{tree(pids)}"), run))
    family = await wait_pids(pids, 4)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    for pid in family:
        wait_dead(pid)


async def test_questions_leave_no_descriptors(run: Run, refusing: int) -> None:
    """Whatever came of them."""

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    await ask(patient("exec:true"), run)
    before = count()
    async with serving(silent) as mute, serving(endless(b"HTTP/1.1 200 OK\r\n")) as loud:
        urls = [f"http://127.0.0.1:{port}/" for port in (mute, loud, refusing)] + [f"https://127.0.0.1:{loud}/"]
        for target in (f"tcp:{mute}", f"tcp:{refusing}", *urls, "exec:true", "exec:sleep 9"):
            await asyncio.gather(*(ask(Probe(target, timeout_s=0.1), run) for _ in range(5)))
    async with asyncio.timeout(PATIENCE_S):
        while count() > before:  # noqa: ASYNC110 a closed descriptor raises no event
            await asyncio.sleep(0)
    assert probes._look_ups == {}


# --- the prober ------------------------------------------------------------------------------------------------------


class Watched:
    """A prober and what it told."""

    def __init__(self, *watched: Probe, run: Run = no_command) -> None:
        self.reasons: list[str] = []
        self.hung = asyncio.Event()
        self.prober = Prober(watched, run, self._on_hung)

    def _on_hung(self, reason: str) -> None:
        self.reasons.append(reason)
        self.hung.set()

    async def __aenter__(self) -> Watched:
        self.prober.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.prober.stop()
        await asyncio.wait_for(self.prober.closed(), PATIENCE_S)


def quick(target: str, failures: int = 3, timeout_s: float = PATIENCE_S, grace_s: float = 0.0) -> Probe:
    """Return a probe that is asked as often as one may be."""
    return Probe(target, 0.05, timeout_s, failures, grace_s)


async def test_prober_tells_once(refusing: int) -> None:
    """Two probes fail, and one tells; then nothing is asked any more."""
    async with Watched(quick(f"tcp:{refusing}"), quick(f"http://127.0.0.1:{refusing}/")) as watched:
        await asyncio.wait_for(watched.hung.wait(), PATIENCE_S)
        await asyncio.wait_for(watched.prober.closed(), PATIENCE_S)
        (reason,) = watched.reasons
        assert reason in {
            f"probe {target} failed 3 times in a row: connection refused"
            for target in (f"tcp:{refusing}", f"http://127.0.0.1:{refusing}/")
        }


async def test_prober_may_be_stopped_by_what_it_tells(refusing: int) -> None:
    """Whoever is told that a copy is hung ends everything about it."""
    told: list[str] = []

    def on_hung(reason: str) -> None:
        told.append(reason)
        prober.stop()

    prober = Prober([quick(f"tcp:{refusing}", failures=1)], no_command, on_hung)
    prober.start()
    await asyncio.wait_for(prober.closed(), PATIENCE_S)
    prober.stop()
    assert told == [f"probe tcp:{refusing} failed: connection refused"]


async def test_prober_counts_anew_after_a_good_answer() -> None:
    """Two bad ones, a good one, two bad ones: nobody is hung."""
    answers, done = iter("bbgbbg"), asyncio.Event()

    async def run(command: str, timeout_s: float) -> int:
        answer = next(answers, None)
        if answer is None:
            done.set()
        return 1 if answer == "b" else 0

    async with Watched(quick("exec:x"), run=run) as watched:
        await asyncio.wait_for(done.wait(), PATIENCE_S)
        assert watched.reasons == []


async def test_prober_grants_the_grace(refusing: int) -> None:
    """A copy that still starts is not hung; one that has answered and fails then is."""
    asked = 0
    enough = asyncio.Event()

    async def run(command: str, timeout_s: float) -> int:
        nonlocal asked
        asked += 1
        if asked > 5:
            enough.set()
        return 0 if asked == 6 else 1

    async with Watched(quick("exec:x", failures=1, grace_s=1000.0), run=run) as watched:
        await asyncio.wait_for(enough.wait(), PATIENCE_S)
        await asyncio.wait_for(watched.hung.wait(), PATIENCE_S)
        assert asked == 7


async def test_prober_skips_what_the_application_answers() -> None:
    """A "call" probe is asked inside of it."""
    async with Watched(Probe("call")) as watched:
        await asyncio.wait_for(watched.prober.closed(), PATIENCE_S)
        assert watched.reasons == []


async def test_a_stall_of_ours_during_a_question_does_not_count() -> None:
    """The loop blocks until the question is out of time: whoever was asked may well have answered."""
    asked = 0
    later = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        if asked <= 2:
            time.sleep(0.6)  # noqa: ASYNC251 the stall
        if asked > 3:
            later.set()
        await saying(b"HTTP/1.1 200 OK\r\n\r\n")(reader, writer)

    async with serving(serve) as port, Watched(quick(f"http://127.0.0.1:{port}/", failures=1, timeout_s=0.5)) as watched:
        await asyncio.wait_for(later.wait(), PATIENCE_S)
        assert watched.reasons == []


async def test_a_question_asked_in_a_stall_does_not_count() -> None:
    """A bad answer is not believed when the question came late, and the next one is."""
    asked: asyncio.Queue[float] = asyncio.Queue()
    stalled_until = 0.0

    async def run(command: str, timeout_s: float) -> int:
        asked.put_nowait(time.monotonic())
        return 1 if stalled_until else 0

    async with Watched(quick("exec:x", failures=1, timeout_s=0.05), run=run) as watched:
        await asyncio.wait_for(asked.get(), PATIENCE_S)
        time.sleep(0.3)  # noqa: ASYNC251 the stall
        stalled_until = time.monotonic()
        await asyncio.wait_for(asked.get(), PATIENCE_S)
        assert watched.reasons == []
        await asyncio.wait_for(watched.hung.wait(), PATIENCE_S)
        assert asked.get_nowait() - stalled_until >= 0.049  # what was missed is not made up for


async def test_a_silent_server_is_hung_however_long_it_is_asked() -> None:
    """Without a stall of ours a timeout counts."""
    async with serving(silent) as port, Watched(quick(f"http://127.0.0.1:{port}/", timeout_s=SOON_S)) as watched:
        await asyncio.wait_for(watched.hung.wait(), PATIENCE_S)
        assert watched.reasons[0].endswith("failed 3 times in a row: no answer within 0.3 s")


class Heard(logging.Handler):
    """Signals that something was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Signal it."""
        self.text = record.getMessage()
        self.event.set()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Listen to the prober's log."""
    handler = Heard()
    probes.log.addHandler(handler)
    yield handler
    probes.log.removeHandler(handler)


async def test_out_of_descriptors_is_nobody_elses_fault(heard: Heard) -> None:
    """A WatchDog that cannot ask blames nobody, says so, and goes on when it can."""
    answered = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered.set()

    async with serving(serve) as port:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                await ask(patient(f"tcp:{port}"), no_command)
            async with Watched(quick(f"tcp:{port}", failures=1)) as watched:
                await asyncio.wait_for(heard.event.wait(), PATIENCE_S)
                assert heard.text == f"probe tcp:{port} could not be asked: [Errno 24] Too many open files"
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                await asyncio.wait_for(answered.wait(), PATIENCE_S)
                assert watched.reasons == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_stopping_ends_a_command(run: Run, tmp_path: Path) -> None:
    """What is being asked when the copy ends goes with it."""
    pids = tmp_path / "pids"
    async with Watched(quick(f"exec:{tree(pids)}"), run=run):
        family = await wait_pids(pids, 4)
    for pid in family:
        wait_dead(pid)
