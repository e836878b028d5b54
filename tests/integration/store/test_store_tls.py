"""TLS to a real etcd, with certificates from a CA of the tests' own.

`etcd --auto-tls` is of no use here: the certificate it makes has the right name, IP 127.0.0.1, but a P-521 key, which the
BoringSSL inside gRPC does not offer to verify, so an etcd built with a newer Go (Debian's) ends the handshake.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from etcdreplica.errors import ConfigurationError, StoreDeniedError, StoreUnavailableError
from etcdreplica.store import EtcdOptions, Put, Store
from etcdreplica.testing.etcd import EmbeddedEtcd
from tests.integration.store.store_harness import (
    Connect,
    changes,
    eventually,
    host,
    host_key,
    new_cluster,
    renewed,
    snapshot,
    write,
)

pytestmark = pytest.mark.integration

A = host_key("a")


class Authority:
    """A certificate authority of its own, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ca_file, self._ca_key = str(directory / "ca.pem"), str(directory / "ca-key.pem")
        directory.mkdir()
        self._openssl("-subj", "/CN=test CA", "-keyout", self._ca_key, "-out", self.ca_file)

    def issue(self, name: str, subject_alt_name: str) -> tuple[str, str]:
        """Return the files of a certificate and its key."""
        cert, key = str(self._directory / f"{name}.pem"), str(self._directory / f"{name}-key.pem")
        names = ("-subj", f"/CN={name}", "-addext", f"subjectAltName={subject_alt_name}")
        self._openssl(*names, "-CA", self.ca_file, "-CAkey", self._ca_key, "-keyout", key, "-out", cert)
        return cert, key

    def _openssl(self, *arguments: str) -> None:
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "1",
        ]
        subprocess.run([*command, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA that vouches for etcd and its clients."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    """A CA that etcd knows nothing of."""
    return Authority(tmp_path / "other")


def start(program: str, authority: Authority, names: str, *arguments: str) -> EmbeddedEtcd:
    """Return an etcd that speaks TLS with a certificate for these names."""
    cert, key = authority.issue("etcd", names)
    return EmbeddedEtcd(program, scheme="https", arguments=("--cert-file", cert, "--key-file", key, *arguments))


@pytest.fixture(scope="module")
def server(program: str, authority: Authority) -> Iterator[EmbeddedEtcd]:
    """An etcd that speaks TLS to its clients."""
    with start(program, authority, "IP:127.0.0.1") as running:
        yield running


@pytest.fixture
def ca_file(authority: Authority) -> str:
    """The certificate that vouches for this etcd."""
    return authority.ca_file


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


async def test_another_ca(connect: Connect, other: Authority) -> None:
    """An etcd whose certificate another CA signed is not talked to; the error names the endpoint and the reason."""
    store = connect(ca_file=other.ca_file)
    with pytest.raises(StoreUnavailableError, match=r"(?i)certificate") as caught:
        await store.get(A)
    assert store.channel.endpoint in str(caught.value)
    assert not isinstance(caught.value, StoreDeniedError)


async def test_the_systems_cas(connect: Connect, other: Authority) -> None:
    """Without a CA file the system's CAs decide, and they do not know this etcd."""
    cert_file, key_file = other.issue("client", "DNS:client")
    store = connect(cert_file=cert_file, key_file=key_file)
    with pytest.raises(StoreUnavailableError, match=r"(?i)certificate"):
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


async def test_another_name(program: str, authority: Authority) -> None:
    """An etcd whose certificate is for another host is not talked to."""
    with start(program, authority, "DNS:etcd-7.example.org") as server:
        async with Store(EtcdOptions((server.endpoint,), ca_file=authority.ca_file), new_cluster()) as store:
            with pytest.raises(StoreUnavailableError, match=server.endpoint):
                await store.get(A)


async def test_client_certificates(program: str, authority: Authority, other: Authority) -> None:
    """An etcd that wants a client certificate serves who has one of its CA, and nobody else."""
    own, foreign = authority.issue("client", "DNS:client"), other.issue("client", "DNS:client")
    with start(program, authority, "IP:127.0.0.1", "--client-cert-auth", "--trusted-ca-file", authority.ca_file) as server:
        for cert_file, key_file, works in ((*own, True), (None, None, False), (*foreign, False)):
            options = EtcdOptions(  # an etcd that checks names asks a resolver, which takes its time where there is none
                (server.endpoint,), ca_file=authority.ca_file, cert_file=cert_file, key_file=key_file, timeout_s=20.0
            )
            async with Store(options, new_cluster()) as store:
                if works:
                    await write(store, Put(A, host(1)))
                    assert await store.get(A) is not None
                else:
                    with pytest.raises(StoreUnavailableError, match=server.endpoint):
                        await store.get(A)
