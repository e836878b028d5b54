"""An application whose state tells whether it is whole: a number, and bytes that only that number makes.

Each line of the journal is one JSON object: restored, trying, acknowledged, each with the number and the epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

from etcdreplica import Replica, protected
from etcdreplica.errors import CheckpointError

SIZES = (100, 5_000, 300_000, 1_500_000)

parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--journal", type=Path, required=True)
parser.add_argument("--largest", type=int, default=len(SIZES), help="how many of the sizes are used")
parser.add_argument("--timeout", type=float, default=60.0)
options = parser.parse_args()


def made_of(number: int) -> bytes:
    """Return what the state of a number holds."""
    size = SIZES[number % options.largest]
    block = hashlib.sha256(str(number).encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def note(what: str, number: int, replica: Replica, **more: object) -> None:
    """Write a line, whole or not at all."""
    told = {"what": what, "number": number, "epoch": replica.epoch, "host": replica.host, "at": time.monotonic(), **more}
    line = json.dumps(told) + "\n"
    fd = os.open(options.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)


@protected(name=options.name, style=options.style, degree=options.degree, max_restarts=0, stop_timeout=5.0)
def main(replica: Replica) -> None:
    """Count, and store every number."""
    state = replica.restore({"number": 0, "data": made_of(0)}, timeout=60)
    number = state["number"]
    note("restored", number, replica, whole=state["data"] == made_of(number))
    while not replica.stopping:
        number += 1
        state = {"number": number, "data": made_of(number)}
        wait = number % 3 != 0
        note("trying", number, replica, wait=wait)
        try:
            replica.checkpoint(state, wait=wait, timeout=options.timeout)
        except CheckpointError as error:
            note("refused", number, replica, error=str(error))
            replica.wait(0.05)
            continue
        if wait:
            note("acknowledged", number, replica)


if __name__ == "__main__":
    main()
