"""What systemd is told, where it started us: sd_notify(3), one datagram for each change.

Only the guardian speaks, from its own loop, and nothing here can hold that up. The variables that systemd set are taken out of
the environment, because a program that is started here must not speak for this unit.
"""

from __future__ import annotations

import contextlib
import os
import socket

RETRY_S = 1.0
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Tells what has changed since it was last told. `due`: when it is to be called again, on the caller's clock."""

    def __init__(self) -> None:
        address, usec, pid = (os.environ.pop(name, "") for name in _VARIABLES)
        self.due: float | None = None
        self._every_s = int(usec) / 3e6 if usec.isdigit() and pid in ("", str(os.getpid())) else None
        self._alive_at = 0.0
        self._told: set[str] = set()
        self._address = "\0" + address[1:] if address.startswith("@") else address if address.startswith("/") else None

    def tell(self, now: float, status: str, *, is_ready: bool, is_stopping: bool, is_alive: bool) -> None:
        """Tell the state of the unit, and from time to time, while `is_alive`, that it lives."""
        if self._address is None:
            return
        lines = [f"STATUS={status}", *(["READY=1"] if is_ready else []), *(["STOPPING=1"] if is_stopping else [])]
        news = [line for line in lines if line not in self._told]
        self.due = None
        if self._every_s is not None:
            if is_alive and now >= self._alive_at:
                news.append("WATCHDOG=1")
            self.due = now + self._every_s
        if news and not self._send("\n".join(news)):
            self.due = now + RETRY_S
            return
        if "WATCHDOG=1" in news:
            self._alive_at = now + (self._every_s or 0)
        self._told = {line for line in self._told if not line.startswith("STATUS=")} | set(lines)

    def _send(self, text: str) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as line:
            line.sendto(text.encode(errors="replace"), self._address or "")
            return True
        return False
