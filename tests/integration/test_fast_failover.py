"""failover="fast": a lost host is taken over while its lease still lives; what is merely slow, or safe, is left alone.

The leases here last long, so that nothing can come of them in time. Nothing is asserted about speed.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.core.suspicion import SuspicionSettings
from etcdreplica.daemon.peers import Answer, PeerClient, PeerServer
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.errors import ConfigurationError
from etcdreplica.model import Event, FailureKind
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.processes import descendants
from tests.integration.conftest import Worker, kill

pytestmark = pytest.mark.integration
MakeWorker = Callable[..., Worker]
STOPPER = Path(__file__).parent / "apps" / "stopper.py"
LONG_TTL_S = 15.0  # every test asserts that the lease lived; their tidying up has to wait for it
_numbers = itertools.count()


@pytest.fixture
def lasting(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts with long leases; only host-a and host-c have managers."""
    arguments = {"host-b": ["--no-manager"]}
    with LocalCluster(
        3, etcd=etcd_server, cluster=f"fast-{next(_numbers)}", lease_ttl_s=LONG_TTL_S, node_arguments=arguments
    ) as cluster:
        yield cluster


def freeze(cluster: LocalCluster, host: str, number: signal.Signals) -> None:
    """Send a signal to everything on a host."""
    node = cluster.hosts[host].process
    assert node is not None
    for pid in (node.pid, *descendants(node.pid)):
        kill(pid, number)


def wait_event(cluster: LocalCluster, app: str, host: str) -> Event:
    """Wait until the loss of a host stands in the history; its key must still be there, and of the same stay."""
    session = cluster.view.hosts[host].session

    def find() -> Event | None:
        events = (event for (name, _), event in list(cluster.events.items()) if name == app)
        return next((event for event in events if event.failure.host == host), None)

    cluster.wait_until(lambda _: find() is not None, f"the loss of {host} in the history of {app}")
    assert cluster.view.hosts[host].session == session
    found = find()
    assert found is not None
    return found


def check_evidence(event: Event, host: str) -> None:
    """The failure says that the host was lost, by whose probes, and that its lease lived."""
    assert event.failure.kind is FailureKind.HOST
    assert event.failure.host == host != event.primary
    assert event.failure.reason.startswith(f"host {host} is lost: it answered none of")
    assert f"probes of {event.failure.by}" in event.failure.reason
    assert event.failure.reason.endswith("while its lease still lived")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_lost_host_before_its_lease_ends(lasting: LocalCluster, make_worker: MakeWorker, number: signal.Signals) -> None:
    """A fast application fails over; a safe one on the same host is left there until the lease ends."""
    quick, calm = make_worker(lasting, "--failover", "fast"), make_worker(lasting)
    for worker in (quick, calm):
        worker.start("host-b")
    epoch, calm_epoch = (lasting.wait_ready(worker.name) for worker in (quick, calm))
    assert quick.hosts()[0] == calm.hosts()[0] == "host-b"
    freeze(lasting, "host-b", number)
    try:
        check_evidence(wait_event(lasting, quick.name, "host-b"), "host-b")
        lasting.wait_ready(quick.name, after_epoch=epoch)
        assert sorted(quick.hosts()) == ["host-a", "host-c"]
        assert calm.hosts()[0] == "host-b"
        assignment = lasting.view.apps[calm.name].assignment
        assert assignment is not None
        assert assignment.epoch == calm_epoch
        assert not [name for name, _ in lasting.events if name == calm.name]
    finally:
        if number is signal.SIGSTOP:
            freeze(lasting, "host-b", signal.SIGCONT)
    if number is signal.SIGSTOP:
        lasting.wait_until(lambda view: "host-b" not in view.apps[quick.name].replicas, "the old copy to end by itself")


def test_host_of_the_leading_manager(etcd_server: EmbeddedEtcd, make_worker: MakeWorker) -> None:
    """The manager next in line takes the place of the leader, whose lease still lives, and reports the loss."""
    with LocalCluster(3, etcd=etcd_server, cluster="leader", lease_ttl_s=LONG_TTL_S) as cluster:
        leader = cluster.leaders["manager"]
        worker = make_worker(cluster, "--failover", "fast")
        worker.start(leader)
        epoch = cluster.wait_ready(worker.name)
        assert worker.hosts()[0] == leader
        cluster.hosts[leader].kill()
        event = wait_event(cluster, worker.name, leader)
        check_evidence(event, leader)
        assert event.failure.by != leader
        cluster.wait_ready(worker.name, after_epoch=epoch)
        cluster.restart(leader)


