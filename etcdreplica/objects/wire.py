"""What travels between clients, primary and backups of an object: frames of a four-byte length and one msgpack message.

Nothing in a frame is trusted: a frame over the limit, or one that is no message, ends the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from etcdreplica.errors import ProtocolError

VERSION = 1
MAX_MESSAGE = 16 << 20
MAX_CALLS = 12 << 20  # of a message with updates: it must fit into one of records
SESSION = 16  # bytes of a session's name
_LENGTH = struct.Struct(">I")

# How a call ended, in Results. What is not DONE or RAISED was not logged: it has not happened, and will not by itself.
# EXPIRED: it was answered before, or overtaken, and what it came to is not known any more. FORGOTTEN: nor is the session.
DONE, RAISED, OVERLOADED, NOT_PRIMARY, TOO_FEW, EXPIRED, NO_METHOD, TOO_OLD, FORGOTTEN = range(9)

Call = tuple[int, str, list[Any], dict[str, Any] | None]  # number, method, arguments
Result = tuple[int, int, msgspec.Raw]  # number, how it ended, what it returned


class Hello(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """The first message of a client."""

    version: int
    app: str


class Standing(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """To clients, first and at every change: whether this copy is primary, in which epoch; its methods and their kinds."""

    epoch: int
    primary: bool
    methods: dict[str, str]


class Calls(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """Updates of one session, in order. What is below `below` is waited for no longer. `new`: nothing was answered yet."""

    session: bytes
    new: bool
    below: int
    calls: list[Call]


class Results(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """How updates ended."""

    results: list[Result]


class Asks(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """Queries. `max_age`: seconds that the state may be behind; None for not at all."""

    calls: list[Call]
    max_age: float | None


class Answers(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """How queries ended."""

    results: list[Result]


class Follow(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """The first message of a primary to another copy."""

    version: int
    app: str
    epoch: int
    incarnation: int


class Position(msgspec.Struct, tag=8, array_like=True, frozen=True):
    """Where a copy is: which history, and the last update that it has applied."""

    incarnation: int
    history: bytes
    applied: int


class Part(msgspec.Struct, tag=9, array_like=True, frozen=True):
    """A part of a snapshot of so many bytes."""

    epoch: int
    at: int
    size: int
    data: bytes


class Records(msgspec.Struct, tag=10, array_like=True, frozen=True):
    """Records from index `first` on. All up to `commit`, as far as they are held, may be applied.

    `until`: with these, or more like them, up to that index, the receiver has all that this primary has, and what it held
    beyond what it has applied is void; -1: these simply follow.
    """

    epoch: int
    first: int
    records: list[bytes]
    commit: int
    until: int


class Ack(msgspec.Struct, tag=11, array_like=True, frozen=True):
    """Everything up to this index is held."""

    epoch: int
    index: int


class Ping(msgspec.Struct, tag=12, array_like=True, frozen=True):
    """A question of a backup, only to learn how far it is behind."""

    number: int


class Pong(msgspec.Struct, tag=13, array_like=True, frozen=True):
    """The answer: everything up to `commit` was acknowledged when this was sent."""

    number: int
    commit: int


class Digest(msgspec.Struct, tag=14, array_like=True, frozen=True):
    """What the state of a copy amounts to after the record of this index."""

    index: int
    digest: bytes


class Refuse(msgspec.Struct, tag=15, array_like=True, frozen=True):
    """Why this connection is of no use."""

    reason: str
    diverged: bool = False


ToClients = Standing | Results | Answers | Refuse
ToCopies = Follow | Position | Part | Records | Ack | Ping | Pong | Digest
Message = Hello | Calls | Asks | ToClients | ToCopies
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
encode_value = _encoder.encode


def frame(message: Message) -> bytes:
    """Return the bytes of a message. Raises ProtocolError for one that is too long."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Turns bytes as they arrive into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # what stands before was taken

    def feed(self, data: bytes) -> Iterator[tuple[Message, bytes]]:
        """Take bytes as they arrive; return what takes out of them what is complete, as `next` does."""
        self._buffer += data
        return iter(self.next, None)

    def next(self) -> tuple[Message, bytes] | None:
        """Return the next message that is complete, and its own bytes; None if there is none. Raises ProtocolError."""
        buffer, at = self._buffer, self._at
        if len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {MAX_MESSAGE}")
            begin, end = at + _LENGTH.size, at + _LENGTH.size + length
            if len(buffer) >= end:
                self._at = end
                body = bytes(buffer[begin:end])
                return decode(body), body
        del buffer[:at]
        self._at = 0
        return None


def decode(body: bytes) -> Message:
    """Turn the bytes of one message back. Raises ProtocolError."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a frame is no message: {error}") from None
