"""Which hosts do not answer: the mind of one watcher, after SWIM and its extension Lifeguard; time is an argument.

A host is probed directly. When a probe has no answer in time it is *suspect*, and helpers on other hosts are asked to
reach it. It is *lost* only when all of this holds: several probes in a row failed, it was silent for a patience, a helper
that lives says that it cannot reach it either, and not more than half of all hosts are silent. One answer, to anybody,
clears it: an answer proves that the host lived when the question was sent. A host that refuses the connection lives, but its
WatchDog does not: that is being restarted most of the time, so the patience is longer then.

What keeps a busy host from being lost: the patience grows by a multiple of the slowest answer of late, of that host and
of our own wake-ups; and time in which we ourselves were late counts against nobody. What keeps a wrong network from doing
harm: a host that has never answered is never suspected.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping

from attrs import Factory, define, frozen

from etcdreplica.errors import ConfigurationError

HALF = 2  # when more than one in so many is silent, it is rather our own link that is broken


class Standing(enum.StrEnum):
    """What the watcher thinks of a host."""

    UNKNOWN = "unknown"  # it has never answered
    ALIVE = "alive"
    SUSPECT = "suspect"
    LOST = "lost"


TRANSITIONS: Mapping[Standing, frozenset[Standing]] = {
    Standing.UNKNOWN: frozenset({Standing.ALIVE}),
    Standing.ALIVE: frozenset({Standing.SUSPECT}),
    Standing.SUSPECT: frozenset({Standing.ALIVE, Standing.LOST}),
    Standing.LOST: frozenset({Standing.ALIVE}),
}


@frozen
class SuspicionSettings:
    """Seconds throughout. Raises ConfigurationError for timings that do not fit together."""

    interval_s: float = 0.05  # between two probes of one host
    timeout_s: float = 0.1  # a probe that has no answer by then has failed
    confirm_s: float = 0.25  # least silence of a host that is lost
    failures: int = 3  # least number of failed probes in a row
    helpers: int = 2  # asked at once
    patience: float = 4.0  # how much longer than the slowest answer of late a silence must be
    half_life_s: float = 10.0  # after which a slow answer counts half
    tick_s: float = 0.02  # how often the detector wants to be asked
    forget_s: float = 2.0  # a probe is given up after this
    restart_s: float = 1.5  # least silence of a host that refuses connections
    probes_per_s: float = 400.0  # of all hosts together: with many hosts the interval grows

    def __attrs_post_init__(self) -> None:
        if not 0 < self.tick_s <= self.interval_s <= self.timeout_s:
            raise ConfigurationError("probe timings must keep: 0 < tick <= interval <= timeout")
        if not (self.failures - 1) * self.interval_s + self.timeout_s <= self.confirm_s <= self.forget_s:
            raise ConfigurationError("probe timings must keep: (failures - 1) * interval + timeout <= confirm <= forget")
        if self.helpers < 1 or self.failures < 1 or self.patience < 1 or self.probes_per_s <= 0:
            raise ConfigurationError("probes need at least one helper and one failure, a patience of 1 and a positive rate")


@frozen
class Probe:
    """Send a probe to a host now."""

    host: str
    number: int


@frozen
class Ask:
    """Ask a helper now to reach a host within so many seconds."""

    host: str
    helper: str
    number: int
    within_s: float


@frozen
class Suspected:
    """A probe of a host failed: find out whether it refuses connections."""

    host: str
    session: int


@frozen
class Refuted:
    """A host that was suspect or lost has answered, to us or to a helper."""

    host: str
    by: str
    was: Standing
    silence_s: float


@frozen
class Confirmed:
    """A host is lost: silent for `silence_s` seconds to `probes` probes, and `helpers` cannot reach it either."""

    host: str
    session: int
    silence_s: float
    probes: int
    helpers: tuple[str, ...]


Action = Probe | Ask | Suspected | Refuted | Confirmed


@frozen
class Peak:
    """The largest value of late: it halves every half-life, so that one slow answer is remembered, but not for ever."""

    value: float = 0.0
    at: float = 0.0

    def seen(self, value: float, now: float, half_life_s: float) -> Peak:
        """Return the peak with one more value."""
        return Peak(max(value, self.now(now, half_life_s)), now)

    def now(self, now: float, half_life_s: float) -> float:
        """Return what it still counts for."""
        return self.value * math.pow(0.5, max(0.0, now - self.at) / half_life_s)


@define
class _Host:
    """What is known of one stay of a host."""

    session: int
    next_at: float
    standing: Standing = Standing.UNKNOWN
    slow: Peak = Peak()
    pending: dict[int, float] = Factory(dict)  # probes under way: when each was sent
    refuses: bool = False  # since it is silent, it has refused a connection
    silent_since: float | None = None  # when the oldest probe after the last sign of life was sent
    given_up: int = 0  # failed probes that are no longer under way
    lived: int = 0  # the newest question that was answered
    asks: dict[int, tuple[str, float, float]] = Factory(dict)  # helper, when asked, when it should have answered
    denials: dict[str, int] = Factory(dict)  # by helper: the number of its last question
    ask_at: float = 0.0
    rounds: int = 0

    def become(self, standing: Standing) -> None:
        if standing not in TRANSITIONS[self.standing]:
            raise AssertionError(f"a host that is {self.standing} cannot become {standing}")
        self.standing = standing

    def live(self, number: int) -> None:
        """It answered question `number`: all that was asked before is answered by that."""
        self.lived = number
        self.pending = {n: at for n, at in self.pending.items() if n > number}
        self.silent_since = min(self.pending.values(), default=None)
        self.given_up = 0
        self.refuses = False
        self.asks, self.denials = {}, {}

    def excuse(self, late_s: float) -> None:
        """Forget a time in which we could not have heard an answer."""
        self.pending = {n: at + late_s for n, at in self.pending.items()}
        self.asks = {n: (helper, at + late_s, due + late_s) for n, (helper, at, due) in self.asks.items()}
        self.silent_since = self.silent_since + late_s if self.silent_since is not None else None


class Detector:
    """One watcher on host `me`. Call `tick` every `tick_s` seconds while `is_watching`, and do what it returns."""

    def __init__(self, me: str, settings: SuspicionSettings | None = None) -> None:
        self.settings = settings or SuspicionSettings()
        self._me = me
        self._hosts: dict[str, _Host] = {}
        self._everyone: frozenset[str] = frozenset()
        self._mute: set[str] = set()  # helpers that did not answer when last asked
        self._own = Peak()  # our own lateness
        self._due: float | None = None
        self._number = 0

    @property
    def is_watching(self) -> bool:
        """Whether there is any host to probe."""
        return bool(self._hosts)

    def standing(self, host: str) -> Standing | None:
        """Return what is thought of a host; None for one that is not watched."""
        return self._hosts[host].standing if host in self._hosts else None

    def watch(self, now: float, sessions: Mapping[str, int], everyone: frozenset[str]) -> None:
        """Watch these stays of hosts from now on; `everyone` are all hosts that are up. What was known of a stay is kept."""
        self._everyone = everyone
        self._mute &= everyone
        kept = {host: seen for host, seen in self._hosts.items() if sessions.get(host) == seen.session}
        gap_s = self._interval_s(len(sessions)) / max(1, len(sessions))
        self._hosts = {
            host: kept.get(host) or _Host(session, now + place * gap_s)
            for place, (host, session) in enumerate(sessions.items())
        }
        if not self._hosts:
            self._due = None

    def tick(self, now: float) -> list[Action]:
        """Let time pass, and return what to do now."""
        settings, late_s = self.settings, 0.0
        if self._due is not None:
            late_s = max(0.0, now - self._due)
            self._own = self._own.seen(late_s, now, settings.half_life_s)
        self._due = now + settings.tick_s
        actions: list[Action] = []
        for name, host in self._hosts.items():
            host.excuse(late_s)
            self._expire(host, now)
            actions += self._probe(name, host, now)
        for name, host in self._hosts.items():
            actions += self._judge(name, host, now)
        return actions

    def answered(self, now: float, host: str, session: int, number: int) -> list[Action]:
        """A probe was answered by whoever holds `session` there."""
        seen = self._hosts.get(host)
        if seen is None or seen.session != session:
            return []
        if number < seen.lived:
            return []  # it says nothing about the time since
        if number in seen.pending:
            seen.slow = seen.slow.seen(now - seen.pending[number], now, self.settings.half_life_s)
        return self._live(now, host, seen, number, self._me)

    def refused(self, host: str, session: int) -> None:
        """A connection to a suspect was refused: nobody listens where its WatchDog should."""
        seen = self._hosts.get(host)
        if seen is not None and seen.session == session and seen.standing is Standing.SUSPECT:
            seen.refuses = True

    def helped(self, now: float, host: str, helper: str, number: int, session: int | None) -> list[Action]:
        """A helper answered: it reached `session` on that host, or nobody (None)."""
        self._mute.discard(helper)
        seen = self._hosts.get(host)
        if seen is None or seen.asks.pop(number, None) is None:
            return []  # answered otherwise meanwhile, or too late to say anything
        if session == seen.session:
            return self._live(now, host, seen, number, helper)
        seen.denials[helper] = number
        return []

    def _live(self, now: float, name: str, host: _Host, number: int, by: str) -> list[Action]:
        was, since = host.standing, host.silent_since
        self._mute.discard(name)
        host.live(number)
        if was is Standing.ALIVE:
            return []
        host.become(Standing.ALIVE)
        return [] if was is Standing.UNKNOWN else [Refuted(name, by, was, now - since if since is not None else 0.0)]

    def _interval_s(self, hosts: int) -> float:
        return max(self.settings.interval_s, hosts / self.settings.probes_per_s)

    def _slow_s(self, host: _Host, now: float) -> float:
        half_life_s = self.settings.half_life_s
        return max(host.slow.now(now, half_life_s), self._own.now(now, half_life_s))

    def _timeout_s(self, host: _Host, now: float) -> float:
        return self.settings.timeout_s + self._slow_s(host, now)

    def _patience_s(self, host: _Host, now: float) -> float:
        settings = self.settings
        least = (settings.failures - 1) * self._interval_s(len(self._hosts)) + settings.timeout_s
        least = max(settings.restart_s if host.refuses else settings.confirm_s, least)
        return least + settings.patience * self._slow_s(host, now)

    def _expire(self, host: _Host, now: float) -> None:
        for number in [n for n, at in host.pending.items() if now - at >= self.settings.forget_s]:
            del host.pending[number]
            host.given_up += 1
        for number in [n for n, (_, _, due) in host.asks.items() if now >= due]:
            self._mute.add(host.asks.pop(number)[0])

    def _probe(self, name: str, host: _Host, now: float) -> Iterator[Action]:
        if now < host.next_at:
            return
        interval_s = self._interval_s(len(self._hosts))
        host.next_at = max(host.next_at + interval_s, now)  # in step, but never two at once to catch up
        number = self._next_number()
        host.pending[number] = now
        if host.silent_since is None:
            host.silent_since = now
        yield Probe(name, number)

    def _judge(self, name: str, host: _Host, now: float) -> Iterator[Action]:
        if host.standing in (Standing.UNKNOWN, Standing.LOST) or host.silent_since is None:
            return
        failed = self._failed(host, now)
        if not failed:
            return
        if host.standing is Standing.ALIVE:
            host.become(Standing.SUSPECT)
            host.ask_at = now
            yield Suspected(name, host.session)
        if now >= host.ask_at:
            yield from self._ask(name, host, now)
        silence_s = now - host.silent_since
        if failed >= self.settings.failures and silence_s >= self._patience_s(host, now) and self._may_confirm(name, host):
            host.become(Standing.LOST)
            yield Confirmed(name, host.session, silence_s, failed, tuple(sorted(host.denials)))

    def _failed(self, host: _Host, now: float) -> int:
        timeout_s = self._timeout_s(host, now)
        return host.given_up + sum(now - at >= timeout_s for at in host.pending.values())

    def _ask(self, name: str, host: _Host, now: float) -> Iterator[Action]:
        within_s = self._timeout_s(host, now)
        host.ask_at = now + within_s
        able = sorted(self._others(name) - self._silent()) or sorted({self._me} & self._everyone - {name})
        first = host.rounds % len(able) if able else 0
        host.rounds += 1
        for helper in (able[first:] + able[:first])[: self.settings.helpers]:
            number = self._next_number()
            host.asks[number] = (helper, now, now + 2 * within_s)
            yield Ask(name, helper, number, within_s)

    def _others(self, name: str) -> frozenset[str]:
        """Hosts whose word about a host is independent of ours."""
        return self._everyone - {name, self._me}

    def _silent(self) -> set[str]:
        return {name for name, host in self._hosts.items() if host.standing in (Standing.SUSPECT, Standing.LOST)}

    def _may_confirm(self, name: str, host: _Host) -> bool:
        others = self._others(name)
        if not host.denials.keys() & (others or {self._me}):
            return False  # nobody who lives has said that it cannot reach it either
        return HALF * len(self._silent() | self._mute) <= len(self._everyone)

    def _next_number(self) -> int:
        self._number += 1
        return self._number
