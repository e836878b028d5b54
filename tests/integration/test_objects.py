"""Replicated objects on real hosts: processes are killed, stopped and hang, and clients only see the right answers.

`OBJECT_KILLS=200` kills the primary so many times while updates are under way.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdreplica import connect
from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.errors import OutcomeUnknownError, UnavailableError
from etcdreplica.model import FailureKind
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.bench_object import Counters, gaps
from tests.integration.conftest import kill

pytestmark = pytest.mark.integration
PROGRAM = Path(__file__).parent / "apps" / "notebook.py"
KILLS = int(os.environ.get("OBJECT_KILLS", "6"))
PATIENCE_S = 60.0
_numbers = itertools.count()


class Notebook:
    """The object of `apps/notebook.py` under one name."""

    def __init__(self, cluster: LocalCluster, *arguments: str) -> None:
        self.cluster, self.name = cluster, f"notebook-{next(_numbers)}"
        cluster.start(PROGRAM, "--name", self.name, *arguments, host="host-a")

    def connect(self) -> Any:
        """Return a proxy."""
        return connect(self.name, timeout=PATIENCE_S)

    def wait_in_sync(self, count: int) -> None:
        """Wait until so many living copies are in sync, by the word of the present primary."""
        self.cluster.wait_until(lambda _: self.cluster.in_sync(self.name) == count, f"{count} copies in sync", PATIENCE_S)

    def add(self, proxy: Any, line: str, copies: int) -> int:
        """Add a line as soon as so many copies are in sync: on a busy machine one may be too slow for a while."""
        while True:
            self.wait_in_sync(copies)
            try:
                count: int = proxy.add(line)
            except UnavailableError as error:
                if isinstance(error, OutcomeUnknownError):
                    raise
            else:
                return count

    def backup(self) -> int:
        """Return the process of a backup."""
        app = self.cluster.view.apps[self.name]
        assert app.assignment is not None
        found = app.replica(app.assignment.backups[0])
        assert found is not None
        assert found.pid is not None
        return found.pid


@pytest.fixture(scope="module")
def hosts(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts; our own clients ask the second one."""
    with LocalCluster(3, etcd=etcd_server, cluster="objects", lease_ttl_s=5.0) as cluster:
        before = os.environ.get(SOCKET_ENV)
        os.environ[SOCKET_ENV] = str(cluster.hosts["host-b"].socket_path)
        yield cluster
        if before is None:
            del os.environ[SOCKET_ENV]
        else:
            os.environ[SOCKET_ENV] = before


@pytest.fixture
def make(hosts: LocalCluster) -> Iterator[Callable[..., Notebook]]:
    """Make an object of one test."""
    made: list[Notebook] = []

    def start(*arguments: str) -> Notebook:
        made.append(Notebook(hosts, *arguments))
        return made[-1]

    yield start
    for notebook in made:
        hosts.remove(notebook.name)


def test_kills_while_updates_are_under_way(hosts: LocalCluster) -> None:
    """Each worker's next answer is one more than its last: nothing acknowledged is lost, nothing applied twice."""
    counters = Counters(hosts, f"counter-{next(_numbers)}")
    try:
        found, wrong, done = asyncio.run(gaps(counters, KILLS))
    finally:
        hosts.remove(counters.name)
    assert len(found) == KILLS
    assert done > KILLS
    assert wrong == 0


def test_backup_that_is_stopped(make: Callable[..., Notebook]) -> None:
    """Updates stall until it is taken out of the set; it comes back with everything."""
    notebook = make("--hang-timeout", "60")
    notebook.wait_in_sync(3)
    with notebook.connect() as proxy:
        pid = notebook.backup()
        kill(pid, signal.SIGSTOP)
        try:
            assert proxy.add("one") == 1
            notebook.wait_in_sync(2)
            assert proxy.add("two") == 2
        finally:
            kill(pid, signal.SIGCONT)
        notebook.wait_in_sync(3)
        assert proxy.read() == ["one", "two"]


def test_killed_backup_and_killed_primary(make: Callable[..., Notebook]) -> None:
    """Each is replaced by a copy that has all there is."""
    notebook = make()
    notebook.wait_in_sync(3)
    with notebook.connect() as proxy:
        lines = [proxy.stamp()]
        kill(notebook.backup())
        lines.append(proxy.stamp())
        notebook.wait_in_sync(3)
        notebook.cluster.kill_replica(notebook.name)
        lines.append(proxy.stamp())
        notebook.wait_in_sync(3)
        notebook.cluster.kill_replica(notebook.name)
        assert proxy.read() == lines


