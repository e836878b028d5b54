"""A network of hosts in which one detector watches, small enough to read; time is a number that only `run` moves."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable

from etcdreplica.core.suspicion import Action, Ask, Confirmed, Detector, Probe, Refuted, Suspected, SuspicionSettings

ME = "a"
SESSION = 7
Delay = Callable[[], float | None]  # seconds until an answer arrives; None: never


def after(seconds: float | None) -> Delay:
    """Answer always after so many seconds."""
    return lambda: seconds


class Net:
    """Hosts that answer, or not. `direct` and `via` say how each host answers the watcher, and its helpers."""

    def __init__(self, *hosts: str, watched: Iterable[str] | None = None, settings: SuspicionSettings | None = None) -> None:
        self.now = 100.0
        self.detector = Detector(ME, settings)
        self.direct: dict[str, Delay] = dict.fromkeys(hosts, after(0.003))
        self.via: dict[str, Delay] = dict.fromkeys(hosts, after(0.006))  # how it is reached by helpers
        self.helping: dict[str, bool] = dict.fromkeys(hosts, True)
        self.session: dict[str, int] = dict.fromkeys(hosts, SESSION)  # what answers there
        self.actions: list[tuple[float, Action]] = []
        self._events: list[tuple[float, int, Callable[[], list[Action]]]] = []
        self._order = itertools.count()
        self._tick_at = self.now
        self.watch(hosts if watched is None else watched)

    def watch(self, watched: Iterable[str]) -> None:
        """Watch the stays that these hosts have now."""
        self.detector.watch(self.now, {host: self.session[host] for host in watched}, frozenset(self.direct))

    def kill(self, *hosts: str) -> None:
        """Let hosts answer nobody any more."""
        for host in hosts:
            self.direct[host] = self.via[host] = after(None)
            self.helping[host] = False

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while True:
            at = min(self._tick_at, self._events[0][0] if self._events else end, end)
            self.now = max(self.now, at)
            if self._tick_at <= at < end:
                self._do(self.detector.tick(self.now))
                self._tick_at = self.now + self.detector.settings.tick_s
            elif self._events and self._events[0][0] <= at < end:
                self._do(heapq.heappop(self._events)[2]())
            else:
                return

    def stall(self, seconds: float) -> None:
        """Stop the watcher: what arrives meanwhile is read only after the tick that was due."""
        self.now += seconds
        self._do(self.detector.tick(self.now))
        self._tick_at = self.now + self.detector.settings.tick_s

    def of(self, kind: type[Action]) -> list[tuple[float, Action]]:
        """Return the actions of a kind, and when they were taken."""
        return [(at, action) for at, action in self.actions if isinstance(action, kind)]

    def lost(self) -> list[str]:
        """The hosts that were confirmed lost."""
        return [action.host for _, action in self.of(Confirmed)]

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            self.actions.append((self.now, action))
            if isinstance(action, Probe):
                self._probe(action)
            elif isinstance(action, Ask):
                self._ask(action)
            else:
                assert isinstance(action, Suspected | Refuted | Confirmed)

    def _probe(self, probe: Probe) -> None:
        delay = self.direct[probe.host]()
        if delay is not None:
            session = self.session[probe.host]
            self._later(delay, lambda: self.detector.answered(self.now, probe.host, session, probe.number))

    def _ask(self, ask: Ask) -> None:
        if not self.helping[ask.helper]:
            return
        reached = self.via[ask.host]()
        found = self.session[ask.host] if reached is not None and reached <= ask.within_s else None
        delay = ask.within_s if reached is None or found is None else reached
        self._later(delay + 0.003, lambda: self.detector.helped(self.now, ask.host, ask.helper, ask.number, found))

    def _later(self, delay: float, call: Callable[[], list[Action]]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), call))
