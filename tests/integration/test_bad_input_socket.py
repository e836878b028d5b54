"""Garbage on the WatchDog's socket is refused or dropped, and harms nobody else."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from etcdreplica.app.protocol import VERSION, encode
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import fails_over, forget, keys_of, raw_keys, standing, start_steady, unique
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration

NOISE = random.Random(1998).randbytes(70_000)
PROGRAM = {"argv": ["/bin/true"], "cwd": "/"}


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Two hosts with one application on both."""
    with LocalCluster(2, etcd=etcd_server, cluster=unique("socket"), lease_ttl_s=LASTING_TTL_S) as running:
        start_steady(running, "load")
        yield running


@pytest.fixture(autouse=True)
def undisturbed(cluster: LocalCluster) -> Iterator[None]:
    """What runs goes on, nothing is registered, the WatchDog does not stumble, and still deals with registrations."""
    log = cluster.hosts["host-a"].log_path
    before, size = standing(cluster, "load"), log.stat().st_size
    registered = {key for key in raw_keys(cluster) if key.startswith("registrations/")}
    yield
    said = answer(cluster, encode("hello", version=VERSION, registration=registration(hosts=["host-x"])))
    assert said is not None
    assert "no such host is up: host-x" in said["message"]
    assert standing(cluster, "load") == before
    assert {key for key in raw_keys(cluster) if key.startswith("registrations/")} == registered
    assert b"Traceback" not in log.read_bytes()[size:]


def connect(cluster: LocalCluster) -> socket.socket:
    """Connect to the WatchDog of host-a as an application does."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(15.0)
    client.connect(str(cluster.hosts["host-a"].socket_path))
    return client


def frame(value: object) -> bytes:
    """Return a frame with any JSON in it."""
    body = json.dumps(value).encode()
    return struct.pack(">I", len(body)) + body


def framed(body: bytes) -> bytes:
    """Return a frame with any bytes in it."""
    return struct.pack(">I", len(body)) + body


def until_end(client: socket.socket) -> bytes:
    """Read until the WatchDog hangs up. Raises TimeoutError if it does not."""
    read = b""
    try:
        while data := client.recv(65536):
            read += data
    except ConnectionResetError:
        pass
    return read


def answer(cluster: LocalCluster, *parts: bytes) -> dict[str, Any] | None:
    """Send bytes and return what the WatchDog says before it hangs up."""
    with connect(cluster) as client:
        try:
            for part in parts:
                client.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        read = until_end(client)
    message: dict[str, Any] | None = json.loads(read[4:]) if read else None
    return message


def registration(**changes: object) -> dict[str, object]:
    """Return a registration that is right but for the changes."""
    return {"name": "garbage", "style": "warm", "degree": 1, "program": PROGRAM, **changes}


@pytest.mark.parametrize(
    "data",
    [
        NOISE,
        b"\xff" * 64,
        b"\x7f\xff\xff\xff",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        framed(NOISE),
        framed(b""),
        framed(b"[" * 100_000),
        framed(b'{"type":' * 50_000 + b"1" + b"}" * 50_000),
        framed(b"9" * 5000),
        framed(b"\xff\xfe\x00"),
        frame([]),
        frame("hello"),
        frame(None),
        frame({}),
        frame({"type": 1}),
        frame({"type": ["hello"]}),
        encode("nonsense"),
        encode("done"),
        encode("running", at=1.0),
        encode("hello"),
        encode("hello", version=VERSION + 1, registration=registration()),
        encode("hello", version=str(VERSION), registration=registration()),
        encode("hello", version=VERSION),
        encode("hello", version=VERSION, app="load"),
        encode("hello", version=VERSION, app=["load"], incarnation=1),
        encode("hello", version=VERSION, app={"a": 1}, incarnation={}),
    ],
    ids=[
        "noise", "ff", "huge length", "http", "framed noise", "empty frame", "deep array", "deep object", "long number",
        "no utf-8", "array", "string", "null", "no type", "type 1", "type array", "nonsense", "done", "running",
        "no version", "newer version", "version as text", "hello about nothing", "no incarnation", "app array", "app object",
    ],
)  # fmt: skip
def test_what_is_not_the_protocol(cluster: LocalCluster, data: bytes) -> None:
    """It is answered with an error, if at all, and the connection is closed."""
    said = answer(cluster, data)
    assert said is None or said["type"] == "error"


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        [],
        "text",
        None,
        {},
        registration(name="../../etc"),
        registration(name=5),
        registration(name=["x"]),
        registration(style="lukewarm"),
        registration(degree=0),
        registration(degree=True),
        registration(degree=10**30),
        registration(program=None),
        registration(program={"argv": "ls", "cwd": "/"}),
        registration(program={"argv": ["/bin/true"], "cwd": 5}),
        registration(hosts="host-a"),
        registration(hosts=["host-x"]),
        registration(hosts=["host-b"]),
        registration(stop_timeout_s=-1),
        registration(stop_timeout_s="long"),
        registration(overrides={"a/b": {}}),
        registration(overrides={"host-b": 5}),
        registration(keep="forever"),
        registration(labels={"zone": 5}),
    ],
    ids=lambda value: (
        json.dumps({k: v for k, v in value.items() if v != registration().get(k)})
        if isinstance(value, dict)
        else json.dumps(value)
    ),
)
@pytest.mark.parametrize("adopt", [True, False], ids=["adopt", "detach"])
def test_registrations_that_are_none(cluster: LocalCluster, wrong: object, adopt: bool) -> None:
    """Refused with a message, and nothing is registered."""
    said = answer(cluster, encode("hello", version=VERSION, adopt=adopt, registration=wrong))
    assert said is not None
    assert said["type"] == "error"


def test_a_replica_that_one_is_not(cluster: LocalCluster) -> None:
    """A process that the WatchDog did not start cannot take a replica's place, whatever number it names."""
    assignment = cluster.view.apps["load"].assignment
    assert assignment is not None
    assert assignment.primary is not None
    right = assignment.primary.incarnation
    for app, incarnation in (("load", right), ("load", right + 1), ("load", -1), ("load", "x"), ("nothing", right)):
        said = answer(cluster, encode("hello", version=VERSION, app=app, incarnation=incarnation))
        assert said is not None
        assert said["type"] == "error"
        assert app in said["message"]


