"""What a WatchDog uses of its operating system, beside its guardian. A simulation is made by giving it another one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from etcdreplica.daemon.app_server import AppServer, OnHello
from etcdreplica.daemon.peers import PeerServer
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.state_file import StateFile
from etcdreplica.daemon.status_page import StatusPage


@frozen
class Machine:
    """The real one."""

    pid: Callable[[], int] = os.getpid
    app_server: Callable[[Path, OnHello], AppServer] = AppServer
    peer_server: Callable[[NodeSettings, Callable[[], int], Callable[[str, int], bool]], PeerServer] = PeerServer
    state_file: Callable[[Path], StateFile] = StateFile
    process: type[ReplicaProcess] = ReplicaProcess
    status_page: Callable[[int, int], StatusPage] = StatusPage
