"""mTLS between the daemons of different hosts: both sides show a certificate of the same CA, or there is none at all."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from attrs import frozen

from etcdreplica.errors import ConfigurationError


@frozen
class PeerTls:
    """PEM files of this host. Without them its peers are reached and answered in clear."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __attrs_post_init__(self) -> None:
        given = (self.ca_file, self.cert_file, self.key_file)
        if any(given) and not all(given):
            raise ConfigurationError("TLS between hosts needs three files: --peer-ca, --peer-cert and --peer-key")

    def __bool__(self) -> bool:
        return bool(self.ca_file)

    def check(self) -> None:
        """Raise ConfigurationError when a file cannot be read, or they do not fit together."""
        check_files(self.ca_file, self.cert_file, self.key_file)

    def bind(self, server: Any, listen: str, what: str) -> int:
        """Have a server listen; return the port. Raises ConfigurationError when the address cannot be had."""
        try:
            if not self:
                return int(server.add_insecure_port(listen))
            ca, cert, key = self._read()
            return int(server.add_secure_port(listen, grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)))
        except RuntimeError:
            raise ConfigurationError(
                f"cannot listen on the {what} address {listen}: it is taken, or not this host's, or the TLS files do not fit"
            ) from None

    def channel(self, address: str, options: Sequence[tuple[str, int]]) -> Any:
        """Open a channel to a peer."""
        if not self:
            return grpc.aio.insecure_channel(address, options=options)
        ca, cert, key = self._read()
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=options)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        ca, cert, key = (_read(path or "") for path in (self.ca_file, self.cert_file, self.key_file))
        return ca, cert, key


def check_files(ca_file: str | None, cert_file: str | None, key_file: str | None) -> None:
    """Raise ConfigurationError when a PEM file cannot be read, or the key is not that of the certificate."""
    for path in (ca_file, cert_file, key_file):
        if path:
            _read(path)
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if cert_file and key_file:
            context.load_cert_chain(cert_file, key_file, password="")
    except OSError as error:
        raise ConfigurationError(f"the TLS files {ca_file}, {cert_file} and {key_file} are of no use: {error}") from None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read the TLS file {path}: {error.strerror}") from None
