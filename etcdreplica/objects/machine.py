"""The state of an object: the instance itself, and what it has answered to whom; no I/O.

Two machines that start from the same snapshot and apply the same records are the same. A record is what the log consists of:
one message of one client with its updates, or a note of the primary. What a client was answered is part of the state, so that
a record that comes again, from a client that has seen a fail-over, is answered and not applied: exactly once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import typing
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
from attrs import define, field

from etcdreplica.app.methods import QUERY, UPDATE, Method, methods_of
from etcdreplica.app.state import Codec
from etcdreplica.errors import CheckpointError, DivergedError, EtcdReplicaError, UsageError
from etcdreplica.objects.context import Moment, replica
from etcdreplica.objects.wire import (
    DONE,
    EXPIRED,
    FORGOTTEN,
    NO_METHOD,
    RAISED,
    Call,
    Calls,
    Result,
    decode,
    encode_value,
)

SESSION_TICKS = 60  # of the primary, after which a session that was not used is forgotten
SESSIONS = 10_000  # that are remembered; a primary takes no more
CALLS, TICK, CHECK, BARRIER = range(4)  # kinds of records
_HEAD = struct.Struct(">Bd")
_sorted = msgspec.msgpack.Encoder(order="deterministic").encode


def record_of(kind: int, time: float, payload: bytes = b"") -> bytes:
    """Return a record: a client's message as it came, or a note, with the primary's time."""
    return _HEAD.pack(kind, time) + payload


def asks_for_digest(record: bytes) -> bool:
    """Whether it asks every copy what its state amounts to."""
    return record[0] == CHECK


@define
class Session:
    """What one client was answered, from number `below` on."""

    used: int  # tick
    below: int = 1
    done: dict[int, tuple[int, bytes]] = field(factory=dict)

    def forget(self, below: int) -> None:
        """The client has these answers, or wants them no longer."""
        if below <= self.below:
            return
        if below - self.below > len(self.done):
            self.done = {number: kept for number, kept in self.done.items() if number >= below}
        else:
            for number in range(self.below, below):
                self.done.pop(number, None)
        self.below = below


class Machine:
    """One copy of an object of class `cls`. `index` is the last record that was applied, 0 before the first."""

    def __init__(self, cls: type[Any], codec: Codec, args: Sequence[Any] = ()) -> None:
        self.cls = cls
        self.methods = methods_of(cls)
        self.codec = codec
        self.index = 0
        self.time = 0.0
        self.history = os.urandom(16)
        self.tick = 0
        self.sessions: dict[bytes, Session] = {}  # the one that was not used for longest first
        self._args = args
        self._hints: dict[str, Any] | None = None
        self.instance: Any = None

    def begin(self, time: float) -> None:
        """Make the instance: the first copy of all does this, the others get a snapshot."""
        self.time = time
        replica._enter(Moment(self.history, 0, 0, time))
        try:
            self.instance = self.cls(*self._args)
        finally:
            replica._enter(None)

    # --- applying --------------------------------------------------------------------------------------------------

    def apply(self, record: bytes, message: Calls | None = None) -> list[Result]:
        """Apply the next record; return what a client is to be answered. `message`: what is in it, if that is known already.

        Raises DivergedError for a record that this code cannot apply.
        """
        kind, time = _HEAD.unpack_from(record)
        self.index += 1
        self.time = max(self.time, time)
        if kind == CALLS:
            found = message or decode(record[_HEAD.size :])
            if not isinstance(found, Calls):
                raise DivergedError(f"record {self.index} of the log is no update")
            return self._take(found)
        if kind == TICK:
            self._age()
        elif kind not in (CHECK, BARRIER):
            raise DivergedError(f"record {self.index} is of kind {kind}: it was written by a newer etcdreplica than this one")
        return []

    def _take(self, message: Calls) -> list[Result]:
        session = self.sessions.pop(message.session, None)
        if session is None:
            if not message.new:
                return [(number, FORGOTTEN, NOTHING) for number, *_ in message.calls]
            session = Session(self.tick)
        self.sessions[message.session] = session
        session.used = self.tick
        session.forget(message.below)
        moment = Moment(self.history, self.index, 0, self.time)
        replica._enter(moment)
        try:
            return [self._once(session, call, moment) for call in message.calls]
        finally:
            replica._enter(None)

    def _once(self, session: Session, call: Call, moment: Moment) -> Result:
        number = call[0]
        if number < session.below:
            return number, EXPIRED, NOTHING
        if (known := session.done.get(number)) is not None:
            return number, known[0], msgspec.Raw(known[1])
        moment.place += 1
        moment._source = None
        code, value = self._call(call, UPDATE)
        session.done[number] = code, value
        return number, code, msgspec.Raw(value)

    def _call(self, call: Call, kind: str) -> tuple[int, bytes]:
        _, name, args, kwargs = call
        method = self.methods.get(name)
        if method is None or method.kind != kind or not method.fits(args, kwargs):
            raise DivergedError(
                f"{kind} {name} with {len(args)} positional and {len(kwargs or ())} named arguments was accepted by a primary "
                f"whose {self.cls.__name__} is not the one of this copy: run the same version of the program on all hosts"
            )
        try:
            value = method.function(self.instance, *args, **kwargs) if kwargs else method.function(self.instance, *args)
        except BaseException as error:  # also SystemExit and the like: the loop that we are in must not see them
            return RAISED, bytes(error_value(error))
        try:
            return DONE, encode_value(value)
        except Exception as error:
            return RAISED, bytes(error_value(UsageError(f"what {name} returned cannot be sent as msgpack: {error}")))

    def accepts(self, call: Call, kind: str) -> bool:
        """Whether the class has such a method, for such arguments."""
        method: Method | None = self.methods.get(call[1])
        return method is not None and method.kind == kind and method.fits(call[2], call[3])

    def ask(self, call: Call) -> Result:
        """Answer a query."""
        if not self.accepts(call, QUERY):
            return call[0], NO_METHOD, NOTHING
        code, value = self._call(call, QUERY)
        return call[0], code, msgspec.Raw(value)

    def _age(self) -> None:
        self.tick += 1
        while self.sessions:
            oldest = next(iter(self.sessions))
            if self.tick - self.sessions[oldest].used <= SESSION_TICKS:
                break
            del self.sessions[oldest]

    # --- snapshots -------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Return all of it. Raises UsageError when the instance cannot be turned into bytes."""
        name, state = self.codec.encode(self._state())
        sessions = [[key, s.used, s.below, list(s.done.items())] for key, s in self.sessions.items()]
        return encode_value([self.history, self.index, self.time, self.tick, sessions, name, state])

    def load(self, data: bytes) -> None:
        """Become what a snapshot says. Raises CheckpointError."""
        try:
            history, index, time, tick, sessions, name, state = msgspec.msgpack.decode(data, type=_Snapshot)
            instance = object.__new__(self.cls)
            self._fill(instance, self.codec.decode(name, state))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"a snapshot does not make a {self.cls.__name__}: {type(error).__name__}: {error}") from error
        self.instance = instance
        self.history, self.index, self.time, self.tick = history, index, time, tick
        self.sessions = {key: Session(used, below, dict(done)) for key, used, below, done in sessions}

    def digest(self) -> bytes:
        """Return what is the same on all copies that have applied the same records."""
        return hashlib.blake2b(canonical(self._state()), digest_size=16).digest()

    def check_state(self) -> None:
        """See that a snapshot would give the same state back. Raises UsageError, which says what would not."""
        state = self._state()
        copy = object.__new__(self.cls)
        try:
            self._fill(copy, self.codec.decode(*self.codec.encode(state)))
        except EtcdReplicaError as error:
            raise UsageError(str(error)) from None
        except Exception as error:
            raise UsageError(f"{self.cls.__name__} does not come back from a snapshot: {error}") from None
        if hasattr(self.cls, "snapshot"):
            return
        again = vars(copy)
        for name in state:
            if not _same(again.get(name), state[name]):
                raise UsageError(
                    f"{self.cls.__name__}.{name} comes back from a snapshot as {again.get(name)!r:.200}, not as "
                    f"{state[name]!r:.200}: annotate it in the body of the class (as in `{name}: dict[str, Item]`), or give "
                    "the class methods snapshot() and restore(state)"
                )

    def _state(self) -> Any:
        own = getattr(self.cls, "snapshot", None)
        if own is not None:
            return own(self.instance)
        try:
            return vars(self.instance)
        except TypeError:
            raise UsageError(f"{self.cls.__name__} has __slots__: give it methods snapshot() and restore(state)") from None

    def _fill(self, instance: Any, state: Any) -> None:
        own = getattr(self.cls, "restore", None)
        if own is not None:
            own(instance, state)
            return
        if self._hints is None:
            self._hints = self._annotations()
        for name, value in state.items():
            if name in self._hints and self.codec.name == "msgpack":
                try:
                    value = msgspec.convert(value, self._hints[name], builtin_types=(bytes,), str_keys=False)
                except (TypeError, ValueError, msgspec.MsgspecError) as error:
                    raise CheckpointError(f"{self.cls.__name__}.{name} is not what its annotation says: {error}") from None
            setattr(instance, name, value)

    def _annotations(self) -> dict[str, Any]:
        try:
            return typing.get_type_hints(self.cls)
        except Exception as error:
            raise UsageError(
                f"the annotations in the body of {self.cls.__name__} cannot be read ({error}): its state is turned back by "
                "them, so what they name must be there when the program runs, at the top of its module"
            ) from None


