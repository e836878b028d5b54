"""Where WatchDogs listen for each other: what is refused, and what other hosts are told."""

from __future__ import annotations

import pytest

from etcdreplica.daemon.addresses import advertised, check_listen, join, split
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.errors import ConfigurationError


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.3.2.1:7000", "localhost:7000", "[::1]:0"])
def test_loopback_needs_no_leave(listen: str) -> None:
    """Only this machine can reach it."""
    check_listen(listen, insecure=False)


@pytest.mark.parametrize("listen", ["0.0.0.0:7000", "10.0.0.1:7000", "[::]:7000", "db-1.example:7000"])
def test_beyond_this_machine_needs_insecure(listen: str) -> None:
    """Without TLS it is refused unless it is wanted, and the message says how to want it."""
    with pytest.raises(ConfigurationError, match="--insecure"):
        NodeSettings(host="a", peer_listen=listen)
    assert NodeSettings(host="a", peer_listen=listen, insecure=True).peer_listen == listen


@pytest.mark.parametrize("listen", ["", "7000", ":7000", "a:", "a:b", "a:65536", "http://a:1", "::1:7000", "[]:1"])
def test_bad_address_is_named(listen: str) -> None:
    """It is refused with insecure too."""
    with pytest.raises(ConfigurationError, match="bad peer address"):
        check_listen(listen, insecure=True)


@pytest.mark.parametrize("address", ["10.0.0.1:7000", "[fd00::1]:7000", "db-1:1"])
def test_split_and_join(address: str) -> None:
    """Each undoes the other."""
    assert join(*split(address)) == address


@pytest.mark.parametrize(
    ("listen", "told"),
    [
        ("10.0.0.1:0", "10.0.0.1:4711"),
        ("[fd00::1]:0", "[fd00::1]:4711"),
        ("0.0.0.0:0", "db-1:4711"),
        ("[::]:0", "db-1:4711"),
        ("localhost:0", "localhost:4711"),
    ],
)
def test_advertised(listen: str, told: str) -> None:
    """The bound host with the real port, or the address of this host when all are bound."""
    assert advertised(listen, 4711, "db-1") == told
