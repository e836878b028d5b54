"""The local socket's protocol between an application process and its WatchDog; no I/O.

A frame is a four-byte big-endian length and one JSON object with a `type`. The first frame is `hello` with the protocol's
version. Both sides use the same `encode` and `Decoder`; what is not a frame raises `ProtocolError`.

The CheckpointServer speaks the same on a socket of its own. To it: hello, store (a state in sealed memory, see `app.state`),
restore, follow (tell me of each checkpoint that comes to this host). From it: ok, kept (durable on this host), reached (on so
many hosts; done: that are enough), refused, found, newest, unavailable.

To the WatchDog: hello, page (where the page of `app.kernel` is), notice (the early death notice is held in it), running
(the body has begun), advertise, health (what the `health` function answered), leaving, done (the body returned), failed (it
raised). To the application: welcome, role, degree (it was changed), renew (the deadline has moved), stop, ok, error. A process
that loses its WatchDog says hello to the next one with its incarnation, and then all of the above that is true of it.

A copy of a replicated object also says: serves (endpoint, HOST:PORT where it answers clients and the other copies), members
(question: what is the in-sync set?) and, as primary, change (question, revision of the set that is to be replaced, members as
pairs of host and incarnation; one at a time). Its welcome also has object (min_in_sync, durable, degree), state_dir (its own
below the host's), address (of the host) and born. It is told: replicas (at once and at each change, of every copy: host,
incarnation, role, epoch, where it serves or null), members (question, revision, epoch, primary, members; all 0 or empty if
there is no set; or error), changed (question, and revision of the new set; or error, and unknown: it may happen all the same).

`etcdreplica protect` says hello with a registration and without adopt, and with wait if it wants to know, within so many
seconds, where the primary runs; ok then has primary and epoch.

A client of an object says hello with client, the object's name, instead of what a replica says, and is told replicas until it
hangs up or says leaving. An object that is not known has none.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from etcdreplica.errors import ProtocolError

VERSION = 1
MAX_FRAME = 4 << 20
SOCKET_ENV = "ETCDREPLICA_SOCKET"
INCARNATION_ENV = "ETCDREPLICA_INCARNATION"
FINAL_CODES = {0: 0, 1: 77, 2: 78}  # by exit code: how a WatchDog tells its guardian not to start it again
STATE_NAME = "etcdreplica-state"  # of the sealed memory in which a state is handed over
MARK_ENV = "ETCDREPLICA_WARD"  # carried by everything that belongs to a replica
DETACH_ENV = "ETCDREPLICA_DETACH"  # "1": only register (`etcdreplica start --detach`)
STANDALONE_ENV = "ETCDREPLICA_STANDALONE"
GUARDIAN_ENV = "ETCDREPLICA_GUARDIAN"  # of a WatchDog: the descriptor of its guardian's socket, and the guardian's name
_LENGTH = struct.Struct(">I")

if TYPE_CHECKING:
    from typing import Any

Message = Mapping[str, "Any"]


def encode(kind: str, **fields: Any) -> bytes:
    """Return one frame."""
    body = json.dumps({"type": kind, **fields}, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a {kind} message of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Turns bytes as they arrive into messages."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._max_frame = max_frame

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete now. Raises ProtocolError; then the connection is of no more use."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_frame:
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {self._max_frame}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _message(body)


def _message(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise ProtocolError("a frame is not JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ProtocolError("a frame is not an object with a type")
    return message


def checkpoint_socket(watchdog: str) -> str:
    """Return where the CheckpointServer beside a WatchDog listens."""
    return f"{watchdog}.state"


def default_socket() -> str:
    """Return where this user's WatchDog listens: $ETCDREPLICA_SOCKET, else a place of the user's own.

    That is in /run/etcdreplica for root, else below $XDG_RUNTIME_DIR, else in /tmp under the user's number.
    """
    if named := os.environ.get(SOCKET_ENV):
        return named
    if os.geteuid() == 0:
        directory = "/run/etcdreplica"
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        directory = f"{runtime}/etcdreplica"
    else:
        directory = f"/tmp/etcdreplica-{os.geteuid()}"  # noqa: S108  (the WatchDog refuses one that is not ours)
    return f"{directory}/watchdog.sock"
