"""An application that runs until it is asked to stop; options make it misbehave."""

from __future__ import annotations

import argparse
import json
import os
import sys

from etcdreplica import Override, Replica, protected

parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--hosts", help="names with commas")
parser.add_argument("--overrides", type=json.loads, default={}, help="fields of Override by host, as JSON")
parser.add_argument("--stop-timeout", type=float, default=5.0)
parser.add_argument("--body", choices=["steady", "return", "raise", "stubborn"], default="steady")
parser.add_argument("--copies-exit", type=int, help="copies that a WatchDog starts exit with this code before the call")
options = parser.parse_args()


@protected(
    name=options.name,
    style=options.style,
    degree=options.degree,
    hosts=options.hosts.split(",") if options.hosts else None,
    overrides={host: Override(**fields) for host, fields in options.overrides.items()},
    stop_timeout=options.stop_timeout,
    max_restarts=0,  # a module of tests may kill the same one many times
)
def main(replica: Replica) -> None:
    """Do as the options say."""
    if options.body == "raise":
        raise ValueError("no luck today")
    if options.body == "return":
        return
    print(f"{replica.role} on {replica.host} since epoch {replica.epoch}", flush=True)
    replica.advertise(f"demo://{replica.host}")
    while not replica.wait(1.0) or options.body == "stubborn":
        replica.heartbeat()


if __name__ == "__main__":
    if options.copies_exit is not None and "ETCDREPLICA_INCARNATION" in os.environ:
        sys.exit(options.copies_exit)
    main()
