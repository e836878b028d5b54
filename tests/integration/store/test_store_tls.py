"""TLS to a real etcd with a certificate of its own making.

`etcd --auto-tls` makes a self-signed certificate with the addresses it listens on as its names, 127.0.0.1 here, in
`fixtures/client/cert.pem` below its data; it serves as its own CA.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from conftest import Connect
from store_harness import changes, eventually, host, host_key, renewed, snapshot, write

from etcdreplica.errors import ConfigurationError, StoreDeniedError, StoreUnavailableError
from etcdreplica.store import Put
from etcdreplica.testing.etcd import EmbeddedEtcd

pytestmark = pytest.mark.integration

A = host_key("a")


@pytest.fixture(scope="module")
def server(program: str) -> Iterator[EmbeddedEtcd]:
    """An etcd that speaks TLS to its clients."""
    with EmbeddedEtcd(program, scheme="https", arguments=("--auto-tls",)) as running:
        yield running


@pytest.fixture
def ca_file(etcd: EmbeddedEtcd) -> str:
    """The certificate that vouches for this etcd."""
    return str(etcd.data_dir / "data" / "fixtures" / "client" / "cert.pem")


@pytest.fixture
def other_ca(tmp_path: Path) -> tuple[str, str]:
    """A certificate and its key that have nothing to do with this etcd."""
    cert, key = tmp_path / "other.pem", tmp_path / "other-key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return str(cert), str(key)


async def test_everything_works_over_tls(connect: Connect, ca_file: str) -> None:
    """Reads, writes, a follow and leases work when etcd's certificate is vouched for."""
    store = connect(ca_file=ca_file)
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        lease = await store.leases.grant(2)
        revision = await write(store, Put(A, host(1), lease.id))
        assert [entry.mod_revision for entry in await changes(batches, 1)] == [revision]
        await renewed(lease, 2)
        await store.leases.revoke(lease)
        assert [entry.value for entry in await changes(batches, 1)] == [None]


async def test_without_tls(connect: Connect) -> None:
    """Speaking plainly to an etcd that wants TLS is StoreUnavailableError and names the endpoint."""
    store = connect()
    with pytest.raises(StoreUnavailableError, match=store.channel.endpoint):
        await store.get(A)


async def test_another_ca(connect: Connect, other_ca: tuple[str, str]) -> None:
    """An etcd whose certificate another CA signed is not talked to; the error names the endpoint and the reason."""
    store = connect(ca_file=other_ca[0])
    with pytest.raises(StoreUnavailableError, match="(?i)certificate") as caught:
        await store.get(A)
    assert store.channel.endpoint in str(caught.value)
    assert not isinstance(caught.value, StoreDeniedError)


async def test_the_systems_cas(connect: Connect, other_ca: tuple[str, str]) -> None:
    """Without a CA file the system's CAs decide, and they do not know this etcd."""
    cert_file, key_file = other_ca
    store = connect(cert_file=cert_file, key_file=key_file)
    with pytest.raises(StoreUnavailableError, match="(?i)certificate"):
        await store.get(A)


async def test_a_missing_file(connect: Connect, ca_file: str) -> None:
    """A CA file that is not there is a ConfigurationError that names it, at once."""
    with pytest.raises(ConfigurationError, match=r"absent\.pem"):
        connect(ca_file=f"{ca_file}/../absent.pem")


async def test_a_file_that_is_no_certificate(connect: Connect, tmp_path: Path) -> None:
    """A CA file without a certificate in it is an error of this package, which does not hang."""
    path = tmp_path / "ca.pem"
    path.write_text("no certificate\n")
    with pytest.raises((ConfigurationError, StoreUnavailableError)):
        await connect(ca_file=str(path)).get(A)


async def test_etcd_is_killed_and_started_again(etcd: EmbeddedEtcd, connect: Connect, ca_file: str) -> None:
    """Over TLS too a follow and a lease outlive a restart of etcd."""
    store = connect(ca_file=ca_file)
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        lease = await store.leases.grant(6)
        etcd.kill()
        etcd.start()
        revision = await eventually(lambda: write(store, Put(A, host(1), lease.id)), "etcd is back")
        assert [entry.mod_revision for entry in await changes(batches, 1)] == [revision]
        await renewed(lease, 1)