def losses(cluster: LocalCluster, app: str) -> int:
    """Return how often a host was found lost under an application."""
    return sum(event.failure.kind is FailureKind.HOST for (name, _), event in cluster.events.items() if name == app)


def test_short_stop_is_no_loss(lasting: LocalCluster, make_worker: MakeWorker) -> None:
    """A host that is stopped for less than the detector's patience and answers again is not lost."""
    worker = make_worker(lasting, "--failover", "fast", "--degree", "3")
    worker.start("host-b")
    lasting.wait_ready(worker.name)
    patience_s = SuspicionSettings().confirm_s
    silences = short_stops(lasting, "host-b", patience_s / 2)
    overrun = sum(silence >= patience_s for silence in silences)  # a busy machine may stop us too: such a host may be lost
    if overrun == len(silences):
        pytest.skip(f"this machine cannot stop a host for {patience_s / 2:g} s: it took at least {min(silences):g} s")
    epoch = lasting.wait_ready(worker.name)
    before = losses(lasting, worker.name)
    assert before <= overrun
    lasting.kill_replica(worker.name)  # what comes of this tells that nothing more came of that
    lasting.wait_ready(worker.name, after_epoch=epoch)
    assert losses(lasting, worker.name) == before


def short_stops(cluster: LocalCluster, host: str, seconds: float) -> list[float]:
    """Stop everything on a host for a short time, again and again; return how long it was silent each time."""
    node = cluster.hosts[host].process
    assert node is not None
    command = [sys.executable, str(STOPPER), cluster.view.hosts[host].host.peer, str(seconds), "10", "40"]
    pids = map(str, (node.pid, *descendants(node.pid)))
    done = subprocess.run([*command, *pids], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [float(each) for each in json.loads(done.stdout)]


# --- the service -----------------------------------------------------------------------------------------------------


def node(host: str, directory: Path, listen: str = "127.0.0.1:0") -> NodeSettings:
    """Return settings of a host."""
    return NodeSettings(host=host, state_dir=directory, peer_listen=listen)


async def test_ping_and_ping_via(tmp_path: Path) -> None:
    """Each server says who it is and which stay it is, directly and through another one."""
    session = 0
    near, far = (
        PeerServer(node("near", tmp_path), lambda: 5, lambda app, epoch: False),
        PeerServer(node("far", tmp_path), lambda: session, lambda app, epoch: False),
    )
    client = PeerClient()
    try:
        await near.start()
        await far.start()
        assert await client.ping(far.address, 5.0) == Answer("far", 0)
        session = 9
        assert await client.ping_via(near.address, far.address, 5.0, 10.0) == (True, Answer("far", 9))
        address = far.address
        await far.stop()
        assert await client.ping(address, 0.2) is None
        assert await client.ping_via(near.address, address, 0.2, 10.0) == (True, None)
        assert await client.ping_via(address, near.address, 0.2, 0.2) == (False, None)
    finally:
        await client.close()
        await near.stop()
        await far.stop()


async def test_server_that_comes_back_is_reached(tmp_path: Path) -> None:
    """A connection that was forgotten, or broken, is made anew."""
    client, first = PeerClient(), PeerServer(node("a", tmp_path), lambda: 1, lambda app, epoch: False)
    await first.start()
    address = first.address
    try:
        assert await client.ping(address, 5.0) == Answer("a", 1)
        await first.stop()
        assert await client.ping(address, 0.1) is None
        client.forget(address)
        second = PeerServer(node("a", tmp_path, address), lambda: 2, lambda app, epoch: False)
        await second.start()
        try:
            assert await client.ping(address, 10.0) == Answer("a", 2)
        finally:
            await second.stop()
    finally:
        await client.close()
        await first.stop()


async def test_address_that_is_taken(tmp_path: Path) -> None:
    """Two daemons cannot answer at one address."""
    first = PeerServer(node("a", tmp_path), lambda: 1, lambda app, epoch: False)
    await first.start()
    second = PeerServer(node("b", tmp_path, first.address), lambda: 1, lambda app, epoch: False)
    try:
        with pytest.raises(ConfigurationError, match="cannot listen on the peer address"):
            await second.start()
    finally:
        await second.stop()
        await first.stop()
