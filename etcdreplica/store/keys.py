"""Every key in etcd and the record that stands under it; the one place that turns both into bytes and back.

Keys are `/etcdreplica/<cluster>/<kind>/<name>[/<name>]`. A value that does not decode is not an exception here: it
arrives as `Corrupt`, naming its key, so that one bad value stops one application and no loop.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Any

import msgspec
from attrs import frozen

from etcdreplica import model
from etcdreplica.words import NAME, check_name


class Kind(enum.StrEnum):
    """The first part of a key after the cluster; the rest of it is as `_SHAPES` says."""

    HOSTS = "hosts"  # <host>, host lease
    REGISTRATIONS = "registrations"  # <app>
    ASSIGNMENTS = "assignments"  # <app>
    PLACEMENTS = "placements"  # <host>/<app>
    SUCCESSIONS = "successions"  # <host>/<app>, written by the WatchDog of the primary that died
    REPLICAS = "replicas"  # <app>/<host>, application lease
    FAILURES = "failures"  # <app>/<incarnation>
    HISTORY = "history"  # <app>/<incarnation>
    LEADERS = "leaders"  # <role>/<lease>, candidate's lease
    PAUSES = "pauses"  # app/<app>, or cluster/<cluster>
    CHECKPOINTS = "checkpoints"  # <app>
    IN_SYNC = "insync"  # <app>, a replicated object
    VOUCHERS = "vouchers"  # <app>, with failsafe
    ORIGIN = "origin"  # <cluster>
    SERVERS = "servers"  # <host>, its CheckpointServer's lease


RECORDS: dict[Kind, type[Any]] = {
    Kind.HOSTS: model.Host,
    Kind.REGISTRATIONS: model.Registration,
    Kind.ASSIGNMENTS: model.Assignment,
    Kind.PLACEMENTS: model.Placement,
    Kind.SUCCESSIONS: model.Succession,
    Kind.REPLICAS: model.Replica,
    Kind.FAILURES: model.Failure,
    Kind.HISTORY: model.Event,
    Kind.LEADERS: model.Leader,
    Kind.PAUSES: model.Pause,
    Kind.CHECKPOINTS: model.Checkpoint,
    Kind.IN_SYNC: model.InSync,
    Kind.VOUCHERS: model.Vouchers,
    Kind.ORIGIN: model.Origin,
    Kind.SERVERS: model.Server,
}
_NAME, _NUMBER = NAME.pattern, r"[0-9]{1,18}"
_SHAPES: dict[Kind, re.Pattern[str]] = {
    kind: re.compile(kind + "/" + "/".join(parts))
    for kind, *parts in (
        (Kind.HOSTS, f"({_NAME})"),
        (Kind.REGISTRATIONS, f"({_NAME})"),
        (Kind.ASSIGNMENTS, f"({_NAME})"),
        (Kind.PLACEMENTS, f"({_NAME})", f"({_NAME})"),
        (Kind.SUCCESSIONS, f"({_NAME})", f"({_NAME})"),
        (Kind.REPLICAS, f"({_NAME})", f"({_NAME})"),
        (Kind.FAILURES, f"({_NAME})", f"({_NUMBER})"),
        (Kind.HISTORY, f"({_NAME})", f"({_NUMBER})"),
        (Kind.LEADERS, f"({_NAME})", "([0-9a-f]{1,16})"),
        (Kind.PAUSES, "(app|cluster)", f"({_NAME})"),
        (Kind.CHECKPOINTS, f"({_NAME})"),
        (Kind.IN_SYNC, f"({_NAME})"),
        (Kind.VOUCHERS, f"({_NAME})"),
        (Kind.ORIGIN, f"({_NAME})"),
        (Kind.SERVERS, f"({_NAME})"),
    )
}
_DECODERS = {kind: msgspec.json.Decoder(record) for kind, record in RECORDS.items()}
_ENCODE = msgspec.json.Encoder().encode


@frozen
class Key:
    """A key within a cluster."""

    kind: Kind
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join((self.kind, *self.names))


@frozen
class Corrupt:
    """Stands in the place of a record that could not be read."""

    error: str


@frozen
class Entry:
    """One key with its record. `value` is None in a change that deleted the key."""

    key: Key
    value: Any
    mod_revision: int
    create_revision: int = 0
    lease: int = 0


class Keyspace:
    """The keys of one cluster."""

    def __init__(self, cluster: str) -> None:
        self.cluster = check_name("cluster name", cluster)
        self.root = f"/etcdreplica/{cluster}/"

    def path(self, key: Key) -> bytes:
        """Return the key's bytes in etcd."""
        return f"{self.root}{key}".encode()

    def prefix(self, kind: Kind | None = None, *names: str) -> bytes:
        """Return the prefix under which all keys of a kind, or of a kind and first names, stand."""
        return (self.root + "".join(f"{part}/" for part in (kind, *names) if part)).encode()

    def parse(self, path: bytes) -> Key | None:
        """Return the key, or None for one that this package does not write."""
        rest = path.decode(errors="replace").removeprefix(self.root)
        shape = _SHAPES.get(rest.partition("/")[0])  # type: ignore[call-overload]
        match = shape.fullmatch(rest) if shape else None
        return Key(Kind(rest.partition("/")[0]), match.groups()) if match else None


def encode(value: Any) -> bytes:
    """Turn a record into JSON. Text of other programs may hold what is no character; it is replaced, not refused."""
    try:
        return _ENCODE(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), ensure_ascii=False).encode(errors="replace")


def decode(key: Key, data: bytes) -> Any:
    """Turn JSON back into the record that the key promises, or `Corrupt`."""
    try:
        return _DECODERS[key.kind].decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return Corrupt(f"the value of {key} in etcd is corrupt: {error}")