def test_a_second_hello(cluster: LocalCluster) -> None:
    """One connection is one process: the second hello ends it, and the first one comes to nothing."""
    hello = encode("hello", version=VERSION, adopt=True, registration=registration(hosts=["host-a", "host-x"]))
    said = answer(cluster, hello, hello)
    assert said is not None
    assert said["type"] == "error"


def test_a_hello_and_garbage_behind_it(cluster: LocalCluster) -> None:
    """A client that misbehaves after a detached registration loses its connection, not the registration."""
    name = unique("behind")
    asked = registration(name=name, program={"argv": ["/bin/sleep", "1000"], "cwd": "/"})
    with connect(cluster) as client:
        client.sendall(encode("hello", version=VERSION, adopt=False, registration=asked))
        assert json.loads(client.recv(4096)[4:])["type"] == "ok"
        client.sendall(NOISE)
        until_end(client)
    cluster.wait_until(
        lambda view: name in view.apps and view.apps[name].assignment is not None,  # else one may come while it is removed
        "the registration, and that the manager has taken it",
    )
    forget(cluster, name)
    assert keys_of(cluster, name) == []


def test_bytes_one_by_one(cluster: LocalCluster) -> None:
    """A slow client is understood."""
    with connect(cluster) as client:
        for byte in encode("hello", version=VERSION, app="load", incarnation=1):
            client.sendall(bytes([byte]))
        assert json.loads(until_end(client)[4:])["type"] == "error"


def test_many_that_send_half_a_frame(cluster: LocalCluster) -> None:
    """A hundred of them, and as many that say nothing, keep nobody from registering; all are hung up on in the end."""
    half = encode("hello", version=VERSION, registration=registration())[:-20]
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(cluster)) for _ in range(200)]
        for client in clients[::2]:
            client.sendall(half)
        name = unique("meanwhile")
        start_steady(cluster, name)
        forget(cluster, name)
        for client in clients:
            said = json.loads(until_end(client)[4:])
            assert (said["type"], said["message"]) == ("error", "no hello in time")


def test_many_that_hang_up(cluster: LocalCluster) -> None:
    """Connections that end at once, or in the middle of a frame, leave nothing behind."""
    half = encode("hello", version=VERSION, registration=registration())[:-20]
    for data in [b"", half] * 100:
        with connect(cluster) as client:
            client.sendall(data)


def test_one_that_does_not_read(cluster: LocalCluster) -> None:
    """A client that asks and never reads the answer costs the WatchDog no more than its connection."""
    with ExitStack() as stack:
        for _ in range(50):
            client = stack.enter_context(connect(cluster))
            client.sendall(encode("hello", version=VERSION + 1) * 20)


def test_a_new_application_after_all_that(cluster: LocalCluster) -> None:
    """It registers, runs on both hosts and fails over."""
    name = unique("new")
    start_steady(cluster, name)
    fails_over(cluster, name)
    forget(cluster, name)
