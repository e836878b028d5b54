"""A replicated object without anything in it: it keeps an in-sync set, as a file tells it, and says what it is told.

The file has names of hosts: the primary has those copies in the set that run there and serve. Each line of the journal is one
message of the WatchDog, with the host and the time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from etcdreplica.app.link import Link
from etcdreplica.app.program import capture
from etcdreplica.app.protocol import INCARNATION_ENV, VERSION, default_socket
from etcdreplica.clock import boottime
from etcdreplica.errors import NoWatchDogError

parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--degree", type=int, default=3)
parser.add_argument("--journal", type=Path, required=True)
parser.add_argument("--members", type=Path, required=True)
parser.add_argument("--stale", action="store_true", help="each primary first tries to replace a set that never was")
options = parser.parse_args()

STEP_S = 0.02


class Copy:
    """One copy."""

    def __init__(self) -> None:
        self.link = Link(default_socket())
        self.host, self.role, self.incarnation = "", "", int(os.environ.get(INCARNATION_ENV, 0))
        self.questions = count(1)
        self.waiting = 0  # for the answer to this question
        self.copies: list[list[Any]] = []
        self.set: tuple[int, list[list[Any]]] | None = None  # revision and members
        self.stale = options.stale

    def register(self) -> None:
        """Register it, unless this is one of its copies already."""
        settings = {"object": True, "style": "hot", "degree": options.degree, "hang_timeout_s": 0, "max_restarts": 0}
        if self.incarnation:
            self.link.send("hello", version=VERSION, app=options.name, incarnation=self.incarnation)
        else:
            registration = {"name": options.name, "program": capture(), "stop_timeout_s": 1.0, **settings}
            self.link.send("hello", version=VERSION, adopt=True, registration=registration)

    def run(self) -> None:
        """Serve for ever."""
        self.register()
        while True:
            try:
                message = self.link.receive(STEP_S)
            except NoWatchDogError:
                self.reconnect()
                continue
            if message is not None:
                self.take(message)
            self.keep_set()

    def reconnect(self) -> None:
        """Find the next WatchDog."""
        self.waiting, self.set = 0, None
        try:
            self.link.reconnect("hello", version=VERSION, app=options.name, incarnation=self.incarnation)
        except NoWatchDogError:
            time.sleep(STEP_S)

    def take(self, message: Mapping[str, Any]) -> None:
        """Deal with one message."""
        kind = message["type"]
        if kind == "welcome":
            self.host, self.incarnation = message["host"], message["incarnation"]
            self.link.send("running", at=boottime())
            self.link.send("serves", endpoint=f"{message['address']}:{os.getpid()}")
        if kind in ("welcome", "role"):
            self.role = message["role"]
        elif kind == "replicas":
            self.copies = message["replicas"]
        elif kind == "members":
            self.waiting = 0
            self.set = (message["revision"], message["members"]) if "error" not in message else None
        elif kind == "changed":
            self.waiting, self.set = 0, None
        elif kind in ("stop", "error"):
            sys.exit(0)
        self.note(message)

    def keep_set(self) -> None:
        """Ask for the set, or have it changed, if that is due."""
        if self.waiting or self.role != "primary":
            return
        if self.set is None:
            self.ask("members")
            return
        wanted = options.members.read_text().split()
        members = [[h, i] for h, i, _, _, serves in self.copies if h in wanted and serves]
        if [self.host, self.incarnation] in members and members != self.set[1]:
            revision, self.stale = 1 if self.stale else self.set[0], False
            self.ask("change", revision=revision, members=members)

    def ask(self, kind: str, **fields: Any) -> None:
        """Ask something, and wait for the answer."""
        self.waiting = next(self.questions)
        self.link.send(kind, question=self.waiting, **fields)

    def note(self, message: Mapping[str, Any]) -> None:
        """Append one line; small appends to one file are atomic."""
        line = {**message, "on": self.host, "pid": os.getpid(), "at": boottime()}
        fd = os.open(options.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(fd, json.dumps(line).encode() + b"\n")
        os.close(fd)


if __name__ == "__main__":
    Copy().run()
