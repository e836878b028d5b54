"""A client of `tokens.py`: gives it one token after another, and keeps a journal: `try N`, then `done N` or `unknown N`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from etcdreplica import connect
from etcdreplica.errors import EtcdReplicaError

PAUSE_S = 0.04
TIMEOUT_S = 8.0
parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--client", required=True, help="no other process ever may have this name")
parser.add_argument("--journal", type=Path, required=True)


def main() -> None:
    """Go on until killed."""
    options = parser.parse_args()
    journal = os.open(options.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    number = 0
    while True:
        try:
            with connect(options.name, timeout=TIMEOUT_S) as tokens:
                while True:
                    number += 1
                    os.write(journal, f"try {number}\n".encode())
                    try:
                        tokens.put(options.client, number)
                    except EtcdReplicaError:
                        os.write(journal, f"unknown {number}\n".encode())
                    else:
                        os.write(journal, f"done {number}\n".encode())
                    time.sleep(PAUSE_S)
        except EtcdReplicaError:
            time.sleep(PAUSE_S)  # no copy can be found: the application is new, or this host is cut off


if __name__ == "__main__":
    main()
