"""The checks of `doctor` that look at this host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from etcdreplica.app.kernel import Deadline, Notice, Page
from etcdreplica.app.protocol import checkpoint_socket
from etcdreplica.cli.certificates import expiry
from etcdreplica.cli.checks import Finding, Subject, failed, not_checked, ok, warning
from etcdreplica.cli.texts import age_text, size_text
from etcdreplica.daemon.addresses import split
from etcdreplica.guardian.tree import make_control_group
from etcdreplica.guardian.wards import URGENT_NICE

GOOD_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "xen", "s390-stp", "timebase")
OLDEST, NEWEST_TRIED = (3, 11), (3, 14)
SLOW_FLUSH_S, HOPELESS_FLUSH_S = 0.1, 1.0
LOW_BYTES, EMPTY_BYTES, LOW_SHARE = 1 << 30, 100 << 20, 0.05
SOON_S = 30 * 86400
_TIME_ERROR = 5  # adjtimex: the clock is not synchronized
_PR_GET_CHILD_SUBREAPER = 37


def python(_: Subject) -> Iterator[Finding]:
    """Its version."""
    text = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info[:2] < OLDEST:
        yield failed(text, "use Python 3.11 or later")
    elif sys.version_info[:2] > NEWEST_TRIED:
        yield warning(f"{text} is newer than what this version was tried with", "use Python 3.11 to 3.14")
    else:
        yield ok(text)


def kernel(_: Subject) -> Iterator[Finding]:
    """What deadlines, early death notices and handing over of states need."""
    libc = ctypes.CDLL(None, use_errno=True)

    def subreaper() -> None:
        if libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(ctypes.c_int()), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl failed")

    def notice() -> None:
        page = Page()
        Notice(page).release()
        page.close()

    advice = "use Linux 5.10 or later with glibc; a container's seccomp profile may be in the way"
    tries = {
        "timer_create on CLOCK_BOOTTIME": lambda: Deadline().close(),
        "pidfd_open": lambda: os.close(os.pidfd_open(os.getpid())),
        "memfd_create and sealing": lambda: Page().close(),
        "PR_SET_CHILD_SUBREAPER": subreaper,
        "robust futexes": notice,
    }
    missing = 0
    for what, attempt in tries.items():
        try:
            attempt()
        except (OSError, AttributeError) as error:
            missing += 1
            yield failed(f"{what}: {error}", advice)
    if not missing:
        yield ok(f"Linux {platform.release()} has {', '.join(tries)}")


def clock(_: Subject) -> Iterator[Finding]:
    """Deadlines count on CLOCK_BOOTTIME; the time of day is only shown to people."""
    path = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    if not path.exists():
        yield not_checked(f"there is no {path}")
    elif (source := path.read_text().strip()) in GOOD_CLOCKS:
        yield ok(f"the clock source is {source}")
    else:
        advice = "see in the kernel's log why it does not use the tsc (or the clock of its hypervisor)"
        yield warning(f"the clock source is {source}, which is slow to read or drifts", advice)
    timex = ctypes.create_string_buffer(512)  # struct timex; all 0 only asks
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    note = "no guarantee depends on it, only the times that people are shown"
    yield ok(f"the time of day is {'not ' if state == _TIME_ERROR else ''}synchronized; {note}")


def directories(subject: Subject) -> Iterator[Finding]:
    """Those in which a node must be able to write."""
    settings = subject.settings
    for what, directory in (("state", settings.state_dir), ("socket", settings.socket_path.parent)):
        there = next(path for path in (directory, *directory.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            user = f"user {os.geteuid()}"
            advice = f"let the user of the node write there, or set {'state-dir' if what == 'state' else 'socket'}"
            yield failed(f"{user} cannot write to the {what} directory {directory}: {error.strerror}", advice)
        else:
            yield ok(f"the {what} directory {directory} {'can be written' if there == directory else 'can be made'}")


def disk(subject: Subject) -> Iterator[Finding]:
    """Checkpoints wait for it: each one is flushed before it counts."""
    directory = subject.settings.state_dir
    there = next(path for path in (directory, *directory.parents) if path.exists())
    room = os.statvfs(there)
    free, share = room.f_bavail * room.f_frsize, room.f_bavail / max(1, room.f_blocks)
    text = f"{size_text(free)} are free in {there}"
    if free < EMPTY_BYTES or (room.f_files and not room.f_favail):
        yield failed(text, "make room: no checkpoint can be stored without")
    elif free < LOW_BYTES or share < LOW_SHARE:
        yield warning(text, "make room, or keep fewer checkpoints (checkpoint-keep)")
    else:
        yield ok(text)
    try:
        seconds = statistics.median(_flushes(there))
    except OSError as error:
        yield not_checked(f"nothing can be written there: {error.strerror}")
        return
    text = f"a small write takes {1000 * seconds:.1f} ms to be flushed"
    if seconds >= SLOW_FLUSH_S:
        verdict = failed if seconds >= HOPELESS_FLUSH_S else warning
        yield verdict(text, "every checkpoint that is waited for takes at least that long: use a faster disk for state-dir")
    else:
        yield ok(text)


def _flushes(directory: Path) -> Iterator[float]:
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(5):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            yield time.perf_counter() - began


def precedence(_: Subject) -> Iterator[Finding]:
    """Daemons that renew leases must not wait for what they watch."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), URGENT_NICE)  # this thread only, which ends now
    except PermissionError:
        advice = "run the node as root, or give it CAP_SYS_NICE or LimitNICE=-15: else a busy host may lose its leases"
        yield warning("daemons cannot take precedence over applications", advice)
    else:
        yield ok(f"daemons can run at nice {URGENT_NICE}")


