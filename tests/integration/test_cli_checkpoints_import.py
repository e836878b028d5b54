"""`checkpoints import`: what is brought in is what is restored next; and what is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from attrs import evolve

from etcdreplica.checkpoint.admin import GAP
from etcdreplica.checkpoint.files import read as read_file
from etcdreplica.checkpoint.format import CHUNK, prefix
from etcdreplica.errors import CheckpointError, StaleEpochError
from etcdreplica.model import AssignmentState, Stamp
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import delete_raw, the_error
from tests.integration.apps_cli.cli_keeper import (
    HOSTS,
    LARGE,
    Keeper,
    answer,
    checkpoints,
    export_of,
    flip_a_byte,
    keeping,
    listed,
    made,
    put,
    stored_on,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts."""
    with keeping(etcd_server) as running:
        yield running


@pytest.fixture(scope="module")
def shop(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """A running application whose newest checkpoint counts 3, which no test changes."""
    with Keeper(cluster, tmp_path_factory.mktemp("shop")) as running:
        running.store(3)
        yield running


@pytest.fixture
def keeper(cluster: LocalCluster, tmp_path: Path) -> Iterator[Keeper]:
    """One of the test's own."""
    with Keeper(cluster, tmp_path) as running:
        yield running


@pytest.fixture
def exported(shop: Keeper, tmp_path: Path) -> Path:
    """The newest checkpoint of the shop, as a file."""
    return export_of(shop, tmp_path / "exported")


def test_import_into_a_paused_application(keeper: Keeper, tmp_path: Path) -> None:
    """A large state is exported, replaced by others, and is what the next primary restores; then it goes on from there."""
    keeper.store(7, LARGE)
    file = export_of(keeper, tmp_path / "file")
    keeper.store(8)
    before = listed(keeper)
    keeper.stop()
    done = checkpoints(keeper.cluster, "import", keeper.name, str(file))
    assert (done.returncode, done.stderr) == (0, "")
    after = listed(keeper)
    assert f"as checkpoint {after['epoch']}.{after['sequence']}, and is on " in done.stdout
    assert (after["epoch"], after["sequence"]) == (before["epoch"], before["sequence"] + GAP)
    assert after["digest"] == read_file(file).manifest.digest
    assert len(after["holders"]) == 2
    restored = keeper.resume()
    assert (restored["what"], restored["count"], restored["padding"]) == ("restored", 7, LARGE)
    keeper.store(9)
    assert listed(keeper)["epoch"] > after["epoch"]


def test_import_into_a_parked_application(cluster: LocalCluster, tmp_path: Path, exported: Path) -> None:
    """It has failed too often; the last import before it is resumed counts. Another application's state needs --force."""
    with Keeper(cluster, tmp_path, "--max-restarts", "1") as keeper:
        first = export_of(keeper, tmp_path / "first")
        keeper.store(5)
        epoch = cluster.wait_ready(keeper.name)
        cluster.kill_replica(keeper.name)
        cluster.wait_ready(keeper.name, after_epoch=epoch)
        cluster.kill_replica(keeper.name)
        cluster.wait_until(lambda _: keeper.state is AssignmentState.FAILED, "it to be parked")
        error = the_error(checkpoints(cluster, "import", keeper.name, str(exported)), 1)
        assert "the file is a checkpoint of" in error
        assert "--force" in error
        done = checkpoints(cluster, "import", "--force", keeper.name, str(exported))
        assert done.returncode == 0, done.stderr
        assert "Warning: the file is a checkpoint of" in done.stderr
        assert checkpoints(cluster, "import", keeper.name, str(first)).returncode == 0
        assert keeper.resume()["count"] == 1


def test_import_into_a_completed_application(keeper: Keeper, exported: Path) -> None:
    """Whoever starts it again restores the state."""
    keeper.order(**{"return": True})
    keeper.cluster.wait_until(
        lambda _: keeper.state is AssignmentState.COMPLETED and not keeper.app.replicas, "its last copy to have ended"
    )
    done = checkpoints(keeper.cluster, "import", "--force", keeper.name, str(exported))
    assert done.returncode == 0, done.stderr
    keeper.start()
    keeper.wait_line("restored", 3)


def test_import_while_the_primary_runs(shop: Keeper, exported: Path) -> None:
    """It is refused, whatever is asked for, with what to do; and nothing has changed."""
    before = answer(shop.cluster, "inspect", shop.name)
    for force in ((), ("--force",)):
        error = the_error(checkpoints(shop.cluster, "import", *force, shop.name, str(exported)), 1)
        assert all(word in error for word in (shop.name, "etcdreplica pause", "etcdreplica resume"))
    after = answer(shop.cluster, "inspect", shop.name)
    assert [[(c["epoch"], c["sequence"]) for c in host["checkpoints"]] for host in after["hosts"]] == [
        [(c["epoch"], c["sequence"]) for c in host["checkpoints"]] for host in before["hosts"]
    ]


def test_import_counts_more_than_what_a_host_holds_that_does_not_answer(keeper: Keeper, tmp_path: Path) -> None:
    """A backup that has something newer, which nobody knew of, becomes primary: it restores the imported state nevertheless."""
    cluster, file = keeper.cluster, export_of(keeper, tmp_path / "file")
    keeper.stop()
    assert keeper.app.assignment is not None
    backup, stamp = keeper.app.assignment.backups[0].host, read_file(file).manifest.stamp
    put(cluster, backup, *made(keeper.name, evolve(stamp, sequence=99), msgspec.msgpack.encode({"count": 99, "padding": b""})))
    pid = cluster.view.servers[backup].pid
    delete_raw(cluster, f"servers/{backup}")  # so that nobody knows where it is, until its CheckpointServer is started anew
    try:
        done = checkpoints(cluster, "import", keeper.name, str(file))
        assert done.returncode == 0, done.stderr
    finally:
        os.kill(pid, signal.SIGKILL)
    cluster.wait_until(lambda view: backup in view.servers, "its CheckpointServer")
    assert backup not in listed(keeper)["holders"]
    restored = keeper.resume()
    assert (restored["host"], restored["count"]) == (backup, 1)


def test_import_to_fewer_hosts_than_wanted(cluster: LocalCluster, tmp_path: Path) -> None:
    """It goes on with a warning: what is there holds it."""
    with Keeper(cluster, tmp_path, "--degree", "3") as keeper:
        file = export_of(keeper, tmp_path / "file")
        keeper.stop()
        assert keeper.app.assignment is not None
        away = keeper.app.assignment.backups[0].host
        cluster.hosts[away].kill()
        cluster.wait_until(lambda view: away not in view.servers and away not in view.hosts, f"{away} to be gone")
        done = checkpoints(cluster, "import", keeper.name, str(file))
        assert done.returncode == 0, done.stderr
        assert "Warning: it is on 2 of 3 hosts" in done.stderr
        assert listed(keeper)["holders"] == sorted({*HOSTS} - {away})
        cluster.restart(away)
        assert keeper.resume()["count"] == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no checkpoint"),
        (b"this is just a text\n" * 500, "no checkpoint"),
        ("truncated", "bytes instead of"),
        ("cut off in its header", "header is damaged"),
        ("flipped", "1 of 1 chunks are damaged"),
    ],
    ids=["empty", "text", "truncated", "header", "flipped"],
)
def test_import_of_a_bad_file(shop: Keeper, exported: Path, content: bytes | str, told: str) -> None:
    """What is wrong with it is said, with its name."""
    if isinstance(content, bytes):
        exported.write_bytes(content)
    elif content == "flipped":
        flip_a_byte(exported)
    else:
        os.truncate(exported, 60 if "header" in content else exported.stat().st_size - 1)
    error = the_error(checkpoints(shop.cluster, "import", shop.name, str(exported)), 1)
    assert str(exported) in error
    assert told in error