_Snapshot = tuple[bytes, int, float, int, list[tuple[bytes, int, int, list[tuple[int, tuple[int, bytes]]]]], str, bytes]
NOTHING = msgspec.Raw(encode_value(None))


def canonical(value: Any) -> bytes:
    """Return bytes that are the same for equal values, whatever the order in their dicts and sets.

    There are none for what has cycles, or consists of objects that hide what is in them: those are not compared.
    """
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        return _sorted(value)
    with contextlib.suppress(TypeError, ValueError, RecursionError):  # keys of a dict that are no text, objects
        return encode_value(_ordered(value))
    return b""


def _ordered(value: Any) -> Any:
    """Return plain values that say what is in this one, of which types, with dicts and sets sorted."""
    kind = type(value)
    if isinstance(value, dict):
        return [
            kind.__qualname__,
            sorted([encode_value(_ordered(key)), encode_value(_ordered(item))] for key, item in value.items()),
        ]
    if isinstance(value, set | frozenset):
        return [kind.__qualname__, sorted(encode_value(_ordered(item)) for item in value)]
    if isinstance(value, list | tuple | deque):
        return [kind.__qualname__, [_ordered(item) for item in value]]
    if hasattr(kind, "__struct_fields__"):
        names = kind.__struct_fields__
    elif hasattr(kind, "__attrs_attrs__"):
        names = [attribute.name for attribute in kind.__attrs_attrs__]
    elif hasattr(kind, "__dataclass_fields__"):
        names = list(kind.__dataclass_fields__)
    else:
        try:
            encode_value(value)
        except TypeError:
            return [kind.__qualname__, _ordered(vars(value))]
        return value
    return [kind.__qualname__, [_ordered(getattr(value, name)) for name in names]]


def _same(one: Any, other: Any) -> bool:
    """Whether they are of the same type and equal. NaN is NaN; of what equals only itself, what is in it counts."""
    if type(one) is not type(other):
        return False
    try:
        return bool(one == other) or encode_value(_ordered(one)) == encode_value(_ordered(other))
    except (TypeError, ValueError, RecursionError):
        return False


def error_value(error: BaseException) -> msgspec.Raw:
    """Return what a client is sent in the place of a result."""
    kind = type(error)
    try:
        return msgspec.Raw(encode_value([kind.__module__, kind.__qualname__, str(error), list(error.args)]))
    except Exception:
        return msgspec.Raw(encode_value([kind.__module__, kind.__qualname__, _text(error), None]))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(an error whose text cannot be had)"
