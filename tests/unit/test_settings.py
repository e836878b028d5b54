"""The daemons' settings: each rule, and the name of the rule in its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.core.timing import Timing
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.errors import ConfigurationError, UsageError
from etcdreplica.store import EtcdOptions


def test_defaults_fit_together() -> None:
    """A node without any option has valid settings, and its lease outlives a failed call with the margin to spare."""
    settings = NodeSettings(host="a")
    assert settings.cluster == "default"
    assert settings.lease_ttl_s == settings.timing.lease_ttl_s == 5.0
    assert settings.etcd.timeout_s + settings.timing.fence_margin_s < settings.lease_ttl_s


def test_host_name_is_short_by_default() -> None:
    """The domain is no part of a host's name."""
    assert "." not in NodeSettings().host


def test_socket_is_where_applications_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides take the same default."""
    monkeypatch.setenv(SOCKET_ENV, "/somewhere/s")
    assert NodeSettings(host="a").socket_path == Path("/somewhere/s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "bad capacity 0"),
        ({"capacity": -1}, "bad capacity -1"),
        ({"etcd": EtcdOptions(timeout_s=1.6)}, r"may take 1\.6 s, but the timing was made for 1 s"),
        ({"timing": Timing(timeout_s=0.5)}, r"may take 1 s, but the timing was made for 0\.5 s"),
        ({"etcd": EtcdOptions(timeout_s=0.0)}, "may take 0 s"),
        ({"socket_path": Path("/" + "x" * 101)}, "over 107 bytes"),
        ({"socket_path": Path("/" + "é" * 60)}, "over 107 bytes"),
    ],
)
def test_wrong_setting_is_named(options: dict[str, Any], message: str) -> None:
    """A set that does not fit is an error that says which rule it breaks; nothing is put in its place."""
    with pytest.raises(ConfigurationError, match=message):
        NodeSettings(**{"host": "a", **options})


@pytest.mark.parametrize(
    "options", [{"capacity": 1}, {"etcd": EtcdOptions(timeout_s=0.01)}, {"socket_path": Path("/" + "x" * 100)}]
)
def test_limits_are_allowed(options: dict[str, Any]) -> None:
    """Each rule includes its limit."""
    assert NodeSettings(**{"host": "a", **options}).host == "a"


@pytest.mark.parametrize("options", [{"host": "a/b"}, {"host": ""}, {"host": "a", "cluster": "../x"}, {"cluster": ""}])
def test_bad_names(options: dict[str, Any]) -> None:
    """Host and cluster stand in keys."""
    with pytest.raises(UsageError, match=r"bad (host|cluster) name"):
        NodeSettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoints": ()}, "no etcd endpoint given"),
        ({"endpoints": ("localhost",)}, "bad etcd endpoint 'localhost': write it HOST:PORT"),
        ({"endpoints": (":2379",)}, "bad etcd endpoint ':2379'"),
        ({"endpoints": ("a:b",)}, "bad etcd endpoint 'a:b'"),
        ({"endpoints": ("http://a:2379",)}, "without http://"),
        ({"cert_file": "c.pem"}, "needs both"),
        ({"key_file": "k.pem"}, "needs both"),
        ({"user": "root"}, "an etcd user needs a password"),
        ({"password": "x"}, "a password a user"),
    ],
)
def test_wrong_etcd_option_is_named(options: dict[str, Any], message: str) -> None:
    """How to reach etcd is checked before anything is tried."""
    with pytest.raises(ConfigurationError, match=message):
        EtcdOptions(**options)


def test_ipv6_endpoint_is_allowed() -> None:
    """An address in brackets is a host."""
    assert EtcdOptions(endpoints=("[::1]:2379",)).endpoints == ("[::1]:2379",)


def test_password_is_not_shown() -> None:
    """Settings end up in logs."""
    assert "s3cret" not in repr(EtcdOptions(user="root", password="s3cret"))  # noqa: S106
