"""`apply`, `diff` and `export`: on an etcd alone, since no host is needed to write down what should be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from etcdreplica.model import Registration
from etcdreplica.store import Kind, Store
from etcdreplica.testing import EmbeddedEtcd
from tests.integration.apps_cli.cli_harness import cli, in_store, the_error, unique

pytestmark = pytest.mark.integration

CACHE = """
[application.cache]
command = ["redis-server", "/etc/redis/redis.conf"]
probes = ["tcp:6379", {target = "exec:redis-cli ping", interval = 5.0}]
env = {TOKEN = "secret"}
"""
WORKER = """
[application.worker]
decorated = true
command = ["python3", "/srv/worker.py"]
style = "hot"
degree = 3
overrides.host-a.python = "/opt/python3"
"""


class Desk:
    """Where somebody writes files and runs commands on a cluster of their own."""

    def __init__(self, etcd: EmbeddedEtcd, directory: Path) -> None:
        self.etcd = etcd
        self.cluster = unique("files")
        self.directory = directory

    def write(self, **files: str) -> list[str]:
        """Write files, and return their paths."""
        for name, text in files.items():
            (self.directory / f"{name}.toml").write_text(text)
        return [str(self.directory / f"{name}.toml") for name in files]

    def run(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return cli(command, "--etcd", self.etcd.endpoint, "--cluster", self.cluster, *words)

    def registered(self) -> dict[str, tuple[Registration, int]]:
        """Return the registrations and their revisions."""

        async def read(store: Store) -> dict[str, tuple[Registration, int]]:
            entries = (await store.list(Kind.REGISTRATIONS)).entries
            return {entry.key.names[0]: (entry.value, entry.mod_revision) for entry in entries}

        return in_store(self.etcd, self.cluster, read)


@pytest.fixture
def desk(etcd_server: EmbeddedEtcd, tmp_path: Path) -> Desk:
    """One, with nothing registered."""
    return Desk(etcd_server, tmp_path)


def test_from_files_and_back(desk: Desk) -> None:
    """Shown, applied, applied again without a change, exported to no difference, changed, and compared."""
    files = desk.write(cache=CACHE, worker=WORKER)
    shown = desk.run("apply", "--dry-run", *files)
    assert (shown.returncode, desk.registered()) == (0, {})
    assert '+ command = [ "redis-server", "/etc/redis/redis.conf", ]' in shown.stdout.splitlines()
    assert "worker: would be created" in shown.stdout
    assert "secret" not in shown.stdout
    applied = desk.run("apply", *files)
    assert (applied.returncode, applied.stdout) == (0, "cache: created\nworker: created\n")
    assert applied.stderr == "warning: worker names the host host-a, which is not up\n"
    before = desk.registered()
    assert desk.run("apply", *files).stdout == "cache: unchanged\nworker: unchanged\n"
    exported = desk.run("export")
    (copy,) = desk.write(copy=exported.stdout)
    same = desk.run("diff", copy)
    assert (same.returncode, same.stdout) == (0, "")
    assert desk.run("apply", copy).stdout == "cache: unchanged\nworker: unchanged\n"
    assert desk.registered() == before
    (changed,) = desk.write(cache=CACHE.replace("secret", "other") + "degree = 3\n")
    differs = desk.run("diff", changed)
    assert differs.returncode == 1
    assert differs.stdout.splitlines() == [
        "  [application.cache]",
        "- degree = 2",
        "+ degree = 3",
        '- env.TOKEN = "(not shown)"',
        '+ env.TOKEN = "(not shown)"',
    ]
    told = json.loads(desk.run("apply", "-o", "json", changed).stdout)
    assert [(each["name"], each["change"], each["applied"]) for each in told] == [("cache", "changed", True)]
    assert told[0]["differences"][0] == {"key": "degree", "before": 2, "after": 3}
    after = desk.registered()
    assert after["cache"][0].degree == 3
    assert after["worker"] == before["worker"]
    exported_json = json.loads(desk.run("export", "cache", "-o", "json").stdout)
    assert exported_json["application"]["cache"]["env"] == {"TOKEN": "other"}


def test_one_bad_application_and_nothing_is_applied(desk: Desk) -> None:
    """Nor that of a good file beside it; the message names what to mend."""
    good, bad = desk.write(cache=CACHE, worker=WORKER.replace("degree = 3", "degre = 3"))
    error = the_error(desk.run("apply", good, bad), 2)
    assert error == f"Error: {bad}: application worker: unknown key 'degre': did you mean 'degree'?"
    assert desk.registered() == {}
    assert "did you mean 'degree'" in the_error(desk.run("diff", good, bad), 2)


def test_diff_without_etcd_is_trouble(desk: Desk) -> None:
    """Exit code 2, as that of Unix: 1 would say that something differs."""
    (file,) = desk.write(cache=CACHE)
    assert "127.0.0.1:1" in the_error(cli("diff", "--etcd", "127.0.0.1:1", file), 2)
    assert "no application" in the_error(desk.run("export", "cache"), 1)
    assert desk.run("export").stdout == ""
