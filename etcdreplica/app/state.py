"""States of applications as bytes, and the sealed memory in which they are handed to the CheckpointServer.

Bytes stay what they are. Everything else travels as msgpack, or by the codec that the application has chosen. msgspec is
only imported when a state is turned into bytes or back.
"""

from __future__ import annotations

import fcntl
import os
from types import UnionType
from typing import TYPE_CHECKING

from etcdreplica.app.protocol import STATE_NAME
from etcdreplica.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from typing import Any

BYTES, MSGPACK, PICKLE = "bytes", "msgpack", "pickle"
_RECORDS = ("__attrs_attrs__", "__dataclass_fields__", "__struct_fields__")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Codec:
    """One application's: "msgpack", "pickle", a type that msgpack is to be turned into, or an object of the user's own.

    An object has `encode(state) -> bytes` and `decode(data) -> state`, and may have a `name` that is stored with the state.
    Raises UsageError for anything else.
    """

    def __init__(self, given: Any = MSGPACK) -> None:
        self._own = self._type = None
        self._checked = False  # whether a state was turned back into the type
        self.name = MSGPACK
        if given in (MSGPACK, PICKLE):
            self.name = given
        elif isinstance(given, type | UnionType) or hasattr(given, "__origin__"):
            self._type = given
        elif hasattr(given, "encode") and hasattr(given, "decode"):
            self._own = given
        else:
            raise UsageError(f"a codec is 'msgpack', 'pickle', a type, or an object with encode and decode, not {given!r}")
        if self._own is not None:
            self.name = str(getattr(given, "name", type(given).__qualname__))[:64]

    def encode(self, state: Any) -> tuple[str, bytes]:
        """Return the name of what was used, and the bytes. Raises UsageError for a state that cannot be turned into bytes."""
        if self._own is not None:
            data = self._own.encode(state)
            if not isinstance(data, bytes | bytearray | memoryview):
                raise UsageError(f"encode of the codec {self.name} returned {type(data).__name__} instead of bytes")
            return self.name, data if isinstance(data, bytes) else bytes(data)
        if isinstance(state, bytes):
            return BYTES, state
        if isinstance(state, bytearray | memoryview):
            return BYTES, bytes(state)  # it may change while it is handed over
        if self.name == PICKLE:
            import pickle

            try:
                return PICKLE, pickle.dumps(state, pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                raise UsageError(f"this state cannot be stored as pickle: {type(error).__name__}: {error}") from error
        import msgspec

        try:
            data = msgspec.msgpack.encode(state)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"this state cannot be stored as msgpack ({error}): use plain values, attrs or dataclasses, or give "
                "@protected a codec= of your own"
            ) from None
        if self._type is not None and not self._checked:
            try:
                msgspec.msgpack.decode(data, type=self._type)
            except Exception as error:  # better now than when somebody needs it
                raise UsageError(f"this state could not be turned back into the codec's {self._type!r}: {error}") from None
            self._checked = True
        return MSGPACK, data

    def decode(self, name: str, data: bytes) -> Any:
        """Turn bytes back. Raises CheckpointError when they were made by another codec, or do not decode."""
        if name == BYTES and self._own is None:
            return data
        if name != self.name:
            raise CheckpointError(f"the checkpoint was made with the codec {name!r}, and this application uses {self.name!r}")
        try:
            if self._own is not None:
                return self._own.decode(data)
            if name == PICKLE:
                import pickle

                return pickle.loads(data)  # noqa: S301  (the application has asked for it by name)
            import msgspec

            return msgspec.msgpack.decode(data) if self._type is None else msgspec.msgpack.decode(data, type=self._type)
        except Exception as error:
            raise CheckpointError(f"the checkpoint cannot be decoded as {name}: {type(error).__name__}: {error}") from error

    def like(self, state: Any, default: Any) -> Any:
        """Turn a plain state into the type of the default, if that is a record of attrs, dataclasses or msgspec."""
        if self._own is None and self._type is None and isinstance(state, dict) and is_record(default):
            import msgspec

            try:
                return msgspec.convert(state, type(default))
            except Exception as error:  # also a class with fields that msgspec cannot make
                raise CheckpointError(f"the checkpoint is no {type(default).__name__}: {error}") from None
        return state


def is_record(value: Any) -> bool:
    """Whether it is an object of a class made by attrs, dataclasses or msgspec."""
    return any(hasattr(type(value), name) for name in _RECORDS)


def open_sealed() -> int:
    """Make memory to write a state into."""
    return os.memfd_create(STATE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def fill(fd: int, data: bytes) -> None:
    """Write a state. The interpreter's lock is free meanwhile."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[: 64 << 20]) :]


def seal(fd: int) -> None:
    """Nobody can change it any more."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