def test_a_host_refuses_what_is_not_what_was_announced(keeper: Keeper) -> None:
    """Pieces that are damaged, out of order or missing, a bad manifest, an older stamp or epoch; and nothing is left of it."""
    cluster, name = keeper.cluster, keeper.name
    assert keeper.app.assignment is not None
    epoch = keeper.app.assignment.epoch
    host = keeper.app.assignment.seats[1].host
    manifest, data = made(name, Stamp(epoch, 50), os.urandom(5 * CHUNK + 1))
    before = stored_on(keeper, host)
    with pytest.raises(CheckpointError, match=r"chunk 3 of checkpoint .* came damaged"):
        put(cluster, host, manifest, data[: 3 * CHUNK] + bytes(CHUNK) + data[4 * CHUNK :])
    with pytest.raises(CheckpointError, match="chunk 2 came where chunk 0 belongs"):
        put(cluster, host, manifest, data, at=2)
    with pytest.raises(CheckpointError, match=r"2 chunks of checkpoint .* did not come"):
        put(cluster, host, manifest, data[: 4 * CHUNK])
    with pytest.raises(CheckpointError, match="came damaged"):
        put(cluster, host, manifest, data + b"more")
    with pytest.raises(CheckpointError, match="does not fit together"):
        put(cluster, host, evolve(manifest, size=1 << 50), data)
    with pytest.raises(CheckpointError, match="bad application name"):
        put(cluster, host, evolve(manifest, app="../x"), data)
    with pytest.raises(CheckpointError, match=f"holds {epoch}.1 already"):
        put(cluster, host, evolve(manifest, stamp=Stamp(epoch, 1)), data)
    with pytest.raises(StaleEpochError, match="is over"):
        put(cluster, host, manifest, data, epoch=epoch - 1)
    assert stored_on(keeper, host) == before
    assert not (before[0].parent / "draft").exists()
    put(cluster, host, manifest, data)
    assert stored_on(keeper, host)[-1].read_bytes() == prefix(manifest) + data
