"""An application that notes when it may act: `python acting.py NAME FILE`. Each line has who, and since or until when."""

from __future__ import annotations

import json
import os
import sys

from etcdreplica import Replica, protected
from etcdreplica.clock import boottime

name, path = sys.argv[1:]


def note(replica: Replica, what: str) -> None:
    """Append one line; small appends to one file are atomic."""
    line = {"app": name, "what": what, "host": replica.host, "epoch": replica.epoch, "at": boottime()}
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, json.dumps(line).encode() + b"\n")
    os.close(fd)


@protected(name=name, style="warm", degree=2, max_restarts=0)
def main(replica: Replica) -> None:
    """Act until asked to end."""
    note(replica, "begin")
    replica.wait()
    note(replica, "end")


if __name__ == "__main__":
    main()
