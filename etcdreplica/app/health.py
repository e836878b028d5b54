"""The application's answer to "call" probes: its `health` function, called again and again in a thread of its own.

Here it is only called and told what came of it. The verdict is the WatchDog's (`core.probing.call_verdict`), because a
call that never returns can only be seen from outside: `answered_at` then stands still.

Limits: a function that blocks without releasing the GIL stops the whole process; the WatchDog sees that by its pulse.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from etcdreplica.clock import boottime
from etcdreplica.words import PROBE_FAILURES, PROBE_GRACE_S, PROBE_INTERVAL_S, PROBE_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from etcdreplica.clock import Clock

log = logging.getLogger(__name__)

REASON_LENGTH = 500


class HealthCheck:
    """Calls `function` every `interval_s` seconds from `start` to `stop`, never twice at once.

    A bad answer is one that raises anything, returns False, or takes longer than `timeout_s`. `report` gets the number of
    bad answers in a row and the last one's reason after each of them, and (0, "") after the first good one that follows.
    Bad answers to questions of the first `grace_s` seconds do not count until there was a good one. It is called in the
    thread of the calls. After `failures` bad answers the traceback is logged, since this copy will not live to tell more.

    `answered_at` is when the last call returned, on CLOCK_BOOTTIME, or 0.0 before the first did.
    """

    def __init__(
        self,
        function: Callable[[], object],
        interval_s: float,
        timeout_s: float,
        failures: int,
        grace_s: float,
        report: Callable[[int, str], None],
        clock: Clock = boottime,
    ) -> None:
        self.answered_at = 0.0
        self._function = function
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._failures = failures
        self._grace_s = grace_s
        self._report = report
        self._clock = clock
        self._bad = 0
        self._counting_from = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="etcdreplica-health", daemon=True)

    @classmethod
    def of(cls, function: Callable[[], object], probe: Mapping[str, Any], report: Callable[[int, str], None]) -> HealthCheck:
        """Make one of the fields of a "call" probe as the decorator has them; what is missing has its default."""
        return cls(
            function,
            interval_s=probe.get("interval_s", PROBE_INTERVAL_S),
            timeout_s=probe.get("timeout_s", PROBE_TIMEOUT_S),
            failures=probe.get("failures", PROBE_FAILURES),
            grace_s=probe.get("grace_s", PROBE_GRACE_S),
            report=report,
        )

    def start(self) -> None:
        """Begin; the first call comes after one interval."""
        self._counting_from = self._clock() + self._grace_s
        self._thread.start()

    def stop(self) -> None:
        """Call and report no more. A call under way is not waited for: it may never return."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            asked_at = self._clock()
            error, reason = self._ask()
            self.answered_at = self._clock()
            took_s = self.answered_at - asked_at
            if not reason and took_s > self._timeout_s:
                reason = f"it took {took_s:.3g} s, longer than {self._timeout_s:g} s"
            if not self._stopped.is_set():
                self._take(asked_at, error, reason)

    def _ask(self) -> tuple[BaseException | None, str]:
        try:
            answer = self._function()
        except BaseException as error:  # SystemExit as well: it ends this thread at most, which then answers nothing
            return error, _in_words(error)
        if hasattr(answer, "__await__"):
            return None, "it returned something to await: health must be an ordinary function"
        return None, "it returned False" if answer is False else ""

    def _take(self, asked_at: float, error: BaseException | None, reason: str) -> None:
        """Count an answer, and tell what is news."""
        before, self._bad = self._bad, self._bad + 1 if reason else 0
        if reason and asked_at < self._counting_from:
            self._bad = 0
            return
        if not reason:
            self._counting_from = 0.0  # the grace ends with the first good answer
        if self._bad == self._failures:
            log.error("health failed %d times in a row: %s", self._bad, reason, exc_info=error)
        if reason or before:
            try:
                self._report(self._bad, reason)
            except Exception as failure:  # the connection has gone: whoever reads it knows
                log.debug("health could not be reported: %s", failure)


def _in_words(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}"[:REASON_LENGTH] if text else type(error).__name__
