"""How long `etcdreplica status` of 100 applications on 10 hosts takes, as one JSON object.

`python tests/benchmarks/status_time.py`. The whole process counts, from its start to its end, beside that of a bare interpreter
and of one that only imports gRPC.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from etcdreplica.model import Assignment, AssignmentState, Host, Program, Registration, Replica, ReplicaState, Seat
from etcdreplica.store import EtcdOptions, Key, Kind, Put, Store, Txn
from etcdreplica.store.txn import Operation
from etcdreplica.testing import EmbeddedEtcd
from etcdreplica.words import Role, Style

ROUNDS = 21
APPS, HOSTS = 100, 10


def records(number: int) -> Iterator[Operation]:
    """Yield what stands in etcd of one warm application of two copies."""
    name, epoch = f"application-{number:03}", 1000 + number
    seats = tuple(Seat(f"host-{(number + i) % HOSTS}", 1, 2 * epoch + i) for i in range(2))
    program = Program(("/usr/bin/python3", f"/srv/{name}/main.py"), f"/srv/{name}")
    yield Put(Key(Kind.REGISTRATIONS, (name,)), Registration(name, Style.WARM, 2, program))
    active = AssignmentState.ACTIVE
    yield Put(Key(Kind.ASSIGNMENTS, (name,)), Assignment(epoch, epoch, 1, active, seats[0], seats[1:], seats[1].host))
    for seat, role, state in zip(seats, Role, (ReplicaState.RUNNING, ReplicaState.READY), strict=True):
        yield Put(Key(Kind.REPLICAS, (name, seat.host)), Replica(seat.incarnation, epoch, role, state, 4242))


async def fill(endpoint: str) -> None:
    """Write the cluster."""
    async with Store(EtcdOptions((endpoint,), timeout_s=10.0), "default") as store:
        for i in range(HOSTS):
            await store.commit(Txn((), (Put(Key(Kind.HOSTS, (f"host-{i}",)), Host(f"10.0.0.{i}", 1)),)))
        for number in range(APPS):
            await store.commit(Txn((), tuple(records(number))))


def milliseconds(*command: str) -> float:
    """Run an interpreter, from start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure in turn, so that a change of the machine's speed meets all of them."""
    with EmbeddedEtcd() as etcd:
        asyncio.run(fill(etcd.endpoint))
        commands = (("-c", "pass"), ("-c", "import grpc.aio"), ("-m", "etcdreplica", "status", "--etcd", etcd.endpoint))
        rounds = [[milliseconds(*command) for command in commands] for _ in range(ROUNDS)]
    bare, grpc, status = (sorted(column) for column in zip(*rounds, strict=True))
    middle = {"bare_ms": bare, "import_grpc_ms": grpc, "status_ms": status}
    print(json.dumps({**{k: round(statistics.median(v), 1) for k, v in middle.items()}, "status_best_ms": round(status[0], 1)}))


if __name__ == "__main__":
    main()
