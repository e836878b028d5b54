"""How much may be sent in a second; the clock stands still, so whoever waits goes on waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from etcdreplica.checkpoint.bandwidth import BURST_S, Bandwidth

LIMIT = 1000.0


class Sender:
    """Sends under a limit of 1000 bytes a second, from 100 s on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.bandwidth = Bandwidth(LIMIT, lambda: self.now)
        self.waiting: list[asyncio.Task[None]] = []

    async def waits(self, count: int) -> bool:
        """Whether this much has to wait."""
        self.waiting.append(asyncio.create_task(self.bandwidth.take(count)))
        await asyncio.sleep(0)
        return not self.waiting[-1].done()


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    """Return one; nobody waits to the end."""
    made = Sender()
    yield made
    for task in made.waiting:
        task.cancel()
    await asyncio.gather(*made.waiting, return_exceptions=True)


async def test_without_a_limit_nobody_waits() -> None:
    """However much is sent, and no clock is looked at."""

    def no_clock() -> float:
        raise AssertionError

    for _ in range(3):
        await Bandwidth(0, no_clock).take(1 << 60)


async def test_a_burst_is_sent_at_once(sender: Sender) -> None:
    """A tenth of a second's worth, in whatever parts; then the next byte waits."""
    for _ in range(4):
        assert not await sender.waits(int(LIMIT * BURST_S / 4) - 1)
    assert await sender.waits(10)


async def test_time_makes_room(sender: Sender) -> None:
    """After half a second half of a second's worth is free again."""
    assert await sender.waits(600)
    sender.now += 0.4
    assert await sender.waits(200)
    sender.now += 10
    assert not await sender.waits(100)


async def test_idle_time_is_not_saved_up(sender: Sender) -> None:
    """A long silence allows no more than one burst."""
    sender.now += 3600
    assert not await sender.waits(100)
    assert await sender.waits(100)


async def test_the_limit_is_for_all_together(sender: Sender) -> None:
    """Whoever comes later waits for those before."""
    assert [await sender.waits(50) for _ in range(4)] == [False, False, True, True]


async def test_whoever_gave_up_has_sent_nothing(sender: Sender) -> None:
    """Transfers that are cut again and again must not use up the room of those that go on."""
    for _ in range(20):
        assert await sender.waits(1000)
        sender.waiting[-1].cancel()
        await asyncio.gather(sender.waiting[-1], return_exceptions=True)
    sender.now += 0.2
    assert not await sender.waits(100)
