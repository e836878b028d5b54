"""The one clock all decisions use.

CLOCK_BOOTTIME never jumps, counts while the machine sleeps, and is shared by all processes of a host. Readings of
different hosts are never compared: in records they serve people, and tools that know that all hosts are one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds; see `boottime`."""


def boottime() -> float:
    """Seconds since this machine booted, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
