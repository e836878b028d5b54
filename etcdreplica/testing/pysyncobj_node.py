"""One node of PySyncObj, as a peer in `etcdreplica bench object`: driven by lines of JSON on its standard input.

`python -m etcdreplica.testing.pysyncobj_node '{"address": ..., "partners": [...], "settings": {...}}'`
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj.batteries import ReplDict

PAUSE_S = 0.002
LAST_S = 5.0  # for writes whose answer never comes


class Node:
    """A replicated dictionary."""

    def __init__(self, address: str, partners: list[str], settings: dict[str, Any]) -> None:
        self.values = ReplDict()
        self.node = SyncObj(address, partners, SyncObjConf(**settings), consumers=[self.values])

    def status(self) -> dict[str, Any]:
        """Say whether it is ready, and who leads."""
        leader = self.node.getStatus()["leader"]
        return {"ready": self.node.isReady(), "leader": str(leader) if leader else None}

    def latency(self, rounds: int) -> dict[str, Any]:
        """Return how long each write took, in milliseconds."""
        took = []
        for number in range(rounds):
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            self.values.set("latency", number, sync=True, timeout=10)
            took.append(1000 * (time.perf_counter() - started))
        return {"ms": took}

    def throughput(self, in_flight: int, seconds: float) -> dict[str, Any]:
        """Return how many writes succeeded each second with so many of them under way."""
        room, good, number = threading.Semaphore(in_flight), 0, 0

        def done(_: object, error: int) -> None:
            nonlocal good
            good += error == FAIL_REASON.SUCCESS
            room.release()

        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            if room.acquire(timeout=1):
                self.values.set(number & 1023, number, callback=done)
                number += 1
        until = time.perf_counter() + LAST_S
        for _ in range(in_flight):
            if not room.acquire(timeout=max(0.0, until - time.perf_counter())):
                break
        return {"per_s": good / (time.perf_counter() - started)}


def main() -> None:
    """Serve until the input ends."""
    node = Node(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(node, request.pop("do"))(**request)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
