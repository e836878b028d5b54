"""Records in order, with some of those that are committed kept for copies that come back; no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice

KEEP_RECORDS = 20_000  # committed ones that are kept
KEEP_BYTES = 64 << 20
BATCH_RECORDS = 2_000  # that are sent in one message
BATCH_BYTES = 4 << 20


class Log:
    """Records from index `first` to `last`; none yet: `last` is `first - 1`."""

    def __init__(self, first: int = 1) -> None:
        self.first = first
        self._records: deque[bytes] = deque()
        self.size = 0  # bytes

    @property
    def last(self) -> int:
        """The index of the newest record."""
        return self.first + len(self._records) - 1

    def __getitem__(self, index: int) -> bytes:
        return self._records[index - self.first]

    def append(self, record: bytes) -> int:
        """Add a record, and return its index."""
        self._records.append(record)
        self.size += len(record)
        return self.last

    def extend(self, records: Iterable[bytes]) -> None:
        """Add records."""
        for record in records:
            self.append(record)

    def cut(self, last: int) -> None:
        """Forget everything after `last`."""
        while self.last > last:
            self.size -= len(self._records.pop())

    def clear(self, first: int) -> None:
        """Forget everything, and begin with this index."""
        self._records.clear()
        self.first, self.size = first, 0

    def trim(self, until: int) -> None:
        """Forget the oldest records, not after `until`, beyond what is to be kept."""
        while self.first <= until and (len(self._records) > KEEP_RECORDS or self.size > KEEP_BYTES):
            self.size -= len(self._records.popleft())
            self.first += 1

    def batch(self, index: int) -> list[bytes]:
        """Return records from `index` on, as many as one message takes: at least one, if there is one."""
        count = min(self.last - index + 1, BATCH_RECORDS)
        if count <= 0:
            return []
        if index - self.first < len(self._records) // 2:
            found = list(islice(self._records, index - self.first, index - self.first + count))
        else:  # from the nearer end: a deque is slow in its middle
            found = list(islice(reversed(self._records), self.last - index - count + 1, self.last - index + 1))[::-1]
        size = 0
        for position, record in enumerate(found):
            size += len(record)
            if position and size > BATCH_BYTES:
                return found[:position]
        return found
