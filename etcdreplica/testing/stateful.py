"""An application whose body does what it is told over a Unix socket, one request a connection: for benches and tests of state.

A request is one JSON object, so is the answer. `{"do": "save", "size": 1024, "rounds": 100, "wait": true}` stores random bytes
and answers how long each call took, in milliseconds; `{"do": "change", "share": 0.01}` makes part of the last ones others.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from etcdreplica import Replica, protected
from etcdreplica.clock import boottime
from etcdreplica.errors import CheckpointError

BLOCK = 1 << 20  # what is changed is changed in such pieces, as a database changes pages
PAUSE_S = 0.02
TEXT = 1000
loaded: list[str] = []  # what this copy was told of while it was a backup

parser = argparse.ArgumentParser()
parser.add_argument("--name", default="stateful")
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--directory", type=Path, required=True, help="where the primary of each epoch listens, as EPOCH.sock")
parser.add_argument("--interval", type=float, help="seconds between checkpoints that nobody asks for")
options = parser.parse_args()


class State:
    """The bytes that were stored last."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        started = boottime()
        self.data: bytes = replica.restore(b"")
        self.restored_at = boottime()
        self.restore_ms = 1000 * (self.restored_at - started)

    def about(self) -> dict[str, Any]:
        """Say what there is."""
        digest = hashlib.sha256(self.data).hexdigest()
        text = self.data.decode(errors="replace") if len(self.data) < TEXT else None
        times = {"restore_ms": self.restore_ms, "restored_at": self.restored_at}
        who = {"epoch": self.replica.epoch, "host": self.replica.host, "loaded": loaded}
        return {**who, "size": len(self.data), "digest": digest, "text": text, **times}

    def put(self, text: str, wait: bool = True, timeout: float = 30.0) -> dict[str, Any]:
        """Store a text, and say what came of it."""
        try:
            self.replica.checkpoint(text.encode(), wait=wait, timeout=timeout)
        except CheckpointError as error:
            return {"error": str(error), "kind": type(error).__name__, "reached": getattr(error, "reached", None)}
        self.data = text.encode()
        return {"error": None}

    def become(self, text: str) -> dict[str, Any]:
        """Have another state, and store nothing."""
        self.data = text.encode()
        return {}

    def save(self, size: int, rounds: int, wait: bool, pause: float = PAUSE_S) -> dict[str, Any]:
        """Store random bytes again and again."""
        took = []
        for _ in range(rounds):
            time.sleep(pause)
            self.data = os.urandom(min(size, BLOCK)) * (size // BLOCK or 1)
            took.append(self._store(wait))
        return {"ms": took}

    def change(self, share: float, wait: bool) -> dict[str, Any]:
        """Make a share of the bytes others, all over them, and store them."""
        data, count = bytearray(self.data), len(self.data) // BLOCK
        for number in range(max(1, int(share * count))):
            at = BLOCK * int(number * count / max(1, int(share * count)))
            data[at : at + BLOCK] = os.urandom(BLOCK)
        self.data = bytes(data)
        return {"ms": [self._store(wait)]}

    def _store(self, wait: bool) -> float:
        started = boottime()
        self.replica.checkpoint(self.data, wait=wait, timeout=300)
        return 1000 * (boottime() - started)


@protected(
    name=options.name,
    style=options.style,
    degree=options.degree,
    max_restarts=0,
    hang_timeout=60,
    checkpoint_interval=options.interval,
    on_checkpoint=lambda data: loaded.append(data[:TEXT].decode(errors="replace")),
)
def main(replica: Replica) -> None:
    """Serve requests as primary."""
    state = State(replica)
    if options.interval:
        replica.state(lambda: state.data)
    path = options.directory / f"{replica.epoch}.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(0.1)
        while not replica.stopping:
            with contextlib.suppress(TimeoutError):
                client, _ = server.accept()
                with client, client.makefile("rwb") as stream:
                    request = json.loads(stream.readline())
                    answer: dict[str, Any] = getattr(state, request.pop("do"))(**request)
                    stream.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
