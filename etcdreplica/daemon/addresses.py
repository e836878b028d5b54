"""Where WatchDogs answer other hosts: HOST:PORT, with an IPv6 address in brackets."""

from __future__ import annotations

import ipaddress

from etcdreplica.errors import ConfigurationError

MAX_PORT = 65535


def split(text: str) -> tuple[str, int]:
    """Return host and port. Raises ConfigurationError."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or not port.isdigit() or int(port) > MAX_PORT or "/" in bare or (":" in bare and bare == host):
        raise ConfigurationError(f"bad peer address {text!r}: write it HOST:PORT, an IPv6 address in brackets")
    return bare, int(port)


def join(host: str, port: int) -> str:
    """Write them as one."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_listen(text: str, *, insecure: bool) -> None:
    """Refuse to listen beyond this machine without TLS, unless it is wanted. Raises ConfigurationError."""
    host, _ = split(text)
    if not insecure and not is_loopback(host):
        raise ConfigurationError(
            f"peer address {text} can be reached from other machines, and without TLS anybody in that network could answer for "
            "a host: give --peer-ca, --peer-cert and --peer-key, listen on 127.0.0.1, or say --insecure if you trust it"
        )


def advertised(listen: str, port: int, address: str) -> str:
    """Return what other hosts are told: the address that is bound, or that of this host when all of them are."""
    host, _ = split(listen)
    return join(address if _is_any(host) else host, port)


def is_loopback(host: str) -> bool:
    """Whether it can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
