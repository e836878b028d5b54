"""A real etcd with users, passwords and roles: calls and streams carry the token, and a new one when it is gone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.errors import StoreDeniedError
from etcdreplica.model import Leader
from etcdreplica.store import Election, EtcdOptions, Lineage, Put, Store
from etcdreplica.testing.etcd import EmbeddedEtcd
from tests.integration.store.store_harness import (
    Connect,
    Relay,
    changes,
    eventually,
    host,
    host_key,
    new_cluster,
    renewed,
    snapshot,
    until,
    write,
    write_hosts,
)

pytestmark = pytest.mark.integration

A, B = host_key("a"), host_key("b")
ROOT: dict[str, Any] = {"user": "root", "password": "root's own"}
APP: dict[str, Any] = {"user": "app", "password": "correct horse"}
READER = {"user": "reader", "password": "battery staple"}


async def set_up(endpoint: str) -> None:
    """Make the users and roles, and switch authentication on."""
    async with Store(EtcdOptions((endpoint,)), new_cluster()) as store:

        async def call(name: str, request: Any) -> None:
            await store.channel.call(f"Auth.{name}", request)

        await call("RoleAdd", rpc.AuthRoleAddRequest(name="root"))
        for role, right in (("app", rpc_right("READWRITE")), ("reader", rpc_right("READ"))):
            await call("RoleAdd", rpc.AuthRoleAddRequest(name=role))
            permission = {"permType": right, "key": b"/etcdreplica/", "range_end": b"/etcdreplica0"}
            await call("RoleGrantPermission", rpc.AuthRoleGrantPermissionRequest(name=role, perm=permission))
        for each in (ROOT, APP, READER):
            await call("UserAdd", rpc.AuthUserAddRequest(name=each["user"], password=each["password"]))
            await call("UserGrantRole", rpc.AuthUserGrantRoleRequest(user=each["user"], role=each["user"]))
        await call("AuthEnable", rpc.AuthEnableRequest())


def rpc_right(name: str) -> int:
    """Return the number of a right in etcd's protocol."""
    return {"READ": 0, "WRITE": 1, "READWRITE": 2}[name]


@pytest.fixture(scope="module")
def server(program: str) -> Iterator[EmbeddedEtcd]:
    """An etcd with authentication, whose tokens live for two seconds, and which logs when it forgets one."""
    arguments = ("--auth-token-ttl", "2", "--bcrypt-cost", "4", "--log-level", "debug")
    with EmbeddedEtcd(program, arguments=arguments) as running:
        asyncio.run(set_up(running.endpoint))
        yield running


