"""What clients see of an object under faults could have come from one object that does one thing at a time.

Real copies and clients in one loop; a seed says what happens when. ETCDREPLICA_SEEDS=200 tries more of them.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from etcdreplica import query, update
from etcdreplica.errors import OutcomeUnknownError, UnavailableError
from etcdreplica.objects import leading as leading_module
from etcdreplica.objects import log as log_module
from etcdreplica.testing.objects import Copies, CopyHandle, values
from tests.unit.linearizability import ADD, READ, Operation, is_linearizable

SEEDS = int(os.environ.get("ETCDREPLICA_SEEDS", "6"))
KEYS = ("k", "l")
CLIENTS = 3
FAULTS = 25


class Counters:
    """Numbers by key."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    @update
    def add(self, key: str, amount: int) -> int:
        """Add; return the sum."""
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    @query
    def read(self, key: str) -> int:
        """Look."""
        return self.counts.get(key, 0)


class Run:
    """One history."""

    def __init__(self, copies: Copies, chance: Random) -> None:
        self.copies, self.chance = copies, chance
        self.history: list[Operation] = []
        self.over = False

    async def client(self, timeout_s: float) -> None:
        """Do one thing after the other; sometimes several at once."""
        counters = await self.copies.client()
        counters._timeout_s = timeout_s
        while not self.over:
            await asyncio.gather(*(self.operation(counters) for _ in range(self.chance.choice([1, 1, 1, 3]))))
            await asyncio.sleep(self.chance.random() * 0.004)

    async def operation(self, counters: Any) -> None:
        """Do one thing, and note what came of it."""
        loop = asyncio.get_running_loop()
        key, kind, amount = self.chance.choice(KEYS), self.chance.choice((ADD, READ)), self.chance.randint(1, 5)
        start = loop.time()
        try:
            answer = await (counters.add(key, amount) if kind == ADD else counters.read(key))
        except OutcomeUnknownError:
            self.history.append(Operation(key, ADD, amount, None, start))
        except UnavailableError:
            pass  # it has not happened
        else:
            self.history.append(Operation(key, kind, amount if kind == ADD else 0, answer, start, loop.time()))

    async def fault(self) -> None:
        """Have something happen, and give it some time."""
        copies, chance = self.copies, self.chance
        what = chance.choice(["fail over", "fail over", "kill backup", "start", "cut", "cut", "refuse", "lose answers", "heal"])
        able = [copy for copy in copies.copies if copy is not copies.primary and copy.incarnation in copies.record[2]]
        if what == "fail over" and able:
            await self.fail_over(able)
        elif what == "kill backup" and len(copies.copies) > 2:
            await copies.kill(chance.choice([copy for copy in copies.copies if copy is not copies.primary]))
        elif what == "start" and len(copies.copies) < 4:
            await copies.start(f"host {copies._incarnation}")
        elif what == "cut":
            self.cut()
        else:
            copies.refuse_changes, copies.lose_answers = what == "refuse", what == "lose answers"
        await self.work(chance.randint(1, 20))

    async def fail_over(self, able: list[CopyHandle]) -> None:
        """Kill the primary, and after a moment or none make any in-sync copy the next one."""
        copies = self.copies
        assert copies.primary is not None
        await copies.kill(copies.primary)
        if self.chance.random() < 0.5:
            await asyncio.sleep(self.chance.random() * 0.05)
        copies.promote(self.chance.choice(able))
        if len(copies.copies) < 3:
            await copies.start(f"host {copies._incarnation}")

    def cut(self) -> None:
        """Cut some connections of the primary, to clients and to copies; what is under way is lost."""
        primary = self.copies.primary
        assert primary is not None
        leading = primary.server.leading
        peers = [peer.connection for peer in leading._peers.values()] if leading is not None else []
        for connection in [*primary.server._clients, *peers]:
            if connection is not None and connection._transport is not None and self.chance.random() < 0.5:
                connection._transport.abort()

    async def work(self, more: int) -> None:
        """Wait until clients have done something, or cannot for the moment."""
        wanted = len(self.history) + more
        for _ in range(50):
            if len(self.history) >= wanted:
                break
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_histories_are_linearizable(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail-overs, lost backups, cut connections, changes of the set that are refused or of which the outcome is unknown."""
    chance = Random(seed)
    monkeypatch.setattr(leading_module, "GONE_S", 0.05)
    monkeypatch.setattr(log_module, "KEEP_RECORDS", chance.choice([3, 50]))
    monkeypatch.setattr(log_module, "BATCH_RECORDS", chance.choice([2, 100]))
    async with Copies(Counters, tmp_path) as copies:
        for host in "abc":
            await copies.start(host)
        await copies.in_sync(3)
        run = Run(copies, chance)
        clients = [asyncio.create_task(run.client(chance.choice([0.05, 0.3, 20.0]))) for _ in range(CLIENTS)]
        await run.work(5)
        for _ in range(FAULTS):
            await run.fault()
        copies.refuse_changes = copies.lose_answers = False
        await copies.in_sync(len(copies.copies))
        await run.work(10)
        run.over = True
        await asyncio.gather(*clients)
        answered = [operation for operation in run.history if operation.answer is not None]
        assert len(answered) > 20, f"seed {seed}: nothing was tried"
        assert is_linearizable(run.history), f"seed {seed}: {sorted(run.history, key=lambda o: o.start)}"
        assert [copy.error for copy in copies.copies] == [None] * len(copies.copies), f"seed {seed}"
        await copies.until(
            lambda: all(counts == values(copies.copies, "counts")[0] for counts in values(copies.copies, "counts"))
        )
