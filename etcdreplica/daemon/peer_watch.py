"""Watches, over gRPC, the hosts that hold a seat of an application with failover="fast", for whoever leads.

The mind is `core.suspicion.Detector`; here are its hands: pings, questions to helpers, and the hosts and seats it is
about, which come from a `ClusterView`. Without such a seat nothing is sent at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from etcdreplica.clock import Clock
from etcdreplica.core.suspicion import Action, Ask, Confirmed, Detector, Probe, Refuted, Suspected, SuspicionSettings
from etcdreplica.core.view import ClusterView, Loss
from etcdreplica.daemon.peers import PeerClient

log = logging.getLogger(__name__)


class PeerWatch:
    """One watcher for the life of a manager process. `losses` are what it has found, by host; `on_change` is told of each."""

    def __init__(self, me: str, clock: Clock, client: PeerClient, settings: SuspicionSettings | None = None) -> None:
        self.losses: dict[str, Loss] = {}
        self.on_change: Callable[[str], None] = lambda _: None
        self._me = me
        self._clock = clock
        self._detector = Detector(me, settings)
        self._view = ClusterView()
        self._stale = asyncio.Event()  # the view has changed since the detector was told whom to watch
        self._client = client
        self._questions: set[asyncio.Task[None]] = set()

    def observe(self, view: ClusterView) -> None:
        """Take a view, and again whenever it has changed."""
        self._view = view
        self._stale.set()

    def rest(self) -> None:
        """Watch nobody until the next view: somebody else does."""
        self.losses.clear()
        self.observe(ClusterView())

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                if not self._detector.is_watching:
                    await self._stale.wait()
                if self._stale.is_set():
                    self._stale.clear()
                    self._aim()
                self._do(self._detector.tick(self._clock()))
                await asyncio.sleep(self._detector.settings.tick_s)
        except Exception:
            log.exception("a bug ended the watch over other hosts: from now on only their leases decide")
            self.losses.clear()
        finally:
            for question in self._questions:
                question.cancel()
            await self._client.close()

    def _aim(self) -> None:
        """Watch the hosts with such seats, and those that are lost until they answer or their lease ends."""
        view = self._view
        gone = [
            host for host, loss in self.losses.items() if host not in view.hosts or view.hosts[host].session != loss.session
        ]
        for host in gone:
            del self.losses[host]
        wanted = sorted({*view.fast_hosts, *self.losses})
        sessions = {host: view.hosts[host].session for host in wanted if self._address(host)}
        self._detector.watch(self._clock(), sessions, frozenset(view.hosts))

    def _address(self, host: str) -> str:
        known = self._view.hosts.get(host)
        return known.host.peer if known else ""

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Probe):
                self._spawn(self._probe(action))
            elif isinstance(action, Ask):
                self._spawn(self._ask(action))
            elif isinstance(action, Suspected):
                log.debug("%s does not answer", action.host)
                self._spawn(self._knock(action))
            elif isinstance(action, Refuted):
                self._take_back(action)
            else:
                self._lose(action)

    def _spawn(self, question: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(question)
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    async def _probe(self, probe: Probe) -> None:
        address = self._address(probe.host)
        answer = await self._client.ping(address, self._detector.settings.forget_s) if address else None
        if answer is not None and answer.host == probe.host:
            self._do(self._detector.answered(self._clock(), probe.host, answer.session, probe.number))

    async def _knock(self, suspected: Suspected) -> None:
        if await self._client.is_refused(self._address(suspected.host), self._detector.settings.timeout_s):
            self._detector.refused(suspected.host, suspected.session)

    async def _ask(self, ask: Ask) -> None:
        helper, address = self._address(ask.helper), self._address(ask.host)
        if not helper or not address:
            return
        told, answer = await self._client.ping_via(helper, address, ask.within_s, 2 * ask.within_s)
        if told:
            session = answer.session if answer is not None and answer.host == ask.host else None
            self._do(self._detector.helped(self._clock(), ask.host, ask.helper, ask.number, session))

    def _take_back(self, refuted: Refuted) -> None:
        log.debug("%s answers again, to %s, after %.3f s", refuted.host, refuted.by, refuted.silence_s)
        if self.losses.pop(refuted.host, None) is not None:
            log.warning("host %s was given up but answers again, to %s", refuted.host, refuted.by)
            self.on_change(refuted.host)

    def _lose(self, lost: Confirmed) -> None:
        reason = (
            f"host {lost.host} is lost: it answered none of {lost.probes} probes of {self._me} for {lost.silence_s * 1000:.0f} "
            f"ms, and could not be reached by {', '.join(lost.helpers)} either, while its lease still lived"
        )
        log.warning("%s", reason)
        self._client.forget(self._address(lost.host))
        self.losses[lost.host] = Loss(lost.session, reason, self._view.fast_seats(lost.host))
        self.on_change(lost.host)


@contextlib.asynccontextmanager
async def watching(watch: PeerWatch) -> Any:
    """Run it beside a block."""
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
