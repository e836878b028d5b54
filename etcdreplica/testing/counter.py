"""A replicated object for benches and tests: counters by name. Its primary, as every copy, also does what a socket tells it.

A request is one JSON object, so is the answer; each copy listens on DIRECTORY/INCARNATION.sock.
`{"do": "latency", "rounds": 100}` calls an update again and again from this process,
`{"do": "throughput", "in_flight": 100, "seconds": 2}` many at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from etcdreplica import Replica, connect_async, protected, query, serve, update
from etcdreplica.app.protocol import INCARNATION_ENV

PAUSE_S = 0.002

parser = argparse.ArgumentParser()
parser.add_argument("--name", default="counter")
parser.add_argument("--style", default="hot")
parser.add_argument("--degree", type=int, default=3)
parser.add_argument("--min-in-sync", type=int, default=1)
parser.add_argument("--failover", default="safe")
parser.add_argument("--durable", action="store_true")
parser.add_argument("--directory", type=Path, help="where each copy listens; without it, none does")


class Counter:
    """Numbers by name."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    @update
    def add(self, name: str, amount: int = 1) -> int:
        """Count on."""
        self.counts[name] = self.counts.get(name, 0) + amount
        return self.counts[name]

    @query
    def get(self, name: str) -> int:
        """Return a count."""
        return self.counts.get(name, 0)

    @query
    def everything(self) -> dict[str, int]:
        """Return all counts."""
        return self.counts


class Orders:
    """What the socket of a copy can ask for."""

    def __init__(self, replica: Replica, counter: Any) -> None:
        self.replica = replica
        self.counter = counter

    def about(self) -> dict[str, Any]:
        """Say who this is."""
        return {"pid": os.getpid(), "role": self.replica.role, "epoch": self.replica.epoch}

    def latency(self, rounds: int) -> dict[str, Any]:
        """Return how long each update took, in milliseconds."""
        took = []
        for _ in range(rounds):
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            self.counter.add("latency")
            took.append(1000 * (time.perf_counter() - started))
        return {"ms": took}

    def throughput(self, in_flight: int, seconds: float) -> dict[str, Any]:
        """Return how many updates were acknowledged each second with so many of them under way."""
        return {"per_s": asyncio.run(throughput(self.replica.name, in_flight, seconds))}


async def throughput(name: str, in_flight: int, seconds: float) -> float:
    """Return how many updates were acknowledged each second with so many of them under way."""
    loop = asyncio.get_running_loop()
    async with await connect_async(name) as counter:
        add, done, until = counter.add, 0, loop.time() + seconds
        over = loop.create_future()
        under_way = 0

        def begin() -> None:
            nonlocal under_way
            under_way += 1
            add("throughput").add_done_callback(end)

        def end(future: asyncio.Future[int]) -> None:
            nonlocal done, under_way
            future.result()
            done += 1
            under_way -= 1
            if loop.time() < until:
                begin()
            elif not under_way and not over.done():
                over.set_result(None)

        started = loop.time()
        for _ in range(in_flight):
            begin()
        await over
        return done / (loop.time() - started)


def body(replica: Replica, counter: Any) -> None:
    """Do what the socket says until this copy is to end."""
    options = parser.parse_args()
    if options.directory is None:
        replica.wait()
        return
    path = options.directory / f"{os.environ.get(INCARNATION_ENV, 'hand')}.sock"
    orders = Orders(replica, counter)
    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.suppress(OSError):
            path.unlink()
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(0.1)
        while not replica.stopping:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection, connection.makefile("rwb") as stream:
                connection.settimeout(None)
                request = json.loads(stream.readline() or '{"do": "about"}')
                answer = getattr(orders, request.pop("do"))(**request)
                stream.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    options = parser.parse_args()
    protect = protected(
        style=options.style,
        degree=options.degree,
        name=options.name,
        min_in_sync=options.min_in_sync,
        failover=options.failover,
        durable=options.durable,
        max_restarts=0,
    )
    serve(protect(Counter), body=body)
