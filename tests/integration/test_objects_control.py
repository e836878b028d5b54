"""Replicated objects, as far as etcd and the daemons deal with them: the in-sync set, who takes over, who serves where."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdreplica.app.protocol import VERSION, Decoder, Message, encode
from etcdreplica.model import Assignment
from etcdreplica.store import Key, Kind
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.journal import written_lines
from etcdreplica.testing.processes import descendants
from tests.integration.conftest import LASTING_TTL_S, kill

pytestmark = pytest.mark.integration

PROGRAM = Path(__file__).parent / "apps" / "replicated.py"
PATIENCE_S = 60.0
_numbers = itertools.count()


class Ledger:
    """An object under a name of its own on three hosts."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.name = f"ledger-{next(_numbers)}"
        self.journal = directory / "journal"
        self.members = directory / "members"

    def start(self, *arguments: str) -> None:
        """Start it with its primary on host-a, alone in the set."""
        self.members.write_text("host-a")
        words = ("--name", self.name, "--journal", str(self.journal), "--members", str(self.members), *arguments)
        self.cluster.start(PROGRAM, *words)
        self.wait_set("host-a")

    def keep(self, *hosts: str) -> None:
        """Have the primary make this the set, and wait until the manager has named the successor that follows from it."""
        self.members.write_text(" ".join(hosts))
        self.wait_set(*hosts)
        backups = sorted(set(hosts) - {self.assignment.primary.host if self.assignment.primary else ""})

        def settled(_: object) -> bool:
            replica = self.cluster.view.apps[self.name].replicas.get(self.primary)
            named = replica.successor if replica else None
            return self.assignment.successor == named and (named in backups if backups else named is None)

        self.cluster.wait_until(settled, f"a successor among {backups}", PATIENCE_S)

    def wait_set(self, *hosts: str) -> None:
        """Wait until the record says so, and its members are the copies that have these seats now."""

        def is_so(_: object) -> bool:
            app = self.cluster.view.apps.get(self.name)
            if app is None or app.assignment is None or app.own_in_sync is None:
                return False
            seats = {(seat.host, seat.incarnation) for seat in app.assignment.seats if seat.host in hosts}
            return {(m.host, m.incarnation) for m in app.own_in_sync.members} == seats and len(seats) == len(hosts)

        self.cluster.wait_until(is_so, f"{hosts} to be in sync", PATIENCE_S)

    @property
    def assignment(self) -> Assignment:
        """Its assignment."""
        found = self.cluster.view.apps[self.name].assignment
        assert found is not None
        return found

    @property
    def primary(self) -> str:
        """The host of its primary, or nothing."""
        return self.assignment.primary.host if self.assignment.primary else ""

    def pid(self, host: str) -> int:
        """Return the process id of its copy on a host."""
        pid = self.cluster.view.apps[self.name].replicas[host].pid
        assert pid is not None
        return pid

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Return what its copies were told."""
        lines = [json.loads(line) for line in written_lines(self.journal)]
        return [line for line in lines if line["type"] == kind]

    def wait_told(self, kind: str, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """Wait until they were told so."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(lines := self.told(kind)):
            assert time.monotonic() < deadline, f"{lines}\n{self.cluster.describe()}"
            time.sleep(0.01)  # a file raises no event
        return lines


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts that the tests share."""
    with LocalCluster(3, etcd=etcd_server, cluster="objects", lease_ttl_s=LASTING_TTL_S) as cluster:
        yield cluster


@pytest.fixture
def ledger(cluster: LocalCluster, tmp_path: Path) -> Iterator[Ledger]:
    """The object of one test."""
    ledger = Ledger(cluster, tmp_path)
    yield ledger
    if ledger.name in cluster.view.apps:
        cluster.remove(ledger.name)


class Client:
    """A client of an object, on host-b."""

    def __init__(self, cluster: LocalCluster, app: object) -> None:
        self._decoder = Decoder()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(cluster.hosts["host-b"].socket_path))
        self._messages: list[Message] = []
        self.send("hello", version=VERSION, client=app)

    def send(self, kind: str, **fields: Any) -> None:
        """Say something."""
        self._socket.sendall(encode(kind, **fields))

    def next(self) -> Message | None:
        """Return the next message, or None at the end."""
        while not self._messages:
            data = self._socket.recv(65536)
            if not data:
                return None
            self._messages += self._decoder.feed(data)
        return self._messages.pop(0)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Callable[[object], Client]]:
    """Make clients, and have them hang up."""
    made: list[Client] = []

    def make(app: object) -> Client:
        made.append(Client(cluster, app))
        return made[-1]

    yield make
    for each in made:
        each.close()


# --- the set ---------------------------------------------------------------------------------------------------------


def test_welcome_of_an_object_says_what_it_needs(cluster: LocalCluster, ledger: Ledger) -> None:
    """Its settings, a place for its log, how its host is reached, and from which epoch on it is this application."""
    ledger.start()
    welcomes = ledger.wait_told("welcome", lambda lines: len(lines) == 3)
    for welcome in welcomes:
        assert welcome["object"] == {"min_in_sync": 1, "durable": False, "degree": 3}
        assert welcome["state_dir"] == str(cluster.hosts[welcome["host"]].directory / "objects" / "objects" / ledger.name)
        assert welcome["address"] == cluster.view.hosts[welcome["host"]].host.address
        assert welcome["born"] == ledger.assignment.born


def test_set_of_another_revision_is_not_replaced(ledger: Ledger) -> None:
    """The primary is told so, and that nothing has happened."""
    ledger.start("--stale")
    refused, done = ledger.wait_told("changed", lambda lines: len(lines) == 2)
    assert "the in-sync set has changed meanwhile" in refused["error"]
    assert refused["unknown"] is False
    assert done["revision"] == ledger.cluster.view.apps[ledger.name].in_sync_revision
    first = ledger.told("members")[0]
    assert [first[name] for name in ("revision", "epoch", "primary", "members")] == [0, 0, 0, []]


def test_member_takes_over_without_a_manager(cluster: LocalCluster, ledger: Ledger) -> None:
    """The WatchDog calls the successor, which is in sync, in the transaction that reports the death."""
    ledger.start()
    ledger.keep("host-a", "host-c")
    assert ledger.assignment.successor == "host-c"
    epoch, managers = ledger.assignment.epoch, _managers(cluster)
    for pid in managers:
        kill(pid, signal.SIGSTOP)
    try:
        kill(ledger.pid("host-a"))
        ledger.wait_told("role", lambda lines: [(x["on"], x["epoch"]) for x in lines] == [("host-c", epoch + 1)])
    finally:
        for pid in managers:
            kill(pid, signal.SIGCONT)
    cluster.wait_until(lambda _: ledger.primary == "host-c", "the manager to know", PATIENCE_S)
    assert ledger.assignment.epoch == epoch + 1


def test_each_new_primary_keeps_the_set(cluster: LocalCluster, ledger: Ledger) -> None:
    """It has the dead one taken out, and may be followed by another member; a copy that is not in the set never leads."""
    ledger.start()
    ledger.keep("host-a", "host-c")
    kill(ledger.pid("host-a"))
    cluster.wait_until(lambda _: ledger.primary == "host-c", "host-c to lead", PATIENCE_S)
    ledger.keep("host-c")
    ledger.keep("host-a", "host-c")
    kill(ledger.pid("host-c"))
    cluster.wait_until(lambda _: ledger.primary == "host-a", "host-a to lead", PATIENCE_S)
    ledger.wait_told("role", lambda lines: {x["on"] for x in lines if x["role"] == "primary"} == {"host-a", "host-c"})


def test_copy_that_is_not_in_sync_leads_only_when_all_others_are_dead(cluster: LocalCluster, ledger: Ledger) -> None:
    """Then the application begins anew, and whoever leads is told of a set of which nobody lives."""
    ledger.start()
    ledger.keep("host-a", "host-b")
    ledger.keep("host-a")
    assert ledger.assignment.successor is None
    epoch, dead = ledger.assignment.epoch, ledger.assignment.primary
    assert dead is not None
    kill(ledger.pid("host-a"))
    cluster.wait_until(lambda _: ledger.assignment.epoch > epoch and ledger.primary != "", "a new primary", PATIENCE_S)
    assert ledger.primary in {"host-b", "host-c"}
    ledger.keep(ledger.primary)
    asked = [line for line in ledger.told("members") if line["on"] == ledger.primary]
    assert asked[0]["members"] == [["host-a", dead.incarnation]]
    assert asked[0]["primary"] == dead.incarnation


def test_replaced_watchdog_remembers_when_the_process_asks(cluster: LocalCluster, ledger: Ledger) -> None:
    """Its successor is called as before."""
    ledger.start()
    ledger.keep("host-a", "host-c")
    asked, before = len(ledger.told("members")), cluster.view.hosts["host-a"].host.pid
    os.kill(before, signal.SIGKILL)
    cluster.wait_until(lambda view: view.hosts["host-a"].host.pid != before, "the next WatchDog", PATIENCE_S)
    ledger.wait_told("members", lambda lines: len(lines) > asked)
    managers = _managers(cluster)
    for pid in managers:
        kill(pid, signal.SIGSTOP)
    try:
        kill(ledger.pid("host-a"))
        ledger.wait_told("role", lambda lines: any(x["on"] == "host-c" and x["role"] == "primary" for x in lines))
    finally:
        for pid in managers:
            kill(pid, signal.SIGCONT)


def test_removal_leaves_no_record(cluster: LocalCluster, ledger: Ledger) -> None:
    """Nothing of it is in etcd."""
    ledger.start()
    cluster.remove(ledger.name)
    observer = cluster._observer
    assert observer is not None
    assert observer.call(lambda store: store.get(Key(Kind.IN_SYNC, (ledger.name,))), PATIENCE_S) is None


# --- who serves where ------------------------------------------------------------------------------------------------


def test_copies_are_told_of_each_other(ledger: Ledger) -> None:
    """Each learns where the others serve, who leads, and who is gone."""
    ledger.start()
    ledger.keep("host-a", "host-b")

    def all_know(lines: list[dict[str, Any]]) -> bool:
        newest = {line["on"]: line["replicas"] for line in lines}
        return len(newest) == 3 and all(len(rows) == 3 and all(row[4] for row in rows) for rows in newest.values())

    rows = ledger.wait_told("replicas", all_know)[-1]["replicas"]
    assert [row[:4] for row in rows if row[2] == "primary"] == [
        ["host-a", ledger.assignment.primary and ledger.assignment.primary.incarnation, "primary", ledger.assignment.epoch]
    ]
    kill(ledger.pid("host-a"))
    epoch = ledger.assignment.epoch
    ledger.wait_told("replicas", lambda lines: any(["primary", epoch + 1] in [x[2:4] for x in e["replicas"]] for e in lines))


def test_client_is_told_of_every_change(ledger: Ledger, client: Callable[[object], Client]) -> None:
    """It may ask before there is such an object, and hears of it when it comes, moves and goes."""
    early = client(ledger.name)
    assert early.next() == {"type": "replicas", "replicas": []}
    ledger.start()
    ledger.keep("host-a", "host-b")
    while [row[2] for row in (early.next() or pytest.fail("it was hung up on"))["replicas"] if row[4]] != [
        "primary",
        "backup",
        "backup",
    ]:
        pass
    late = client(ledger.name)
    first = late.next()
    assert first is not None
    assert [(row[0], row[2]) for row in first["replicas"]] == [
        ("host-a", "primary"),
        ("host-b", "backup"),
        ("host-c", "backup"),
    ]
    kill(ledger.pid("host-a"))
    for each in (early, late):
        while ("host-b", "primary") not in [(row[0], row[2]) for row in (each.next() or pytest.fail("gone"))["replicas"]]:
            pass
    late.send("leaving")
    while late.next() is not None:
        pass
    ledger.cluster.remove(ledger.name)
    while (early.next() or pytest.fail("gone"))["replicas"]:
        pass


@pytest.mark.parametrize("app", ["", "a/b", 7, None])
def test_client_of_what_is_no_name_is_refused(client: Callable[[object], Client], app: object) -> None:
    """It must not lead the WatchDog out of its prefix."""
    refused = client(app)
    answer = refused.next()
    assert answer is not None
    assert answer["type"] == "error"
    assert refused.next() is None


@pytest.mark.parametrize("kind", ["running", "members", "change", "serves", "nonsense"])
def test_client_may_say_nothing_but_that_it_leaves(client: Callable[[object], Client], kind: str) -> None:
    """It has no part in the object."""
    intruder = client("nobody")
    intruder.send(kind, at=1.0, question=1, revision=0, members=[], endpoint="x:1")
    answers = [intruder.next(), intruder.next()]
    said = next(answer for answer in answers if answer is not None and answer["type"] == "error")
    assert "not the protocol" in said["message"]


def _managers(cluster: LocalCluster) -> list[int]:
    processes = [host.process.pid for host in cluster.hosts.values() if host.process is not None]
    found = [pid for process in processes for pid in descendants(process)]
    return [pid for pid in found if b"manager" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
