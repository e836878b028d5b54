"""A replicated object whose methods can misbehave; nothing but what its clients ask for happens."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from etcdreplica import protected, query, replica, serve, update

parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--style", default="hot")
parser.add_argument("--degree", type=int, default=3)
parser.add_argument("--min-in-sync", type=int, default=1)
parser.add_argument("--durable", action="store_true")
parser.add_argument("--hang-timeout", type=float, default=10.0)


class Notebook:
    """Lines of text."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @update
    def add(self, line: str) -> int:
        """Add a line; return how many there are."""
        self.lines.append(line)
        return len(self.lines)

    @update
    def stamp(self) -> str:
        """Add a line of chance and time; return it."""
        self.lines.append(f"{replica.new_id()} {replica.now():.6f}")
        return self.lines[-1]

    @update
    def guess(self) -> None:
        """Add what no other copy would."""
        self.lines.append(os.urandom(8).hex())

    @update
    def sleep(self, pid: int) -> None:
        """Never return, in one process."""
        while os.getpid() == pid:
            time.sleep(1)

    @query
    def read(self) -> list[str]:
        """Return all lines."""
        return self.lines

    @query
    def pid(self) -> int:
        """Say which process answers."""
        return os.getpid()


def main() -> Any:
    """Serve."""
    options = vars(parser.parse_args())
    serve(protected(**options)(Notebook))


if __name__ == "__main__":
    main()