@pytest.fixture(scope="module")
def jwt_server(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    """An etcd whose tokens are signed, and which knows from them which rights the user had when they were made."""
    key = tmp_path_factory.mktemp("jwt") / "key"
    key.write_bytes(b"a key for the tests, of enough bytes")
    arguments = ("--auth-token", f"jwt,priv-key={key},sign-method=HS256,ttl=10m", "--bcrypt-cost", "4")
    with EmbeddedEtcd(program, arguments=arguments) as running:
        asyncio.run(set_up(running.endpoint))
        yield running


async def tokens_gone(etcd: EmbeddedEtcd) -> None:
    """Wait until etcd has forgotten every token it has given, which it does two to three seconds after the last use of each."""

    def known() -> set[str]:
        text = etcd.log_path.read_text(errors="replace").rpartition("starting an etcd server")[2]
        given, gone = (
            set(re.findall(rf'"{what}".*"token":"([^"]+)"', text))
            for what in ("authenticated a user", "deleted a simple token")
        )
        assert given, "etcd tells of no token"
        return given - gone

    await until(lambda: not known(), "etcd forgets the tokens")


@pytest.mark.parametrize("who", [ROOT, APP], ids=["root", "app"])
async def test_the_right_password(connect: Connect, who: dict[str, str]) -> None:
    """With user and password calls, follows, leases and elections work."""
    store = connect(**who)
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        lease = await store.leases.grant(2)
        revision = await write(store, Put(A, host(1), lease.id))
        assert [entry.mod_revision for entry in await changes(batches, 1)] == [revision]
        entry = await store.get(A)
        assert entry is not None
        async with asyncio.timeout(20):
            await Election(store, "manager", Leader("a", 1)).campaign(lease)
        await renewed(lease, 2)
        await store.leases.revoke(lease)
        assert await store.get(A) is None


CALLS: dict[str, Callable[[Store], Awaitable[object]]] = {
    "get": lambda store: store.get(A),
    "list": lambda store: store.list(),
    "commit": lambda store: write(store, Put(A, host(1))),
    "follow": lambda store: anext(store.follow()),
    "grant": lambda store: store.leases.grant(5),
}
WRONG = {"wrong-password": {**APP, "password": "wrong"}, "unknown-user": {"user": "nobody", "password": "wrong"}, "no-user": {}}


@pytest.mark.parametrize(
    ("who", "what"),
    [(who, what) for who in WRONG for what in CALLS if (who, what) != ("no-user", "grant")],  # etcd grants leases to anybody
)
async def test_no_right_password(connect: Connect, who: str, what: str) -> None:
    """Without the right user and password every call and every follow raises StoreDeniedError, which does not tell it."""
    store = connect(**WRONG[who])
    with pytest.raises(StoreDeniedError) as caught:
        await asyncio.wait_for(CALLS[what](store), 5)
    assert store.channel.endpoint in str(caught.value)
    assert "wrong" not in str(caught.value)


async def test_a_user_without_the_right(connect: Connect) -> None:
    """A user who may only read reads and follows, and is denied a write."""
    writer, reader = connect(**APP), connect(**READER)
    await write(writer, Put(A, host(1)))
    assert await reader.get(A) is not None
    async with aclosing(reader.follow()) as batches:
        await snapshot(batches)
        with pytest.raises(StoreDeniedError, match="permission denied"):
            await write(reader, Put(B, host(2)))
        revision = await write(writer, Put(B, host(3)))
        assert [entry.mod_revision for entry in await changes(batches, 1)] == [revision]


async def test_calls_after_the_token_expired(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """When etcd has forgotten the token, reads, writes and grants get a new one by themselves."""
    reader, writer, keeper = (connect(**APP) for _ in range(3))
    lease = await keeper.leases.grant(6)
    await asyncio.gather(reader.get(A), writer.get(A))
    await tokens_gone(etcd)
    await write(writer, Put(A, host(1), lease.id))
    assert await reader.get(A) is not None
    await keeper.leases.revoke(lease)
    assert await reader.get(A) is None


async def test_many_calls_after_the_token_expired(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """Of many calls under way when the token turns out to be forgotten, every one gets through."""
    store = connect(**APP)
    await store.get(A)
    await tokens_gone(etcd)
    revisions = await asyncio.gather(*(write(store, Put(host_key(f"h{n}"), host(n))) for n in range(50)))
    assert len(set(revisions)) == 50


async def test_streams_after_the_token_expired(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """A follow and a lease whose connection breaks after the token expired get a new token and go on.

    They first ask whether it is still the etcd of before, with the old token.
    """
    direct = connect(**APP)
    async with Relay(etcd.port) as relay:
        options = EtcdOptions((relay.endpoint,), **APP)
        async with Store(options, direct.keys.cluster, lineage=Lineage(None, 60)) as store, aclosing(store.follow()) as batches:
            await snapshot(batches)
            lease = await store.leases.grant(60)
            due = await write_hosts(direct, range(3))
            assert [entry.mod_revision for entry in await changes(batches, 3)] == due
            await tokens_gone(etcd)
            await relay.cut()
            deadline = lease.deadline
            due = await write_hosts(direct, range(3))
            await relay.open()
            assert [entry.mod_revision for entry in await changes(batches, 3)] == due
            await until(lambda: lease.deadline > deadline, "the lease is renewed over the new connection")


async def test_etcd_is_killed_and_started_again(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """A restarted etcd knows none of its old tokens: a follow and a lease, with no other call to help, go on."""
    store, writer = connect(**APP), connect(**APP)
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        lease = await store.leases.grant(8)
        etcd.kill()
        etcd.start()
        revision = await eventually(lambda: write(writer, Put(A, host(1))), "etcd is back")
        assert [entry.mod_revision for entry in await changes(batches, 1)] == [revision]
        await renewed(lease, 1)


async def test_a_user_where_none_is_wanted(program: str) -> None:
    """A user and password for an etcd without authentication is StoreDeniedError, which says so."""
    with EmbeddedEtcd(program) as plain:
        async with Store(EtcdOptions((plain.endpoint,), **APP), new_cluster()) as store:
            with pytest.raises(StoreDeniedError, match="authentication is not enabled"):
                await store.get(A)


@pytest.mark.parametrize("kind", ["simple", "jwt"])
async def test_somebody_changes_rights(kind: str, etcd: EmbeddedEtcd, jwt_server: EmbeddedEtcd) -> None:
    """When an administrator changes some user or role, everybody else's calls, follows and leases go on."""
    endpoint = (etcd if kind == "simple" else jwt_server).endpoint
    cluster = new_cluster()
    async with (
        Store(EtcdOptions((endpoint,), **ROOT), cluster) as root,
        Store(EtcdOptions((endpoint,), **APP), cluster) as store,
        aclosing(store.follow()) as batches,
    ):
        await snapshot(batches)
        lease = await store.leases.grant(5)
        await root.channel.call("Auth.RoleAdd", rpc.AuthRoleAddRequest(name=cluster))
        assert await store.get(A) is None
        revision = await write(store, Put(A, host(1), lease.id))
        assert [entry.mod_revision for entry in await changes(batches, 1)] == [revision]
        await renewed(lease, 1)
