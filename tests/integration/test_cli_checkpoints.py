"""`checkpoints list | inspect | export | verify`: what is stored, taken away, and found damaged; and what makes no sense."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from etcdreplica.checkpoint.admin import open_file
from etcdreplica.checkpoint.files import read as read_file
from etcdreplica.checkpoint.format import CHUNK
from etcdreplica.model import Stamp
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import (
    APPS,
    clean_environment,
    cli,
    command,
    delete_raw,
    forget,
    put_raw,
    read,
    read_json,
    the_error,
    unique,
)
from tests.integration.apps_cli.cli_keeper import (
    HOSTS,
    Keeper,
    answer,
    checkpoints,
    export_of,
    flip_a_byte,
    keeping,
    listed,
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
    """A running application with three checkpoints of different sizes, which no test changes."""
    with Keeper(cluster, tmp_path_factory.mktemp("shop")) as running:
        running.store(2, 2 * CHUNK + 5)
        running.store(3, 1005)
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


# --- list and inspect --------------------------------------------------------------------------------------------------


def test_list(shop: Keeper) -> None:
    """A line, or an object, for each application: its newest checkpoint, how large and old it is, and where."""
    checkpoint = shop.app.checkpoint
    assert checkpoint is not None
    shown = listed(shop)
    assert set(shown) == {"name", "epoch", "sequence", "size", "digest", "age_s", "holders", "damaged"}
    assert (shown["epoch"], shown["sequence"]) == (checkpoint.epoch, 3)
    assert (shown["size"], shown["digest"]) == (checkpoint.size, checkpoint.digest)
    assert shown["holders"] == sorted(seat.host for seat in shop.app.assignment.seats)  # type: ignore[union-attr]
    assert 0 <= shown["age_s"] < 300
    assert shown["damaged"] == {}
    heads, *rows = checkpoints(shop.cluster, "list").stdout.splitlines()
    assert heads.split() == ["NAME", "NEWEST", "SIZE", "AGE", "HOLDERS"]
    (row,) = [row for row in rows if row.startswith(shop.name)]
    assert row.split()[:4] == [shop.name, f"{checkpoint.epoch}.3", "1.0", "KiB"]
    assert row.endswith(", ".join(shown["holders"]))


def test_list_of_an_application_without_checkpoints(cluster: LocalCluster) -> None:
    """It is named, and nothing is said."""
    name = unique("bare")
    cluster.start(APPS / "steady.py", "--name", name)
    cluster.wait_ready(name)
    shown = next(shown for shown in answer(cluster, "list") if shown["name"] == name)
    assert (shown["epoch"], shown["sequence"], shown["age_s"], shown["holders"]) == (None, None, None, [])
    assert [name, "-", "-", "-", "-"] in [line.split() for line in checkpoints(cluster, "list").stdout.splitlines()]
    assert "no host that answers has a checkpoint" in the_error(checkpoints(cluster, "export", name, "-"), 1)
    assert "checkpoint: none" in read(cluster, "describe", name)
    forget(cluster, name)


def test_inspect(shop: Keeper) -> None:
    """Each host tells what it holds, the newest first; the hosts of the seats are holders."""
    shown = answer(shop.cluster, "inspect", shop.name)
    assert {key: shown[key] for key in listed(shop) if key != "age_s"} == {
        k: v for k, v in listed(shop).items() if k != "age_s"
    }
    assert [host["host"] for host in shown["hosts"]] == HOSTS
    for host in shown["hosts"]:
        assert set(host) == {"host", "holder", "lost", "damaged", "error", "checkpoints"}
        assert (host["lost"], host["damaged"], host["error"]) == (False, None, "")
        if host["holder"]:
            sequences = [held["sequence"] for held in host["checkpoints"]]
            assert sequences[0] == 3
            assert sequences == sorted(sequences, reverse=True)
            newest = host["checkpoints"][0]
            assert set(newest) == {"epoch", "sequence", "size", "codec", "age_s"}
            assert (newest["size"], newest["codec"]) == (shown["size"], "msgpack")
        else:
            assert host["checkpoints"] == []
    assert sorted(host["host"] for host in shown["hosts"] if host["holder"]) == shown["holders"]
    table = checkpoints(shop.cluster, "inspect", shop.name).stdout
    assert all(f"{host['host']}{'*' if host['holder'] else ' '} " in table for host in shown["hosts"])
    assert f"{shown['epoch']}.3 " in table


def test_inspect_names_hosts_that_do_not_answer(shop: Keeper) -> None:
    """One that nobody reaches is shown, with the reason."""
    put_raw(shop.cluster, "servers/host-x", b'{"address": "127.0.0.1:1", "pid": 1}')
    try:
        (gone,) = [host for host in answer(shop.cluster, "inspect", shop.name)["hosts"] if host["host"] == "host-x"]
        assert "unavailable" in gone["error"]
        assert gone["checkpoints"] == []
        assert "host-x does not answer: " in checkpoints(shop.cluster, "inspect", shop.name).stdout
        assert "host-x has not read all" in the_error(checkpoints(shop.cluster, "verify", shop.name), 1)
        assert checkpoints(shop.cluster, "export", shop.name, "-", "--json").returncode == 0
    finally:
        delete_raw(shop.cluster, "servers/host-x")


def test_describe_shows_the_newest_checkpoint(shop: Keeper) -> None:
    """In the table and in the JSON."""
    shown = read_json(shop.cluster, "describe", shop.name)
    assert shown["checkpoint"]["sequence"] == 3
    assert shown["checkpoint"]["holders"] == listed(shop)["holders"]
    assert shown["damaged"] == {}
    (line,) = [li for li in read(shop.cluster, "describe", shop.name).splitlines() if li.startswith("checkpoint:")]
    assert f"{shown['checkpoint']['epoch']}.3, 1.0 KiB, of 2" in line
    assert line.endswith(", ".join(shown["checkpoint"]["holders"]))


# --- export ------------------------------------------------------------------------------------------------------------


def test_export(shop: Keeper, exported: Path) -> None:
    """The file is what a holder stores, byte for byte, readable by its owner only; nothing else is left beside it."""
    holder = listed(shop)["holders"][0]
    assert exported.read_bytes() == stored_on(shop, holder)[-1].read_bytes()
    assert exported.stat().st_mode & 0o777 == 0o600
    assert list(exported.parent.iterdir()) == [exported]
    assert open_file(exported).manifest.stamp.sequence == 3


def test_export_to_standard_output(shop: Keeper, exported: Path) -> None:
    """The same bytes, and nothing between them."""
    done = subprocess.run(
        command("checkpoints", "export", *shop.cluster.connection, shop.name, "-"),
        env=clean_environment(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == exported.read_bytes()
    assert b"exported" in done.stderr


def test_export_of_the_state_alone(shop: Keeper, exported: Path, tmp_path: Path) -> None:
    """As the application has encoded it, or as JSON for people."""
    file = tmp_path / "state"
    assert checkpoints(shop.cluster, "export", "--payload", shop.name, str(file)).returncode == 0
    state = msgspec.msgpack.decode(file.read_bytes())
    assert state["count"] == 3
    done = checkpoints(shop.cluster, "export", "--json", shop.name, "-")
    assert json.loads(done.stdout) == {"count": 3, "padding": base64.b64encode(state["padding"]).decode()}


def test_export_of_an_older_one(shop: Keeper, tmp_path: Path) -> None:
    """By its epoch and sequence, from any host that still has it."""
    file, shown = tmp_path / "older", listed(shop)
    done = checkpoints(shop.cluster, "export", "--epoch", str(shown["epoch"]), "--sequence", "2", shop.name, str(file))
    assert done.returncode == 0, done.stderr
    assert read_file(file).manifest.stamp == Stamp(shown["epoch"], 2)
    assert read_file(file).manifest.size > 2 * CHUNK
    done = checkpoints(shop.cluster, "export", "--epoch", "1", shop.name, "-")
    assert "checkpoint 1.*" in the_error(done, 1)
    assert done.stdout == ""
    assert "--epoch" in the_error(checkpoints(shop.cluster, "export", "--sequence", "2", shop.name, "-"), 2)


def test_export_overwrites_only_when_told_to(shop: Keeper, exported: Path) -> None:
    """What was there stays, until --force."""
    exported.write_text("precious")
    error = the_error(checkpoints(shop.cluster, "export", shop.name, str(exported)), 1)
    assert str(exported) in error
    assert "--force" in error
    assert exported.read_text() == "precious"
    assert checkpoints(shop.cluster, "export", "--force", shop.name, str(exported)).returncode == 0
    assert open_file(exported).manifest.app == shop.name


def test_export_to_where_nothing_can_be_written(shop: Keeper, tmp_path: Path) -> None:
    """The file is named."""
    nowhere = tmp_path / "nowhere" / "file"
    assert str(nowhere) in the_error(checkpoints(shop.cluster, "export", shop.name, str(nowhere)), 1)
    assert str(tmp_path) in the_error(checkpoints(shop.cluster, "export", "--force", shop.name, str(tmp_path)), 1)
    assert list(tmp_path.iterdir()) == []


# --- verify ------------------------------------------------------------------------------------------------------------


def test_verify(shop: Keeper) -> None:
    """Everything that any host holds is whole."""
    shown = answer(shop.cluster, "verify", shop.name)
    assert set(shown) == {"checkpoints", "silent"}
    assert shown["silent"] == {}
    found = shown["checkpoints"]
    assert {one["host"] for one in found} == set(listed(shop)["holders"])
    assert set(found[0]) == {"host", "name", "epoch", "sequence", "size", "codec", "age_s", "damage"}
    assert {one["damage"] for one in found} == {""}
    assert len(found) <= len(answer(shop.cluster, "verify")["checkpoints"])
    assert "whole" in checkpoints(shop.cluster, "verify", shop.name).stdout


def test_verify_finds_damage(keeper: Keeper) -> None:
    """It is told, put aside and shown everywhere, until a newer checkpoint has taken its place; export takes another host's."""
    cluster = keeper.cluster
    keeper.store(2, 3 * CHUNK)
    damaged, other = listed(keeper)["holders"]
    sequence = listed(keeper)["sequence"]
    flip_a_byte(stored_on(keeper, damaged)[-1])
    done = checkpoints(cluster, "export", keeper.name, "-", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["count"] == 2
    done = checkpoints(cluster, "verify", keeper.name, "-o", "json")
    assert "1 of " in the_error(done, 1)
    (found,) = [one for one in json.loads(done.stdout)["checkpoints"] if one["damage"]]
    assert (found["host"], found["sequence"], found["damage"]) == (damaged, sequence, "1 of 4 chunks are damaged")
    cluster.wait_until(lambda view: keeper.name in view.servers[damaged].damaged, "the damage to be announced")
    hosts = {host["host"]: host for host in answer(cluster, "inspect", keeper.name)["hosts"]}
    assert (hosts[damaged]["lost"], hosts[other]["lost"]) == (True, False)
    assert [held["sequence"] for held in hosts[damaged]["checkpoints"]] == [sequence - 1]
    assert "1 of 4 chunks are damaged" in hosts[damaged]["damaged"]
    table = checkpoints(cluster, "inspect", keeper.name).stdout
    assert f"{damaged} has lost something newer than it holds" in table
    assert list(listed(keeper)["damaged"]) == [damaged]
    for shown in (checkpoints(cluster, "list").stdout, read(cluster, "status"), read(cluster, "describe", keeper.name)):
        assert f"{keeper.name}: warning: {damaged} has found a checkpoint damaged, " in shown
        assert f".{sequence}: 1 of 4 chunks are damaged" in shown
    assert checkpoints(cluster, "verify", keeper.name).returncode == 0
    keeper.store(3)
    cluster.wait_until(lambda view: keeper.name not in view.servers[damaged].damaged, "the damage to be made good")
    assert listed(keeper)["damaged"] == {}


# --- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("inspect",), ("export",), ("import",), ("verify",)], ids=" ".join)
def test_an_unknown_application(shop: Keeper, exported: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Exit code 1 and the known names; no file is made."""
    files = {"export": [str(tmp_path / "new")], "import": [str(exported)]}.get(words[0], [])
    done = checkpoints(shop.cluster, *words, "nothing", *files)
    error = the_error(done, 1)
    assert "no application nothing " in error
    assert shop.name in error
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [exported]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("import", "shop", "/nowhere/file"), "/nowhere/file"),
        (("import", "shop", "/"), "directory"),
        (("export", "shop"), "FILE"),
        (("export", "shop", "-", "--epoch", "0"), "epoch"),
        (("inspect",), "NAME"),
        (("frobnicate",), "frobnicate"),
        (("verify", "shop", "--peer-ca", "ca.pem"), "--peer-cert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_command_line_exits_2(words: tuple[str, ...], named: str) -> None:
    """What is wrong is named."""
    assert named in the_error(cli("checkpoints", *words), 2)


def test_tls_that_the_hosts_do_not_speak(shop: Keeper, tmp_path: Path) -> None:
    """Files that cannot be read are named."""
    files = [f"--peer-{what}={tmp_path / what}" for what in ("ca", "cert", "key")]
    assert str(tmp_path / "ca") in the_error(checkpoints(shop.cluster, "inspect", shop.name, *files), 2)
