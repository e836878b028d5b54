"""The program of a copy in `bench scale`: it says hello to its WatchDog, hands the connection to the stand-in, and sleeps.

`python -S stand_in_start.py NAME`. The WatchDog sees the connection of a process that it started, as it must be, but what
speaks on it is one process for all copies of the host; this one becomes as small as a process can be.
"""

import json
import os
import socket
import struct
import sys

watchdog = os.environ["ETCDREPLICA_SOCKET"]
hello = {"type": "hello", "version": 1, "app": sys.argv[1], "incarnation": int(os.environ["ETCDREPLICA_INCARNATION"])}
body = json.dumps(hello).encode()
with socket.socket(socket.AF_UNIX) as line, socket.socket(socket.AF_UNIX) as stand_in:
    line.connect(watchdog)
    line.sendall(struct.pack(">I", len(body)) + body)
    stand_in.connect(f"{watchdog}.stand-in")
    socket.send_fds(stand_in, [sys.argv[1].encode()], [line.fileno()])
    stand_in.recv(1)  # it has it
os.execvp("sleep", ["sleep", "infinity"])  # noqa: S606
