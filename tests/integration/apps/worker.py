"""The application of the integration tests: writes what happens to it into a journal, one JSON object a line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

from etcdreplica import Override, Replica, Role, protected
from etcdreplica.clock import boottime

parser = argparse.ArgumentParser()
parser.add_argument("--journal", type=Path, required=True)
parser.add_argument("--name", default="worker")
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--hosts", nargs="*")
parser.add_argument("--label", default="")
parser.add_argument("--failover", default="safe")
parser.add_argument("--keep", default="until-done")
parser.add_argument("--stop-timeout", type=float, default=10.0)
parser.add_argument("--async", dest="use_async", action="store_true")
parser.add_argument("--return-when", type=Path, help="the body returns once this file exists")
parser.add_argument("--slow-stop", type=float, default=0.0, help="seconds the body takes to end")
parser.add_argument("--deaf", action="store_true", help="the body never looks at stopping")
parser.add_argument("--raise-while", type=Path, help="the body raises as long as this file exists")
parser.add_argument("--restarts-here", type=int, default=0)
parser.add_argument("--max-restarts", type=int, default=10)
options = parser.parse_args()


def note(what: str, replica: Replica, **more: object) -> None:
    """Append one line; small appends to one file are atomic."""
    line = {
        "what": what,
        "host": replica.host,
        "role": replica.role,
        "epoch": replica.epoch,
        "pid": os.getpid(),
        "at": boottime(),
    }
    fd = os.open(options.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, json.dumps({**line, **more}).encode() + b"\n")
    os.close(fd)


def begin(replica: Replica) -> None:
    """What every body does first."""
    if options.raise_while and options.raise_while.exists():
        raise RuntimeError("trouble")
    note("begin", replica, argv=sys.argv, cwd=str(Path.cwd()), flavour=os.environ.get("FLAVOUR"))
    replica.advertise(f"worker://{replica.host}/{os.getpid()}")

    @replica.on_role_change
    def changed(role: Role, epoch: int) -> None:
        note("role", replica)


def is_over(replica: Replica) -> bool:
    """Whether the body should return now."""
    replica.heartbeat()
    return (replica.stopping and not options.deaf) or bool(options.return_when and options.return_when.exists())


protect = protected(
    style=options.style,
    degree=options.degree,
    name=options.name,
    hosts=options.hosts,
    labels=dict([options.label.split("=")]) if options.label else None,
    keep=options.keep,
    failover=options.failover,
    stop_timeout=options.stop_timeout,
    restarts_here=options.restarts_here,
    max_restarts=options.max_restarts,
    overrides={"host-b": Override(env={"FLAVOUR": "of host-b"})},
)


@protect
def main(replica: Replica) -> str:
    """A body that works until it is told to end."""
    begin(replica)
    while not is_over(replica):
        replica.wait(0.02)
    replica.wait(0)
    if options.slow_stop:
        time.sleep(options.slow_stop)
    note("end", replica)
    return "done"


@protect
async def main_async(replica: Replica) -> str:
    """The same as a coroutine."""
    begin(replica)
    while not is_over(replica):  # noqa: ASYNC110  (stopping is no asyncio event)
        await asyncio.sleep(0.02)
    note("end", replica)
    return "done"


if __name__ == "__main__":
    result = asyncio.run(main_async()) if options.use_async else main()
    sys.exit(0 if result == "done" else 3)
