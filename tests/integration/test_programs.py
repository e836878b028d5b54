"""Programs that know nothing of etcdreplica, under cold and warm: real servers, and shell scripts that note what happens."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from etcdreplica.cli.appfile import registration_of
from etcdreplica.clock import boottime
from etcdreplica.daemon.registry import register
from etcdreplica.model import AssignmentState, Event, Failure, FailureKind, ReplicaState
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.journal import written_lines
from etcdreplica.testing.processes import descendants, halt
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    cli,
    eventually,
    fails_over,
    in_store,
    is_running,
    read_json,
    still_running,
    the_error,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration

WEB = Path(__file__).parent / "apps" / "web.py"
HOOKS = ("pre_start", "on_promote", "on_demote", "notify")
FIELDS = ("HOOK", "HOST", "ROLE", "EPOCH", "PRIMARY", "OLD_PRIMARY", "PID", "APP")
_numbers = itertools.count()


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Two hosts."""
    with LocalCluster(2, etcd=etcd_server, cluster=unique("programs"), lease_ttl_s=LASTING_TTL_S) as running:
        yield running


class Programs:
    """Applications of one test, and the journal that their hooks and scripts write to."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.journal = directory / "journal"
        self.names: list[str] = []

    def note(self, *words: str, then: str = "") -> str:
        """Return a shell command that writes a line: words, or what a hook is told, and does something more."""
        line = " ".join(words) or ",".join(f"${{ETCDREPLICA_{field}:--}}" for field in FIELDS)
        return f'echo "{line}" >> {self.journal}; {then or ":"}'

    def name(self) -> str:
        """Return a name for an application, which is removed afterwards."""
        self.names.append(f"program-{next(_numbers)}")
        return self.names[-1]

    def protect(self, **settings: Any) -> str:
        """Register one, and return its name."""
        name = self.name()
        registration = registration_of(name, settings)
        in_store(self.cluster.etcd, self.cluster.cluster, lambda store: register(store, registration, None))
        return name

    def lines(self) -> list[str]:
        """Return what has been written."""
        return written_lines(self.journal)

    def told(self, hook: str) -> list[dict[str, str]]:
        """Return what the calls of a hook were told."""
        split = (line.split(",") for line in self.lines())
        return [dict(zip(FIELDS, fields, strict=True)) for fields in split if fields[0] == hook]

    def events(self, name: str) -> list[Event]:
        """Return the history of one."""
        return [event for (app, _), event in sorted(self.cluster.events.items()) if app == name]

    def primary(self, name: str) -> tuple[str, int]:
        """Wait for a primary that has a process, ready or not, and return host and process."""

        def has_one(_: object) -> bool:
            with contextlib.suppress(LookupError):
                return bool(self.cluster.primary(name))
            return False

        self.cluster.wait_until(has_one, "a primary")
        return self.cluster.primary(name)

    def wait_event(self, name: str, condition: Callable[[Failure], bool], what: str) -> Failure:
        """Wait for an entry of its history."""
        self.cluster.wait_until(lambda _: any(condition(event.failure) for event in self.events(name)), what)
        return next(event.failure for event in self.events(name) if condition(event.failure))


@pytest.fixture
def programs(cluster: LocalCluster, tmp_path: Path) -> Iterator[Programs]:
    """Those of one test."""
    made = Programs(cluster, tmp_path)
    yield made
    for name in made.names:
        if name in cluster.view.apps:
            cluster.remove(name)


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, question: bytes) -> bytes:
    """Send a line to a server and return the first piece of its answer."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        connection.sendall(question)
        return connection.recv(4096)


def get(port: int) -> str:
    """Return the page of a web server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE_S) as response:
        return str(response.read().decode())


def has_words(pid: int, *words: str) -> bool:
    """Whether this is the command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes() == "".join(f"{word}\0" for word in words).encode()


def sleepers(root: int) -> list[int]:
    """Return the descendants of a process that only sleep."""
    return [pid for pid in descendants(root) if is_running(pid) and has_words(pid, "sleep", "1000")]


