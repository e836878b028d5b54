"""What the tests of the command line and of bad input share: running commands, looking into etcd, tracking processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.guardian.tree import exiting_status
from etcdreplica.store import EtcdOptions, Kind, Store
from etcdreplica.testing import LocalCluster
from etcdreplica.testing.etcd import EtcdServer
from etcdreplica.testing.processes import descendants, kill_tree, spawn_bound

T = TypeVar("T")

APPS = Path(__file__).parent
STEADY = APPS / "steady.py"
MARK = "CLI_TEST_MARK"  # an environment variable that every descendant of a marked command inherits
PATIENCE_S = 60.0
POLL_S = 0.02


def unique(prefix: str) -> str:
    """Return a name that no other test uses."""
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without settings of etcdreplica."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("ETCDREPLICA_")}, **(extra or {})}


def command(*arguments: str) -> list[str]:
    """Return the command line of `etcdreplica ARGUMENTS`."""
    return [sys.executable, "-m", "etcdreplica", *arguments]


def cli(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run `etcdreplica ARGUMENTS` to its end."""
    return subprocess.run(
        command(*arguments),
        env=clean_environment(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def read(cluster: LocalCluster, *arguments: str) -> str:
    """Run a reading command on a cluster, which must succeed, and return what it prints."""
    done = cli(arguments[0], *cluster.connection, *arguments[1:])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def read_json(cluster: LocalCluster, *arguments: str) -> Any:
    """Do so with `-o json` and parse it."""
    return json.loads(read(cluster, *arguments, "-o", "json"))


def program(cluster: LocalCluster, host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program by hand on a host, to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=cluster.hosts[host].environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def the_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Check that a command failed in the agreed way, and return its error line."""
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def eventually(condition: Callable[[], object], what: str, timeout: float = PATIENCE_S) -> None:
    """Wait until a condition holds that nothing announces."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} s in vain for {what}"
        time.sleep(POLL_S)


# --- processes ---------------------------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    """Whether a process may still run code of its own; the kernel may be busy with its end for longer."""
    return exiting_status(pid) is None and Path(f"/proc/{pid}/stat").exists()


def still_running(pids: Iterable[int]) -> list[int]:
    """Return those that are."""
    return [pid for pid in pids if is_running(pid)]


def marked(mark: str) -> list[int]:
    """Return every running process whose environment carries the mark, wherever it now hangs in the tree."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0") and is_running(int(entry.name)):
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def background(
    arguments: list[str], log: Path, *, env: Mapping[str, str] | None = None, mark: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while the block lasts, and end it then with all its descendants. Its output goes to `log`."""
    extra = {**(env or {}), **({MARK: mark} if mark else {})}
    process = spawn_bound(arguments, log=log, env=clean_environment(extra))
    try:
        yield process
    finally:
        if process.poll() is None:  # else its number may be somebody else's by now
            kill_tree(process.pid)
            process.wait()
        for pid in marked(mark) if mark else ():
            kill_tree(pid)


def has_child(pid: int, word: str) -> bool:
    """Whether a descendant's command line contains a word."""
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if word.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                return True
    return False


def pids(cluster: LocalCluster, app: str) -> dict[str, int]:
    """Return the process of each replica by host."""
    return {host: replica.pid for host, replica in list(cluster.view.apps[app].replicas.items()) if replica.pid}


def standing(cluster: LocalCluster, app: str) -> tuple[int, str, int, dict[str, int]]:
    """Return what must stay as it is when an application is not disturbed: epoch, primary's host and pid, all pids."""
    assignment = cluster.view.apps[app].assignment
    assert assignment is not None
    return (assignment.epoch, *cluster.primary(app), pids(cluster, app))


def start_steady(cluster: LocalCluster, name: str, *arguments: str, host: str = "host-a") -> subprocess.Popen[bytes]:
    """Start the steady application by hand and wait until it is whole."""
    process = cluster.start(STEADY, "--name", name, *arguments, host=host)
    cluster.wait_ready(name)
    return process


def fails_over(cluster: LocalCluster, app: str) -> None:
    """Kill the primary of an application and wait until it is whole again."""
    epoch = cluster.wait_ready(app)
    cluster.kill_replica(app)
    cluster.wait_ready(app, after_epoch=epoch)


def forget(cluster: LocalCluster, *apps: str) -> None:
    """Remove applications that a test is done with."""
    for app in apps:
        cluster.remove(app)


# --- etcd --------------------------------------------------------------------------------------------------------------


def in_store(etcd: EtcdServer, cluster: str, work: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    """Run `work` with a store of a cluster."""

    async def run() -> T:
        async with Store(EtcdOptions((etcd.endpoint,), timeout_s=PATIENCE_S), cluster) as store:
            return await work(store)

    return asyncio.run(run())


def raw_keys(cluster: LocalCluster) -> dict[str, bytes]:
    """Return every key of a cluster, without its prefix, and its bytes."""

    async def work(store: Store) -> dict[str, bytes]:
        prefix = store.keys.prefix()
        answer = await store.channel.call("KV.Range", rpc.RangeRequest(key=prefix, range_end=prefix[:-1] + b"0"))
        return {kv.key.decode().removeprefix(prefix.decode()): kv.value for kv in answer.kvs}

    return in_store(cluster.etcd, cluster.cluster, work)


def keys_of(cluster: LocalCluster, app: str) -> list[str]:
    """Return every key that is about an application."""
    return [key for key in raw_keys(cluster) if app in key.split("/")]


def put_raw(cluster: LocalCluster, key: str, value: bytes) -> None:
    """Write any bytes under a key of a cluster."""

    async def work(store: Store) -> None:
        await store.channel.call("KV.Put", rpc.PutRequest(key=store.keys.prefix() + key.encode(), value=value))

    in_store(cluster.etcd, cluster.cluster, work)


def delete_raw(cluster: LocalCluster, key: str) -> None:
    """Delete a key of a cluster."""

    async def work(store: Store) -> None:
        await store.channel.call("KV.DeleteRange", rpc.DeleteRangeRequest(key=store.keys.prefix() + key.encode()))

    in_store(cluster.etcd, cluster.cluster, work)


def leading_process(cluster: LocalCluster) -> tuple[str, int]:
    """Return host and process of the elected ReplicaManager."""

    async def work(store: Store) -> tuple[str, int]:
        entries = (await store.list(Kind.LEADERS, "manager")).entries
        oldest = min(entries, key=lambda entry: entry.create_revision)
        return oldest.value.host, oldest.value.pid

    return in_store(cluster.etcd, cluster.cluster, work)
