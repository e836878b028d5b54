"""An application that falls ill, in the copy that runs first, once a file exists; it removes the file first."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from pathlib import Path

from etcdreplica import Probe, Replica, protected

FOREVER_S = 3600.0
ILLNESSES = ("block_loop", "no_heartbeat", "close_port", "bad_http", "health_raises", "health_hangs", "none")
parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--style", default="warm")
parser.add_argument("--hang-timeout", type=float, default=1.0, help="0 for never")
parser.add_argument("--start-timeout", type=float, default=60.0)
parser.add_argument("--illness", choices=ILLNESSES, default="none")
parser.add_argument("--when", type=Path, required=True, help="fall ill once this exists, as primary")
parser.add_argument("--late-on", type=Path, help="a directory: a copy whose start finds a file there removes one and hangs")
parser.add_argument("--port", type=int, help="listen there")
parser.add_argument("--probe", help="where %%d stands for the port")
options = parser.parse_args()
falls_ill = threading.Event()


def is_ill(replica: Replica) -> bool:
    """Whether this copy is to fall ill now."""
    if replica.role == "primary":
        with contextlib.suppress(FileNotFoundError):
            options.when.unlink()
            falls_ill.set()
            return True
    return False


def never_end_to_compute() -> None:
    """Be what the evidence of a blocked loop shows."""
    time.sleep(FOREVER_S)


def health() -> None:
    """Answer the probe "call"."""
    if falls_ill.is_set():
        if options.illness == "health_hangs":
            time.sleep(FOREVER_S)
        raise RuntimeError("no database")


def serve(server: socket.socket) -> None:
    """Answer HTTP, well or badly, until the server is closed."""
    with contextlib.suppress(OSError):
        while True:
            client = server.accept()[0]
            with client, contextlib.suppress(OSError):
                client.recv(4096)
                client.sendall(b"HTTP/1.0 503 Ill\r\n\r\n" if falls_ill.is_set() else b"HTTP/1.0 200 OK\r\n\r\n")


def listen(replica: Replica) -> socket.socket:
    """Listen on the port. The hosts are one machine here, and what a killed copy held is free a moment after its end."""
    while True:
        try:
            return socket.create_server(("127.0.0.1", options.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or replica.wait(0.005):
                raise


def body(replica: Replica) -> None:
    """Do nothing but to be there."""
    server = None
    if options.port:
        server = listen(replica)
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    while not replica.stopping:
        if options.illness == "no_heartbeat":
            replica.heartbeat()
        if is_ill(replica):
            if options.illness == "no_heartbeat":
                replica.wait(FOREVER_S)
            elif options.illness == "close_port" and server is not None:
                server.shutdown(socket.SHUT_RDWR)
                server.close()
        replica.wait(0.02)


async def async_body(replica: Replica) -> None:
    """The same in an event loop."""
    while not replica.stopping:
        if is_ill(replica):
            never_end_to_compute()
        await asyncio.sleep(0.02)


def probe() -> list[Probe]:
    """Ask often, and take the second bad answer for an illness."""
    if not options.probe:
        return []
    target = options.probe.replace("%d", str(options.port))
    return [Probe(target, interval_s=0.1, timeout_s=1.0, failures=2, grace_s=5.0)]


if __name__ == "__main__":
    if options.late_on:
        for found in options.late_on.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.rename(options.late_on.parent / f"{found.name}.{os.getpid()}")
                time.sleep(FOREVER_S)
    protect = protected(
        name=options.name,
        style=options.style,
        hang_timeout=options.hang_timeout or None,
        start_timeout=options.start_timeout,
        stop_timeout=2.0,
        max_restarts=0,
        probes=probe(),
        health=health if options.probe == "call" else None,
    )
    if options.illness == "block_loop":
        asyncio.run(protect(async_body)())
    else:
        protect(body)()
