"""Options of the connection to etcd that are refused before anything is connected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from etcdreplica.errors import ConfigurationError, UsageError
from etcdreplica.store import EtcdOptions, Store
from tests.integration.store.store_harness import new_cluster

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"endpoints": ()}, "no etcd endpoint"),
        ({"endpoints": ("http://127.0.0.1:2379",)}, "without http://"),
        ({"endpoints": ("https://127.0.0.1:2379/",)}, "without http://"),
        ({"endpoints": ("127.0.0.1:2379", "etcd-2")}, "'etcd-2'"),
        ({"endpoints": (":2379",)}, "HOST:PORT"),
        ({"endpoints": ("etcd:",)}, "HOST:PORT"),
        ({"endpoints": ("etcd:http",)}, "HOST:PORT"),
        ({"endpoints": ("etcd:-1",)}, "HOST:PORT"),
        ({"endpoints": ("",)}, "HOST:PORT"),
        ({"cert_file": "c.pem"}, "both the certificate file and the key file"),
        ({"key_file": "k.pem"}, "both the certificate file and the key file"),
        ({"user": "root"}, "needs a password"),
        ({"password": "secret"}, "a password a user"),
    ],
)
def test_wrong_options(settings: dict[str, Any], message: str) -> None:
    """Each rule broken is a ConfigurationError, a kind of UsageError, which names the rule."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        EtcdOptions(**settings)
    assert isinstance(caught.value, UsageError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:2379", "etcd-1.example.org:2379", "[::1]:2379"])
def test_good_endpoints(endpoint: str) -> None:
    """Addresses and names of both families are taken as they are."""
    assert EtcdOptions((endpoint,)).endpoints == (endpoint,)


def test_the_password_is_not_shown() -> None:
    """Options that are logged do not give the password away."""
    options = EtcdOptions(user="app", password="hunter2")  # noqa: S106 - a made-up one
    assert "app" in repr(options)
    assert "hunter2" not in repr(options)


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "key_file"])
async def test_a_missing_file(tmp_path: Path, name: str) -> None:
    """A TLS file that is not there is a ConfigurationError that names it."""
    present = tmp_path / "present.pem"
    present.write_text("")
    settings = {
        "ca_file": str(present),
        "cert_file": str(present),
        "key_file": str(present),
        name: str(tmp_path / "absent.pem"),
    }
    with pytest.raises(ConfigurationError, match=r"absent\.pem.*No such file"):
        Store(EtcdOptions(**settings), new_cluster())  # type: ignore[arg-type]


async def test_a_bad_cluster_name() -> None:
    """A cluster name that cannot stand in a key is refused."""
    with pytest.raises(UsageError, match="cluster name"):
        Store(EtcdOptions(), "a/b")
