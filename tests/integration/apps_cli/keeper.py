"""An application that stores the states it is told to: it reads orders from a file, and writes to a journal what it did.

An order is a JSON object with a `count` and the `size` of random padding; the body makes a checkpoint of it, durable on the
whole degree, and again for each other order that it finds. `"return": true` ends the body. The journal has a line for each
state that was restored or stored.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from etcdreplica import Replica, protected

parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--orders", type=Path, required=True)
parser.add_argument("--journal", type=Path, required=True)
parser.add_argument("--style", default="warm")
parser.add_argument("--degree", type=int, default=2)
parser.add_argument("--max-restarts", type=int, default=0)
options = parser.parse_args()


def note(replica: Replica, what: str, state: dict[str, Any]) -> None:
    """Write a line."""
    line = {"what": what, "host": replica.host, "pid": os.getpid(), "epoch": replica.epoch, "count": state["count"]}
    with options.journal.open("a") as journal:
        journal.write(json.dumps({**line, "padding": len(state["padding"])}) + "\n")


@protected(name=options.name, style=options.style, degree=options.degree, max_restarts=options.max_restarts)
def main(replica: Replica) -> None:
    """Store what is ordered."""
    state = replica.restore(default={"count": 0, "padding": b""})
    note(replica, "restored", state)
    done = options.orders.read_text() if state["count"] else ""
    while not replica.wait(0.02):
        text = options.orders.read_text()
        if text != done:
            order, done = json.loads(text), text
            if order.get("return"):
                return
            state = {"count": order["count"], "padding": os.urandom(order["size"])}
            replica.checkpoint(state, wait=True)
            note(replica, "stored", state)


if __name__ == "__main__":
    main()
