"""Whether the etcd that answers is the one that this host has worked with, and whether it still knows all it has told.

An etcd that comes back with an empty disk, or from an old backup, would have epochs and revisions used a second time, and would
promote somebody while copies that it does not know of still run. So each daemon remembers a random name that the first of them
wrote into etcd, the number of the etcd cluster, and the highest revision it was told: in memory, and in a file for the next.
Whatever answers without that name, with another number, or with an older revision counts as an etcd that does not answer:
nothing is promoted, and copies end when their leases do. A person may accept it (`etcdreplica accept-etcd`), by writing a new
name that says which one it replaces; it is used once the leases of before must have ended.

Limits: a daemon that has never seen the cluster believes the first etcd it finds. The file may be some seconds old, so an etcd
that is restored while no daemon runs, and lacks only the last seconds, is not found out by it.
"""

from __future__ import annotations

import logging
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec
from attrs import evolve, frozen

from etcdreplica.clock import Clock, boottime
from etcdreplica.errors import EtcdReplacedError
from etcdreplica.files import replace_file
from etcdreplica.model import Origin

log = logging.getLogger(__name__)

WRITE_S = 5.0  # the revision in the file is not older than that, while it changes


@frozen
class Known:
    """The etcd of before."""

    origin: str
    etcd: int  # the number of the etcd cluster
    revision: int  # the highest that was told
    floor: int  # below it are the epochs of etcds that this one has replaced


class Lineage:
    """What a daemon knows of its etcd. `path`: the file, or None for memory only; `lease_ttl_s`: of all its leases."""

    def __init__(self, path: Path | None, lease_ttl_s: float, clock: Clock = boottime) -> None:
        self._path = path
        self._ttl_s = lease_ttl_s
        self._clock = clock
        self._written_at = 0.0
        self._is_written = True
        self._refused_at: float | None = None
        self._said = ""
        self.known = _read(path)

    @property
    def revision(self) -> int:
        """The highest revision that is known to have been told; what is asked after this cannot be answered with less."""
        return self.known.revision if self.known else 0

    def see(self, header: Any, at_least: int = 0) -> None:
        """Take the header of an answer; `at_least`: what `revision` was when it was asked for. Raises EtcdReplacedError."""
        known = self.known
        if known is None:
            return
        if header.cluster_id != known.etcd:
            self._refuse(f"it belongs to another etcd cluster ({header.cluster_id:x}, and not {known.etcd:x})")
        if header.revision < at_least:
            self._refuse(f"it is at revision {header.revision}, and was at {at_least}: is it an old backup?")
        if header.revision > known.revision:
            self.known = evolve(known, revision=header.revision)
            if self._clock() - self._written_at > WRITE_S:
                self._write()

    def verify(self, header: Any, origin: Origin | None, at_least: int) -> None:
        """Take what etcd says of its origin, read after it may have been replaced. Raises EtcdReplacedError."""
        known = self.known
        if known is None:
            if origin is None:
                raise EtcdReplacedError("etcd's origin cannot be read: its value is corrupt, or it was just removed")
            self.known = Known(origin.id, header.cluster_id, header.revision, origin.floor)
            self._write(flush=True)
        elif origin is None:
            self._refuse("it is empty, or has lost its origin")
        elif origin.id != known.origin and origin.replaces == known.origin and origin.floor > known.revision + known.floor:
            self._accept(header, origin)
        elif origin.id != known.origin:
            self._refuse(f"its origin is {origin.id}")
        else:
            self.see(header, at_least)
        if self._refused_at is not None:
            log.warning("etcd is the one of before again")
        self._refused_at, self._said = None, ""

    def _accept(self, header: Any, origin: Origin) -> None:
        now = self._clock()
        if self._refused_at is None:
            self._refused_at = now
        if (left_s := self._refused_at + self._ttl_s - now) > 0:
            raise EtcdReplacedError(f"another etcd was accepted: it is used in {left_s:.1f} s, when all older leases are over")
        log.warning("another etcd was accepted: %s instead of %s", origin.id, origin.replaces)
        self._refused_at = None
        self.known = Known(origin.id, header.cluster_id, header.revision, origin.floor)
        self._write(flush=True)

    def _refuse(self, why: str) -> None:
        assert self.known is not None
        if self._refused_at is None:
            self._refused_at = self._clock()
        message = (
            f"refused: this is not the etcd that this host has worked with: {why}. Nothing is promoted until that one is back, "
            f"or 'etcdreplica accept-etcd {self.known.origin}' has accepted this one"
        )
        if why != self._said:
            self._said = why
            log.error("etcd %s", message)
        raise EtcdReplacedError(message)

    def _write(self, *, flush: bool = False) -> None:
        self._written_at = self._clock()
        if self._path is None or self.known is None:
            return
        if (there := _read(self._path)) and there.origin == self.known.origin and there.revision > self.known.revision:
            self.known = evolve(self.known, revision=there.revision)  # of another daemon of this host
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path, msgspec.json.encode(self.known), flush=flush)
            self._is_written = True
        except OSError as error:
            if self._is_written:
                log.error("cannot write %s (%s): the next daemon here may believe another etcd", self._path, error.strerror)
            self._is_written = False


def file_name(cluster: str) -> str:
    """Return the name of the file for a cluster, in the state directory."""
    return f"etcd-{cluster}.json"


def first_origin() -> Origin:
    """Return what the first daemon of all writes."""
    return Origin(secrets.token_hex(8))


def accepted_origin(replaces: str, by: str) -> Origin:
    """Return what a person writes into an etcd that is to take the place of another one.

    The floor is above every revision of an etcd that has lived for less than so many milliseconds.
    """
    return Origin(secrets.token_hex(8), replaces, int(1000 * time.time()), by)


def _read(path: Path | None) -> Known | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Known) if path is not None else None
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("cannot read %s (%s): any etcd is believed", path, error)
        return None
