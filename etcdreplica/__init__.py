"""Fail-over protection for ordinary applications, coordinated by etcd.

Write `@protected(style="warm", degree=2)` over your `main`, run one daemon on each host (`etcdreplica node`), and exactly
one copy is primary. Importing this package and decorating load neither gRPC nor an etcd client and do no I/O.
"""

from __future__ import annotations

from etcdreplica.app.decorator import protected
from etcdreplica.app.replica import Replica
from etcdreplica.errors import EtcdReplicaError, NoWatchDogError, RefusedError, UsageError
from etcdreplica.model import Override, Role, Style

__all__ = [
    "EtcdReplicaError",
    "NoWatchDogError",
    "Override",
    "RefusedError",
    "Replica",
    "Role",
    "Style",
    "UsageError",
    "protected",
]
__version__ = "0.1.0"
