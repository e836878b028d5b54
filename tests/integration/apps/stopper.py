"""Stops a host for a short time, again and again, and prints as JSON how long it was silent each time.

A program of its own, so that it can have precedence: on a busy machine what stops a host would itself be stopped meanwhile.

    stopper.py ADDRESS SECONDS TIMES AT-MOST PID...

It ends after so many TIMES that were no longer than twice SECONDS, or after AT-MOST in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time

from etcdreplica.app.kernel import set_precedence
from etcdreplica.daemon.peers import PeerClient
from etcdreplica.guardian.wards import URGENT_NICE

PATIENCE_S = 60.0


def send(number: signal.Signals, pids: list[int]) -> None:
    """Signal them all, but for copies that have ended since, because the host was held to be lost."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def silence(client: PeerClient, address: str, seconds: float, pids: list[int]) -> float:
    """Stop it for so long; return how long it took until it answered again."""
    began = time.monotonic()
    send(signal.SIGSTOP, pids)
    try:
        await asyncio.sleep(seconds)
    finally:
        send(signal.SIGCONT, pids)
    assert await client.ping(address, PATIENCE_S) is not None
    return time.monotonic() - began


async def main(address: str, seconds: float, times: int, at_most: int, pids: list[int]) -> None:
    """Do so."""
    set_precedence(URGENT_NICE)
    client, found = PeerClient(), list[float]()
    try:
        assert await client.ping(address, PATIENCE_S) is not None
        while len(found) < at_most and sum(each <= 2 * seconds for each in found) < times:
            found.append(await silence(client, address, seconds, pids))
    finally:
        await client.close()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), list(map(int, sys.argv[5:]))))
