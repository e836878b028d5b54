"""Fail-over protection for ordinary applications, coordinated by etcd.

Write `@protected(style="warm", degree=2)` over your `main`, run one daemon on each host (`etcdreplica node`), and
exactly one copy is primary. Importing this package and decorating load neither gRPC nor an etcd client, and do no I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etcdreplica.errors import EtcdReplicaError, NoWatchDogError, RefusedError, UsageError
from etcdreplica.words import Role, Style

if TYPE_CHECKING:
    from etcdreplica.app.decorator import protected
    from etcdreplica.app.methods import query, update
    from etcdreplica.app.replica import Replica
    from etcdreplica.model import Override, Probe
    from etcdreplica.objects.context import replica
    from etcdreplica.objects.proxy import connect, connect_async
    from etcdreplica.objects.serve import serve

__all__ = [
    "EtcdReplicaError",
    "NoWatchDogError",
    "Override",
    "Probe",
    "RefusedError",
    "Replica",
    "Role",
    "Style",
    "UsageError",
    "connect",
    "connect_async",
    "protected",
    "query",
    "replica",
    "serve",
    "update",
]
__version__ = "0.1.0"


_LATER = {
    "Override": "model",
    "Probe": "model",
    "Replica": "app.replica",
    "connect": "objects.proxy",
    "connect_async": "objects.proxy",
    "protected": "app.decorator",
    "query": "app.methods",
    "replica": "objects.context",
    "serve": "objects.serve",
    "update": "app.methods",
}


def __getattr__(name: str) -> Any:
    """Load on first use what not every program uses: a program of a user needs other parts than a command."""
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f"etcdreplica.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
