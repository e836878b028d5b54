"""The application of the demo and the bench: a little server that tells who serves, on a port it advertises.

It counts its answers. Under cold and warm the count is its state: a client is answered once the count is durable.

Run it as a program: `python sample.py --style warm --degree 2`. With `--report` it also sends the moment at which a body
began as primary to a Unix datagram socket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket

from etcdreplica import Replica, Role, protected
from etcdreplica.clock import boottime
from etcdreplica.errors import NotDurableError

parser = argparse.ArgumentParser()
parser.add_argument("--name", default="sample")
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--failover", default="safe")
parser.add_argument("--report")
parser.add_argument("--hang-timeout", type=float, default=10.0)
parser.add_argument("--resident-mib", type=int, default=0, help="memory that the primary fills")
options = parser.parse_args()


def report(replica: Replica, at: float) -> None:
    """Tell whoever measures that this copy is primary and its body runs."""
    if options.report:
        message = {"host": replica.host, "epoch": replica.epoch, "pid": os.getpid(), "at": at}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
            out.sendto(json.dumps(message).encode(), options.report)


# it is killed again and again by those that measure, so it is never parked
@protected(
    style=options.style,
    degree=options.degree,
    name=options.name,
    stop_timeout=5.0,
    hang_timeout=options.hang_timeout,
    max_restarts=0,
    failover=options.failover,
)
def main(replica: Replica) -> None:
    """Answer every connection with who this is."""
    at = boottime()
    memory = bytearray(b"x") * (options.resident_mib << 20) if replica.role is Role.PRIMARY else b""
    if replica.role is Role.PRIMARY:
        report(replica, at)

    @replica.on_role_change
    def changed(role: Role, epoch: int) -> None:
        report(replica, boottime())

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        replica.advertise("{}:{}".format(*server.getsockname()))
        state = {"answered": 0} if options.style == "hot" else replica.restore({"answered": 0})
        while not replica.stopping:
            replica.heartbeat()
            with contextlib.suppress(TimeoutError):
                client, _ = server.accept()
                with client, contextlib.suppress(NotDurableError):  # then the client hears nothing, and asks again
                    state["answered"] += 1
                    if options.style != "hot":
                        replica.checkpoint(state, wait=True, timeout=5.0)
                    who = {"host": replica.host, "role": replica.role, "epoch": replica.epoch, "bytes": len(memory), **state}
                    client.sendall(json.dumps(who).encode())


if __name__ == "__main__":
    main()
