"""Where every thread of this process stands, written on a signal, also while one of them holds the GIL."""

from __future__ import annotations

import faulthandler
import os
import signal

STACKS_NAME = "etcdreplica-stacks"


class Stacks:
    """Shared memory `fd` into which `signal` makes the interpreter write the stacks; `signal` 0: not possible here."""

    def __init__(self) -> None:
        self.fd = os.memfd_create(STACKS_NAME, os.MFD_CLOEXEC)
        self.signal = _unused_signal()
        if self.signal:
            faulthandler.register(self.signal, file=self.fd, all_threads=True)

    def close(self) -> None:
        """Give both back."""
        if self.signal:
            faulthandler.unregister(self.signal)
        os.close(self.fd)


def _unused_signal() -> int:
    """Return a realtime signal that the program has not taken."""
    for number in range(signal.SIGRTMAX - 2, signal.SIGRTMIN, -1):
        if signal.getsignal(number) is signal.SIG_DFL:
            return number
    return 0
