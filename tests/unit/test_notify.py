"""What systemd is told, on a real socket, with the clock in hand."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from etcdreplica.guardian.notify import RETRY_S, Notifier


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The other end, at a path; the environment says where it is, and that the watchdog wants a sign every 30 s."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(tmp_path / "notify"))
        line.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        yield line


def heard(line: socket.socket) -> list[str]:
    """Return the lines of what has arrived."""
    lines: list[str] = []
    while True:
        try:
            lines += line.recv(4096).decode().split("\n")
        except BlockingIOError:
            return lines


def test_only_news_are_told(systemd: socket.socket) -> None:
    """Ready and stopping once, the status when it changes; what is started here finds nothing of it in its environment."""
    notifier = Notifier()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    notifier.tell(0.0, "waiting", is_ready=False, is_stopping=False, is_alive=False)
    assert heard(systemd) == ["STATUS=waiting"]
    notifier.tell(1.0, "holding", is_ready=True, is_stopping=False, is_alive=False)
    assert heard(systemd) == ["STATUS=holding", "READY=1"]
    notifier.tell(2.0, "holding", is_ready=True, is_stopping=False, is_alive=False)
    notifier.tell(3.0, "waiting", is_ready=False, is_stopping=False, is_alive=False)
    assert heard(systemd) == ["STATUS=waiting"]
    notifier.tell(4.0, "holding", is_ready=True, is_stopping=True, is_alive=False)
    assert heard(systemd) == ["STATUS=holding", "STOPPING=1"]


def test_signs_of_life_are_never_further_apart_than_asked(systemd: socket.socket) -> None:
    """However the calls fall, as long as the caller comes when it is due; and none of a dead WatchDog."""
    notifier, now, signs = Notifier(), 100.0, []
    while now < 200:
        notifier.tell(now, "holding", is_ready=True, is_stopping=False, is_alive=True)
        signs += [now] * heard(systemd).count("WATCHDOG=1")
        assert notifier.due is not None
        assert now < notifier.due
        now = min(notifier.due, now + 9.9)  # something else wakes it just before
    assert signs[0] == 100.0
    assert all(5 < later - earlier < 30 for earlier, later in pairwise(signs))
    notifier.tell(now + 100, "holding", is_ready=True, is_stopping=False, is_alive=False)
    assert heard(systemd) == []


def test_what_could_not_be_sent_is_sent_again(systemd: socket.socket, tmp_path: Path) -> None:
    """A socket that is full, or not there yet, loses nothing."""
    notifier = Notifier()
    (tmp_path / "notify").rename(tmp_path / "away")
    notifier.tell(0.0, "holding", is_ready=True, is_stopping=False, is_alive=True)
    assert notifier.due == RETRY_S
    (tmp_path / "away").rename(tmp_path / "notify")
    notifier.tell(1.0, "holding", is_ready=True, is_stopping=False, is_alive=True)
    assert heard(systemd) == ["STATUS=holding", "READY=1", "WATCHDOG=1"]


@pytest.mark.parametrize("pid", ["1", "none"])
def test_a_watchdog_of_another_process_is_not_ours(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch, pid: str) -> None:
    """No signs of life for it, and nothing is due."""
    monkeypatch.setenv("WATCHDOG_PID", pid)
    notifier = Notifier()
    notifier.tell(0.0, "holding", is_ready=True, is_stopping=False, is_alive=True)
    assert heard(systemd) == ["STATUS=holding", "READY=1"]
    assert notifier.due is None


@pytest.mark.parametrize("address", ["", "vsock:2:1234"])
def test_without_systemd_nothing_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As on every terminal."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier = Notifier()
    notifier.tell(0.0, "holding", is_ready=True, is_stopping=False, is_alive=True)
    assert notifier.due is None