def need(program: str) -> str:
    """Skip where a program is missing."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def redis(port: int, directory: Path) -> tuple[list[str], bytes, bytes]:
    """Return the command, a question and the answer."""
    return [need("redis-server"), "--port", str(port), "--dir", str(directory), "--save", ""], b"PING\r\n", b"+PONG"


def memcached(port: int, directory: Path) -> tuple[list[str], bytes, bytes]:
    """Return the same."""
    return [need("memcached"), "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody"], b"version\r\n", b"VERSION"


def nginx(port: int, directory: Path) -> tuple[list[str], bytes, bytes]:
    """Return the same."""
    configuration = directory / "nginx.conf"
    temporary = " ".join(
        f"{what}_temp_path {directory}/{what};" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration.write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/error; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port}; location / {{ return 200 here; }} }} }}\n"
    )
    return [need("nginx"), "-c", str(configuration)], b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"


@pytest.mark.parametrize("server", [redis, memcached, nginx])
def test_a_server_of_the_distribution(
    programs: Programs, cluster: LocalCluster, tmp_path: Path, server: Callable[[int, Path], tuple[list[str], bytes, bytes]]
) -> None:
    """By one command, as a user would; it answers, is taken over when it is killed, and nothing of it stays behind."""
    port, name = free_port(), programs.name()
    command, question, answer = server(port, tmp_path)
    env = {"ETCDREPLICA_SOCKET": str(cluster.hosts["host-b"].socket_path)}
    done = cli("protect", "--name", name, "--probe", f"tcp:{port}", "--wait", "-o", "json", "--", *command, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["name"], told["primary"]) == (name, "host-b")  # where it was registered
    processes: set[int] = set()
    for host in ("host-b", "host-a"):
        cluster.wait_ready(name)
        found, pid = cluster.primary(name)
        assert found == host
        assert ask(port, question).startswith(answer)
        processes |= {pid, *descendants(pid)}
        if host == "host-b":
            fails_over(cluster, name)
    cluster.remove(name)
    assert still_running(processes) == []


def test_a_web_server_under_load(programs: Programs, cluster: LocalCluster) -> None:
    """Its primary is killed under constant requests: they fail for a moment, then another epoch answers, and never two."""
    port = free_port()
    name = programs.protect(command=[sys.executable, str(WEB), str(port)], probes=[f"http://127.0.0.1:{port}/"])
    epoch = cluster.wait_ready(name)
    requests: list[tuple[float, float, str]] = []  # begun, ended, and what was answered, if anything
    enough = threading.Event()

    def load() -> None:
        while not enough.is_set():
            begun, text = boottime(), ""
            try:
                text = get(port)
            except (OSError, HTTPException):
                time.sleep(0.005)  # a client that tries again
            requests.append((begun, boottime(), text))

    def answered(by: str) -> int:
        return sum(text.startswith(by) for _, _, text in requests)

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        eventually(lambda: answered("host-") > 50, "the first answers")
        old, _ = cluster.kill_replica(name)
        new = "host-a" if old == "host-b" else "host-b"
        eventually(lambda: answered(new) > 50, "answers of the other host")
    finally:
        enough.set()
        for client in clients:
            client.join(PATIENCE_S)
    assert cluster.wait_ready(name) == epoch + 1
    failed = [begun for begun, _, text in requests if not text]
    old_last = max(begun for begun, _, text in requests if text.startswith(old))
    new_first = min((begun, ended) for begun, ended, text in requests if text.startswith(new))
    assert failed, "the kill was not noticed at all"
    assert old_last < new_first[0]
    assert max(failed) < new_first[1], "requests failed again after the fail-over"
    assert {text for _, _, text in requests} == {"", f"{old} {epoch} primary", f"{new} {epoch + 1} primary"}
    print(f"{len(failed)} of {len(requests)} requests failed, for {new_first[0] - old_last:.3f} s")


def test_hooks_are_told_what_happens(programs: Programs, cluster: LocalCluster) -> None:
    """Each at its time, with roles, epochs and primaries; what they print stands in the history."""
    hooks = {hook: programs.note(then=f"echo 'printed by {hook}'") for hook in HOOKS}
    name = programs.protect(command=["sleep", "1000"], **hooks)
    epoch = cluster.wait_ready(name)
    (old, pid) = cluster.primary(name)
    new = "host-a" if old == "host-b" else "host-b"
    first = {"HOST": old, "ROLE": "primary", "EPOCH": str(epoch), "PRIMARY": old, "OLD_PRIMARY": "-", "APP": name}
    assert programs.told("pre-start") == [{"HOOK": "pre-start", "PID": "-", **first}]
    assert programs.told("on-promote") == [{"HOOK": "on-promote", "PID": str(pid), **first}]
    fails_over(cluster, name)
    failure = programs.wait_event(name, lambda failure: failure.host == old, "the failure to be told")
    assert "on-promote done in" in failure.evidence
    assert "printed by pre_start" in failure.evidence
    promoted = programs.told("on-promote")[-1]
    assert (promoted["HOST"], promoted["EPOCH"], promoted["OLD_PRIMARY"]) == (new, str(epoch + 1), old)
    assert programs.told("on-demote") == []
    cluster.remove(name)
    assert [told["HOST"] for told in programs.told("on-demote")] == [new]

    def roles() -> dict[str, list[str]]:
        notified = programs.told("notify")
        return {host: [told["ROLE"] for told in notified if told["HOST"] == host] for host in (old, new)}

    expected = {old: ["primary", "none", "backup", "none"], new: ["backup", "primary", "none"]}
    eventually(lambda: roles() == expected, f"the notifications {expected} in {roles()}")


def test_a_failed_pre_start_moves_on(programs: Programs, cluster: LocalCluster) -> None:
    """The host that cannot prepare is passed over, with what it said; the program never ran there."""
    check = 'test "$ETCDREPLICA_HOST" = host-b || { echo no disk; exit 3; }'
    name = programs.protect(
        command=["/bin/sh", "-c", programs.note("ran on $ETCDREPLICA_HOST", then="exec sleep 1000")], pre_start=check
    )
    cluster.wait_until(
        lambda view: name in view.apps and any(r.state is ReplicaState.RUNNING for r in view.apps[name].replicas.values()),
        "its primary",
    )
    assert cluster.primary(name)[0] == "host-b"
    failure = programs.wait_event(name, lambda failure: failure.host == "host-a", "the refusal")
    assert (failure.kind, failure.reason) == (FailureKind.REFUSED, "pre-start exited with code 3: no disk")
    eventually(lambda: programs.lines() == ["ran on host-b"], "the program to have noted that it runs")


def test_a_failed_promotion_is_a_failure(programs: Programs, cluster: LocalCluster) -> None:
    """It counts, the program is ended with it, and the last of too many parks the application."""
    name = programs.protect(
        command=["sleep", "1000"], on_promote=programs.note(then="echo taken already >&2; exit 1"), max_restarts=2
    )
    cluster.wait_until(
        lambda view: (
            name in view.apps
            and (found := view.apps[name].assignment) is not None
            and found.state is AssignmentState.FAILED
            and len(programs.events(name)) == 3
        ),
        "it to be parked",
    )
    failures = {(event.failure.kind, event.failure.reason) for event in programs.events(name)}
    assert failures == {(FailureKind.HOOK, "on-promote exited with code 1: taken already")}
    pids = [int(told["PID"]) for told in programs.told("on-promote")]
    assert len(pids) == 3
    assert still_running(pids) == []


def test_a_hook_that_hangs_is_killed_with_all_it_started(programs: Programs, cluster: LocalCluster, tmp_path: Path) -> None:
    """The time limit counts as a failure, and nothing of the hook stays behind."""
    pids = tmp_path / "pids"
    hang = f"sleep 1000 & echo $! >> {pids}; echo $$ >> {pids}; wait"
    name = programs.protect(command=["sleep", "1000"], pre_start=hang, hook_timeout=0.3)
    cluster.wait_until(
        lambda view: name in view.apps and (found := view.apps[name].assignment) is not None and len(found.refusals) == 2,
        "both hosts to have refused",
    )
    refusals = cluster.view.apps[name].assignment
    assert refusals is not None
    assert set(refusals.refusals.values()) == {"pre-start did not end within 0.3 s and was killed"}
    started = [int(line) for line in written_lines(pids)]
    assert len(started) >= 4
    assert still_running(started) == []


def test_warm_with_a_standby_command(programs: Programs, cluster: LocalCluster) -> None:
    """It runs on the backup, is dead before the program starts there, and both never run at a time."""
    standby = (
        f"trap '{programs.note('standby ends')}; exit' TERM; {programs.note('standby begins')}; while :; do sleep 0.05; done"
    )
    name = programs.protect(
        style="warm", standby=standby, command=["/bin/sh", "-c", programs.note("program begins", then="exec sleep 1000")]
    )
    cluster.wait_ready(name)
    eventually(lambda: sorted(programs.lines()) == ["program begins", "standby begins"], "both to begin")
    backup = next(host for host in cluster.hosts if host != cluster.primary(name)[0])
    fails_over(cluster, name)
    assert cluster.primary(name)[0] == backup
    eventually(lambda: len(programs.lines()) == 5, f"the journal to be complete: {programs.lines()}")
    lines = programs.lines()[2:]
    assert lines.index("standby ends") < lines.index("program begins")
    assert sorted(lines) == ["program begins", "standby begins", "standby ends"]


def test_warm_and_kept_ready(programs: Programs, cluster: LocalCluster) -> None:
    """The program runs on both hosts; the on-promote hook makes the very process of the backup serve."""
    ports = {host: free_port() for host in cluster.hosts}
    name = programs.protect(
        style="warm",
        command=["/bin/sh", "-c", f'exec {sys.executable} {WEB} "$PORT"'],
        overrides={host: {"env": {"PORT": str(port)}} for host, port in ports.items()},
        probes=["exec:python3 -c \"import os, socket; socket.create_connection(('127.0.0.1', int(os.environ['PORT'])))\""],
        on_promote=programs.note(),
    )
    epoch = cluster.wait_ready(name)
    host, pid = cluster.primary(name)
    other = next(each for each in ports if each != host)
    replica = cluster.view.apps[name].replicas[other]
    assert get(ports[other]) == f"{other} {epoch} backup"
    fails_over(cluster, name)
    assert cluster.primary(name) == (other, replica.pid)
    assert [(told["HOST"], told["PID"]) for told in programs.told("on-promote")] == [
        (host, str(pid)),
        (other, str(replica.pid)),
    ]


def test_redis_with_replicas(programs: Programs, cluster: LocalCluster, tmp_path: Path) -> None:
    """As in docs/programs.md: the backup follows the primary, and takes over with what was written."""
    server, client = need("redis-server"), need("redis-cli")
    ports = {host: str(free_port()) for host in cluster.hosts}
    where = "".join(f"{host}) port={port};; " for host, port in ports.items())
    name = programs.protect(
        style="warm",
        command=[
            "/bin/sh",
            "-c",
            f"exec {server} --port $PORT --dir {tmp_path} --save '' --repl-diskless-sync-delay 0 --replicaof 127.0.0.1 1",
        ],
        overrides={host: {"env": {"PORT": port}} for host, port in ports.items()},
        probes=[f'exec:{client} -p "$PORT" ping'],
        on_promote=f'{client} -p "$PORT" replicaof no one',
        notify=f'if [ "$ETCDREPLICA_ROLE" = backup ]; then case "$ETCDREPLICA_PRIMARY" in {where} esac; '
        f'{client} -p "$PORT" replicaof 127.0.0.1 "$port"; fi',
    )
    cluster.wait_ready(name)
    old, _ = cluster.primary(name)
    new = next(host for host in ports if host != old)
    assert ask(int(ports[old]), b"SET word kept\r\n") == b"+OK\r\n"
    eventually(lambda: ask(int(ports[new]), b"GET word\r\n") == b"$4\r\nkept\r\n", "the replica to have it")
    assert ask(int(ports[new]), b"SET word other\r\n").startswith(b"-READONLY")
    fails_over(cluster, name)
    assert ask(int(ports[new]), b"GET word\r\n") == b"$4\r\nkept\r\n"
    assert ask(int(ports[new]), b"SET word other\r\n") == b"+OK\r\n"
    eventually(lambda: ask(int(ports[old]), b"GET word\r\n") == b"$5\r\nother\r\n", "the new backup to follow")


def test_a_hook_ends_at_the_deadline(tmp_path: Path) -> None:
    """Its WatchDog is stopped for longer than the lease: its guardian kills hook and program before another host begins."""
    with LocalCluster(2, lease_ttl_s=2.0) as cluster:
        programs = Programs(cluster, tmp_path)
        name = programs.protect(command=["sleep", "1000"], on_promote=programs.note(then="exec sleep 1000"))
        eventually(lambda: len(programs.told("on-promote")) == 1, "the hook")
        host, pid = programs.primary(name)
        watchdog = cluster.view.hosts[host].host.pid
        node = cluster.hosts[host].process
        assert node is not None
        eventually(lambda: len(sleepers(node.pid)) == 2, "the hook to sleep")
        family = sleepers(node.pid)
        assert pid in family
        halt(watchdog)
        try:
            eventually(lambda: len(programs.told("on-promote")) == 2, "the hook of the other host")
            assert still_running(family) == []
        finally:
            os.kill(watchdog, signal.SIGCONT)


def test_apply_to_what_runs(programs: Programs, cluster: LocalCluster, tmp_path: Path) -> None:
    """A degree counts at once and disturbs nothing; what a copy was started with, it keeps, and apply says so."""
    name, path = programs.name(), tmp_path / "app.toml"
    text = f'[application.{name}]\ncommand = ["sleep", "1000"]\ndegree = 1\n'
    path.write_text(text)
    assert cli("apply", *cluster.connection, str(path)).stdout == f"{name}: created\n"
    epoch, primary = cluster.wait_ready(name), cluster.primary(name)
    path.write_text(text.replace("degree = 1", "degree = 2").replace("1000", "1001"))
    done = cli("apply", *cluster.connection, str(path))
    kept = f"{name}: changed; copies that run keep the command they were started with; new ones have the new\n"
    assert (done.returncode, done.stdout) == (0, kept)
    cluster.wait_until(lambda view: len(view.apps[name].replicas) == 2, "the second copy")
    assert (cluster.wait_ready(name), cluster.primary(name)) == (epoch, primary)
    fails_over(cluster, name)
    _, pid = cluster.primary(name)
    assert has_words(pid, "sleep", "1001")


def test_a_decorated_program_from_a_file(programs: Programs, cluster: LocalCluster) -> None:
    """Nobody runs it by hand first; what is registered counts, not what the decorator says."""
    name = programs.name()
    command = [sys.executable, str(STEADY), "--name", name, "--style", "warm", "--degree", "1"]
    registration = registration_of(name, {"command": command, "decorated": True, "degree": 2})
    in_store(cluster.etcd, cluster.cluster, lambda store: register(store, registration, None))
    fails_over(cluster, name)
    states = sorted(replica.state for replica in cluster.view.apps[name].replicas.values())
    assert states == [ReplicaState.READY, ReplicaState.RUNNING]


def test_a_program_that_never_answers_has_failed_to_start(programs: Programs, cluster: LocalCluster) -> None:
    """After start_timeout; and one that puts itself into the background is told to stay."""
    silent = programs.protect(command=["sleep", "1000"], probes=[f"tcp:{free_port()}"], start_timeout=0.3)
    gone = programs.protect(command=["/bin/sh", "-c", "sleep 1000 &"], probes=[f"tcp:{free_port()}"])
    failure = programs.wait_event(silent, lambda failure: failure.kind is FailureKind.HANG, "its failure")
    assert failure.reason.startswith("it did not answer its probes within 0.3 s of its start: probe tcp:")
    assert failure.reason.endswith("connection refused")
    failure = programs.wait_event(gone, lambda failure: failure.kind is FailureKind.EXIT, "the other's")
    assert failure.reason == "exited with code 0 before it was ready; it must stay in the foreground"


def test_a_watchdog_that_dies_while_a_hook_runs(programs: Programs, cluster: LocalCluster, tmp_path: Path) -> None:
    """The next one ends that hook, and runs it again: never two of them, and the program goes on."""
    go = tmp_path / "go"
    wait = f"test -e {go} || {{ echo $$ >> {tmp_path}/waiting; exec sleep 1000; }}"
    name = programs.protect(command=["sleep", "1000"], on_promote=wait, hook_timeout=600)
    eventually(lambda: (tmp_path / "waiting").exists() and written_lines(tmp_path / "waiting"), "the hook")
    host, pid = programs.primary(name)
    (hook,) = (int(line) for line in written_lines(tmp_path / "waiting"))
    go.touch()
    os.kill(cluster.view.hosts[host].host.pid, signal.SIGKILL)
    cluster.wait_ready(name)
    assert cluster.primary(name) == (host, pid)
    assert still_running([hook]) == []
    assert programs.events(name) == []


def test_protect_again(programs: Programs, cluster: LocalCluster) -> None:
    """The same changes nothing; something else is refused with what differs; --wait tells why there is no primary."""
    name = programs.name()
    words = ("protect", *cluster.connection, "--name", name)
    for _ in range(2):
        done = cli(*words, "--", "sleep", "1000")
        assert (done.returncode, done.stderr) == (0, "")
    epoch = cluster.wait_ready(name)
    error = the_error(cli(*words, "--degree", "1", "--", "sleep", "1000"), 1)
    assert "degree 2 -> 1" in error
    assert "etcdreplica apply" in error
    assert read_json(cluster, "describe", name)["epoch"] == epoch
    missing = programs.name()
    error = the_error(
        cli("protect", *cluster.connection, "--name", missing, "--wait", "--timeout", "2", "--", "no-such-program"), 1
    )
    assert "no program no-such-program" in error