def test_fewer_than_min_in_sync(make: Callable[..., Notebook]) -> None:
    """Updates are refused; one that was accepted just before is acknowledged only when there are enough copies again."""
    notebook = make("--degree", "2", "--min-in-sync", "2", "--hang-timeout", "60")
    with notebook.connect() as proxy, connect(notebook.name, timeout=2.0) as hasty:
        assert notebook.add(proxy, "one", 2) == 1
        pid = notebook.backup()
        kill(pid, signal.SIGSTOP)
        try:
            notebook.wait_in_sync(1)
            reason = ""
            while "has not happened: fewer copies are in sync" not in reason:  # until the primary knows what etcd does
                with pytest.raises(UnavailableError) as caught:
                    hasty.add("perhaps")
                reason = str(caught.value)
        finally:
            kill(pid, signal.SIGCONT)
        notebook.add(proxy, "two", 2)
        assert [line for line in proxy.read() if line != "perhaps"] == ["one", "two"]


def test_durable_object_whose_copies_all_end_at_once(make: Callable[..., Notebook]) -> None:
    """What was acknowledged is read from the disks."""
    notebook = make("--durable")
    notebook.wait_in_sync(3)
    with notebook.connect() as proxy:
        for number in range(20):
            assert proxy.add(f"line {number}") == number + 1
        replicas = notebook.cluster.view.apps[notebook.name].replicas
        pids = [replica.pid for replica in replicas.values() if replica.pid is not None]
        assert len(pids) == 3
        for pid in pids:
            kill(pid, signal.SIGSTOP)  # so that none of them takes over from another
        for pid in pids:
            kill(pid)
        assert proxy.read() == [f"line {number}" for number in range(20)]
        assert proxy.add("line 20") == 21
        notebook.wait_in_sync(3)


def test_copy_that_diverges_is_reported_and_replaced(make: Callable[..., Notebook]) -> None:
    """The history says why; the new copy has the primary's state."""
    notebook = make("--degree", "2")
    notebook.wait_in_sync(2)
    with notebook.connect() as proxy:
        proxy.guess()

        def reasons(_: object) -> bool:
            events = [event for (name, _), event in notebook.cluster.events.items() if name == notebook.name]
            return any("its state differs from the primary's" in event.failure.reason for event in events)

        notebook.cluster.wait_until(reasons, "the copy that diverged in the history", PATIENCE_S)
        notebook.wait_in_sync(2)
        line = proxy.read()
        notebook.cluster.kill_replica(notebook.name)
        assert proxy.read() == line


def test_update_that_never_returns_is_a_hang(make: Callable[..., Notebook]) -> None:
    """The primary is killed for it, and the next one applies it."""
    notebook = make("--degree", "2", "--hang-timeout", "1")
    notebook.wait_in_sync(2)
    with notebook.connect() as proxy:
        pid = proxy.pid()
        proxy.sleep(pid)
        assert proxy.pid() != pid

        def kinds() -> set[FailureKind]:
            return {event.failure.kind for (name, _), event in notebook.cluster.events.items() if name == notebook.name}

        notebook.cluster.wait_until(lambda _: FailureKind.HANG in kinds(), "the hang in the history")


@pytest.mark.parametrize("style", ["warm", "cold"])
def test_same_class_under_other_styles(make: Callable[..., Notebook], style: str) -> None:
    """Its snapshot is the checkpoint: a handover loses nothing."""
    notebook = make("--style", style, "--degree", "2")
    epoch = notebook.cluster.wait_ready(notebook.name)
    with notebook.connect() as proxy:
        assert proxy.add("one") == 1
        kill(proxy.pid(), signal.SIGTERM)
        notebook.cluster.wait_ready(notebook.name, after_epoch=epoch)
        assert proxy.add("two") == 2
        assert proxy.read() == ["one", "two"]


def test_stale_queries_and_threads(make: Callable[..., Notebook]) -> None:
    """Any copy answers a stale query, with all that was acknowledged that long ago; proxies serve many threads."""
    notebook = make()
    notebook.wait_in_sync(3)
    with notebook.connect() as proxy:
        threads = [threading.Thread(target=proxy.add, args=(f"{number}",)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        futures = [proxy.add.submit("more") for _ in range(50)]
        assert sorted(future.result() for future in futures) == list(range(21, 71))
        assert len(proxy.read.stale(5.0)()) <= 70
        deadline = time.monotonic() + PATIENCE_S
        while proxy.pid.stale(5.0)() == proxy.pid():  # until our client has found the backups
            assert time.monotonic() < deadline


def test_object_that_does_not_exist(hosts: LocalCluster) -> None:
    """It says so after the timeout, and why."""
    with pytest.raises(UnavailableError, match=r"no copy was found within 0\.5 s: nobody has no copy that answers"):
        connect("nobody", timeout=0.5)


def test_without_any_copy_outcomes_are_unknown(make: Callable[..., Notebook]) -> None:
    """An update that was sent and not answered may have happened."""
    notebook = make("--degree", "1", "--hang-timeout", "60")
    notebook.wait_in_sync(1)
    with connect(notebook.name, timeout=1.0) as proxy:
        pid = proxy.pid()
        kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(OutcomeUnknownError, match="it may have happened, but not twice"):
                proxy.add("perhaps")
        finally:
            kill(pid, signal.SIGCONT)
        assert proxy.add("certainly") in (1, 2)
