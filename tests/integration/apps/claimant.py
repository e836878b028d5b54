"""An application that says, every few milliseconds in which it acts as primary, that it does; see testing.witness."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

from etcdreplica import Replica, protected
from etcdreplica.testing.witness import Testimony

STEP_S = 0.002
parser = argparse.ArgumentParser()
parser.add_argument("--name", default="claimant")
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--failsafe", action="store_true")
parser.add_argument("--claims", required=True)
parser.add_argument("--hang-timeout", type=float, default=10.0)
parser.add_argument("--async", dest="use_async", action="store_true")
parser.add_argument("--children", type=int, default=0, help="processes in sessions of their own that act with the primary")
parser.add_argument("--hold-gil", type=Path, help="hold the GIL, in the primary, once this file exists, after removing it")
options = parser.parse_args()

CHILD = """
import os, sys, time
os.setsid()
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
while True:
    os.write(fd, f"{sys.argv[2]} {sys.argv[3]} {sys.argv[4]} {time.clock_gettime(time.CLOCK_BOOTTIME):.6f}\\n".encode())
    time.sleep(0.002)
"""


class Claimant:
    """The body, step by step."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._testify = Testimony(options.claims)
        self._children = 0

    def step(self) -> None:
        """Act once."""
        replica = self.replica
        self._testify(replica)
        if replica.role == "primary" and self._children < options.children:
            self._children += 1
            who = [options.claims, replica.name, str(replica.epoch), str(os.getpid())]
            subprocess.Popen([sys.executable, "-S", "-c", CHILD, *who])
        if replica.role == "primary" and options.hold_gil and options.hold_gil.exists():
            options.hold_gil.unlink()
            ctypes.PyDLL(None).sleep(3600)


def body(replica: Replica) -> None:
    """Act until asked to stop."""
    claimant = Claimant(replica)
    while not replica.stopping:
        claimant.step()
        time.sleep(STEP_S)


async def async_body(replica: Replica) -> None:
    """Do the same in a loop."""
    claimant = Claimant(replica)
    while not replica.stopping:
        claimant.step()
        await asyncio.sleep(STEP_S)


protect = protected(
    name=options.name,
    style=options.style,
    degree=options.degree,
    hang_timeout=options.hang_timeout,
    stop_timeout=2.0,
    max_restarts=0,
    failsafe=options.failsafe,
)
if __name__ == "__main__":
    if options.use_async:
        asyncio.run(protect(async_body)())
    else:
        protect(body)()
