"""What a process of an object asks and tells its WatchDog; the messages stand in `app.protocol`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from attrs import frozen

from etcdreplica.app.protocol import Message
from etcdreplica.errors import ObjectError, ProtocolError

ANSWER_S = 5.0


@frozen
class Copy:
    """A copy of the object, as etcd shows it. `serves` is where it answers, HOST:PORT, None before it does."""

    host: str
    incarnation: int
    role: str
    epoch: int
    serves: str | None


@frozen
class Members:
    """The in-sync set as it stands in etcd, by incarnation the host. `revision` 0: there is none."""

    revision: int
    epoch: int
    primary: int
    hosts: dict[int, str]


class MembersUnknownError(ObjectError):
    """It is not known whether a change of the in-sync set has happened."""


def copies_of(message: Message) -> list[Copy]:
    """Read a `replicas` message. Raises ProtocolError."""
    try:
        return [Copy(str(h), int(i), str(r), int(e), str(s) if s else None) for h, i, r, e, s in message["replicas"]]
    except (KeyError, TypeError, ValueError):
        raise ProtocolError(f"the WatchDog sent no list of replicas: {dict(message)}") from None


class WatchDogLine:
    """Questions to the WatchDog, from the loop that objects live in. `send(kind, **fields)` may be called from any thread."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[Message]] = {}
        self._told: Message | None = None  # the set, of itself: with it this copy was called to be primary

    async def members(self) -> Members:
        """Return the in-sync set, and read it first unless it has just been told. Raises ObjectError."""
        told, self._told = self._told, None
        answer = told or await self._ask("members")
        if "error" in answer:
            raise ObjectError(str(answer["error"]))
        hosts = {int(incarnation): str(host) for host, incarnation in answer["members"]}
        return Members(int(answer["revision"]), int(answer["epoch"]), int(answer["primary"]), hosts)

    async def change(self, revision: int, members: Iterable[tuple[str, int]]) -> int:
        """Write the in-sync set, if it is still that of `revision`; return its new revision.

        Raises ObjectError when it was not written, MembersUnknownError when that is not known.
        """
        answer = await self._ask("change", revision=revision, members=[list(member) for member in members])
        if "error" in answer:
            raise (MembersUnknownError if answer.get("unknown") else ObjectError)(str(answer["error"]))
        return int(answer["revision"])

    def take(self, message: Message) -> None:
        """Take an answer, or what the WatchDog says of itself."""
        if not message.get("question"):
            self._told = message
        waiting = self._open.pop(int(message.get("question", 0)), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def lost(self) -> None:
        """The WatchDog is another one now: it does not know what its predecessor was asked."""
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(MembersUnknownError("the WatchDog was replaced"))
        self._open.clear()
        self._told = None

    async def _ask(self, kind: str, **fields: Any) -> Message:
        question = next(self._numbers)
        waiting: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._open[question] = waiting
        self._send(kind, question=question, **fields)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await waiting
        except TimeoutError:
            raise MembersUnknownError("the WatchDog does not answer") from None
        finally:
            self._open.pop(question, None)
