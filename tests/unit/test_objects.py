"""Copies of an object in one process: updates, queries, fail-overs, catching up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from etcdreplica import query, replica, update
from etcdreplica.errors import UsageError
from etcdreplica.testing.objects import Copies, values


class Ledger:
    """Accounts."""

    def __init__(self) -> None:
        self.accounts: dict[str, int] = {}
        self.log: list[str] = []

    @update
    def deposit(self, account: str, amount: int) -> int:
        """Add to an account."""
        if amount < 0:
            raise ValueError(f"{amount} is negative")
        self.accounts[account] = self.accounts.get(account, 0) + amount
        return self.accounts[account]

    @update
    def ticket(self) -> str:
        """Return something that depends on chance and time."""
        self.log.append(f"{replica.new_id()} {replica.random()} {replica.now()}")
        return self.log[-1]

    @query
    def balance(self, account: str) -> int:
        """Look at an account."""
        return self.accounts.get(account, 0)


@pytest.fixture
async def copies(tmp_path: Path) -> AsyncIterator[Copies]:
    """Three copies in sync."""
    async with Copies(Ledger, tmp_path) as copies:
        for host in "abc":
            await copies.start(host)
        await copies.in_sync(3)
        yield copies
        assert [copy.error for copy in copies.copies] == [None] * len(copies.copies)


async def test_updates_and_queries(copies: Copies) -> None:
    """What is acknowledged is on every copy."""
    ledger = await copies.client()
    assert await ledger.deposit("ann", 5) == 5
    assert await ledger.deposit("ann", amount=2) == 7
    assert await ledger.balance("ann") == 7
    with pytest.raises(ValueError, match="-1 is negative"):
        await ledger.deposit("ann", -1)
    with pytest.raises(UsageError, match="has no update deposit that takes these"):
        await ledger.deposit("ann")
    await ledger.ticket()
    await copies.until(lambda: values(copies.copies, "accounts") == [{"ann": 7}] * 3)
    await copies.until(lambda: len({tuple(log) for log in values(copies.copies, "log")}) == 1)


async def test_fail_overs_while_updates_are_under_way(copies: Copies) -> None:
    """Every update is applied once, across three fail-overs."""
    ledger = await copies.client()
    done = 0

    async def work(number: int) -> None:
        nonlocal done
        for _ in range(300):
            await ledger.deposit(f"account {number}", 1)
            done += 1

    tasks = [asyncio.create_task(work(number)) for number in range(10)]
    for part in range(1, 4):
        await copies.until(lambda part=part: done > 600 * part)
        await copies.fail_over()
        await copies.start(f"new {part}")
        await copies.in_sync(3)
    await asyncio.gather(*tasks)
    wanted = {f"account {number}": 300 for number in range(10)}
    await copies.until(lambda: values(copies.copies, "accounts") == [wanted] * 3)


async def test_digests_are_of_one_state(copies: Copies) -> None:
    """Copies that apply many records at once still say what their state was after the one that asks."""
    ledger = await copies.client()
    primary = copies.primary
    assert primary is not None
    assert primary.server.leading is not None
    asked = []
    for _ in range(20):
        futures = [ledger.deposit("ann", 1) for _ in range(50)]
        asked.append(primary.server._check(primary.server.leading))
        await asyncio.gather(*futures)
    await copies.until(lambda: all(copy.machine.index >= asked[-1] for copy in copies.copies))