def cgroups(_: Subject) -> Iterator[Finding]:
    """With one of its own, all that a copy has started is killed as one."""
    mark = f"doctor-{os.getpid()}"
    group = make_control_group(mark)
    if group is not None:
        Path(group).rmdir()
        yield ok("a copy gets a cgroup of its own")
    else:
        advice = "use cgroup version 2 (Linux 5.14 or later) and Delegate=yes in the unit of the node"
        yield warning("no cgroups can be made here: what a copy starts is found by searching /proc", advice)


def ports(subject: Subject) -> Iterator[Finding]:
    """Those it is to listen on must be free, or held by this node."""
    for name, listen in (
        ("peer-listen", subject.settings.peer_listen),
        ("checkpoint-listen", subject.settings.checkpoint_listen),
    ):
        host, port = split(listen)
        if not port:
            yield ok(f"{name} {listen} takes any port")
            continue
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.create_server((host, port), family=family):
                yield ok(f"{name} {listen} is free")
        except OSError as error:
            holder = _holder(port)
            if holder is not None and "etcdreplica" in holder:
                yield ok(f"{name} {listen} is held by a node that runs here")
            else:
                by = f", by {holder}" if holder else ""
                yield failed(f"{name} {listen} cannot be had: {error.strerror}{by}", f"end what holds it, or change {name}")


def _holder(port: int) -> str | None:
    """Return the command line of what listens on a port, as far as this user may know."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            rows = (line.split() for line in Path(table).read_text().splitlines()[1:])
            inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd) in {f"socket:[{inode}]" for inode in inodes} for fd in (process / "fd").iterdir()):  # noqa: PTH115
                return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return None


def sockets(subject: Subject) -> Iterator[Finding]:
    """Whether a node runs here now."""
    for what, path in (
        ("WatchDog", str(subject.settings.socket_path)),
        ("CheckpointServer", checkpoint_socket(str(subject.settings.socket_path))),
    ):
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(2)
            try:
                line.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                yield not_checked(f"no {what} runs here now ({path})")
            except OSError as error:
                yield warning(f"{path}: {error.strerror or error}", "may this user use it, and does the process there live?")
            else:
                yield ok(f"a {what} answers at {path}")


def certificates(subject: Subject) -> Iterator[Finding]:
    """Those of etcd's clients and of the hosts: for how long they are valid. That they fit together is a rule of settings."""
    etcd, peer = subject.settings.etcd, subject.settings.peer_tls
    sets = [files for files in (etcd, peer) if files.ca_file or files.cert_file]
    if not sets:
        yield ok("none is used: neither etcd nor other hosts are reached by TLS")
    for files in sets:
        for path in filter(None, (files.ca_file, files.cert_file)):
            yield _lasting(Path(path))


def _lasting(path: Path) -> Finding:
    try:
        left_s = expiry(path.read_text()) - time.time()
    except (OSError, ValueError, IndexError, ssl.SSLError) as error:
        return not_checked(f"{path} cannot be read: {error}")
    advice = "replace it, then send the node SIGHUP"
    if left_s <= 0:
        return failed(f"{path} expired {age_text(-left_s)} ago", advice)
    text = f"{path} is valid for {age_text(left_s)}"
    return warning(text, advice) if left_s < SOON_S else ok(text)


CHECKS = (python, kernel, clock, precedence, cgroups, directories, disk, ports, sockets, certificates)
