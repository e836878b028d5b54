"""`etcdreplica.replica`: a clock, random numbers and ids for updates, the same on every copy.

An update must not ask the real ones: each copy would get another answer. What is given here follows from the log: the time
that the primary wrote beside the update, and the update's place in it.
"""

from __future__ import annotations

import threading
import uuid
from random import Random

from attrs import define

from etcdreplica.errors import UsageError


@define
class Moment:
    """An update that is being applied: its place in the log and the primary's time. `seed` is that of the object's history."""

    seed: bytes
    index: int
    place: int
    time: float
    _source: Random | None = None

    @property
    def source(self) -> Random:
        """Random numbers that follow from its place."""
        if self._source is None:
            self._source = Random(b"%b:%d:%d" % (self.seed, self.index, self.place))
        return self._source


class _Local(threading.local):
    moment: Moment | None = None


class ReplicaContext:
    """What `etcdreplica.replica` is. For use inside methods marked with @update, and in the `__init__` of their class."""

    def __init__(self) -> None:
        self._local = _Local()

    def _enter(self, moment: Moment | None) -> None:
        self._local.moment = moment

    @property
    def _moment(self) -> Moment:
        if self._local.moment is None:
            raise UsageError("etcdreplica.replica is for methods marked with @update: nothing is being applied just now")
        return self._local.moment

    def now(self) -> float:
        """Return Unix time in seconds by the primary's clock; never less than in an earlier update."""
        return self._moment.time

    def random(self) -> float:
        """Return a number from 0 up to 1."""
        return self._moment.source.random()

    def rng(self) -> Random:
        """Return a source of random numbers, as of the module `random`, for this update."""
        return self._moment.source

    def new_id(self) -> str:
        """Return an id that no other update of this object has been given: 32 hexadecimal digits."""
        return uuid.UUID(int=self._moment.source.getrandbits(128), version=4).hex


replica = ReplicaContext()
