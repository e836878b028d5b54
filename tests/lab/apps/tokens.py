"""A replicated object that remembers every token it was given, as often as it was given it."""

from __future__ import annotations

import argparse

from etcdreplica import protected, query, serve, update

parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--degree", type=int, default=3)
parser.add_argument("--failover", default="safe")
parser.add_argument("--durable", action="store_true")
PAGE = 10_000


class Tokens:
    """Numbers by client, in the order in which they came."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {}

    @update
    def put(self, client: str, number: int) -> int:
        """Take a token; return how many of this client there are."""
        held = self.numbers.setdefault(client, [])
        held.append(number)
        return len(held)

    @query
    def page(self, client: str, begin: int) -> list[int]:
        """Return a part of a client's tokens."""
        return self.numbers.get(client, [])[begin : begin + PAGE]

    @query
    def clients(self) -> list[str]:
        """Return all clients."""
        return sorted(self.numbers)


if __name__ == "__main__":
    options = parser.parse_args()
    protect = protected(
        name=options.name,
        style="hot",
        degree=options.degree,
        failover=options.failover,
        durable=options.durable,
        hang_timeout=20.0,
        stop_timeout=2.0,
        max_restarts=0,
    )
    serve(protect(Tokens))
