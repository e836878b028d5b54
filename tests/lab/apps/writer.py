"""An application that stores checkpoints with wait=True, says when it acts as primary, and keeps a journal of what it was told.

Lines of the journal: `restored EPOCH COUNT`, `acknowledged EPOCH COUNT`, `refused EPOCH COUNT`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from etcdreplica import Replica, protected
from etcdreplica.errors import CheckpointError
from etcdreplica.testing.witness import Testimony

PAUSE_S = 0.05
WAIT_S = 3.0
parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--claims", required=True)
parser.add_argument("--journal", type=Path, required=True)
options = parser.parse_args()


@protected(name=options.name, style=options.style, degree=options.degree, hang_timeout=20.0, stop_timeout=2.0, max_restarts=0)
def main(replica: Replica) -> None:
    """Count, and store each count."""
    journal = os.open(options.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    testify = Testimony(options.claims)

    def note(what: str, count: int) -> None:
        os.write(journal, f"{what} {replica.epoch} {count}\n".encode())

    testify(replica)
    count = int(replica.restore(0))
    note("restored", count)
    while not replica.stopping:
        testify(replica)
        count += 1
        try:
            replica.checkpoint(count, wait=True, timeout=WAIT_S)
        except CheckpointError:
            note("refused", count)
        else:
            note("acknowledged", count)
        testify(replica)
        replica.wait(PAUSE_S)


if __name__ == "__main__":
    main()
