"""States as bytes, and the sealed memory in which they are handed over."""

from __future__ import annotations

import array
import dataclasses
import datetime
import fcntl
import mmap
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.app.protocol import STATE_NAME
from etcdreplica.app.state import BYTES, MSGPACK, PICKLE, Codec, fill, is_record, open_sealed, seal
from etcdreplica.errors import CheckpointError, UsageError


@attrs.define
class Account:
    """A record of attrs."""

    owner: str
    amounts: list[int] = attrs.Factory(list)


@dataclasses.dataclass
class Order:
    """A dataclass with another record in it."""

    number: int
    account: Account | None = None


class Point(msgspec.Struct):
    """A record of msgspec."""

    x: int
    y: int = 0


class Words:
    """A codec of the user's own."""

    name = "words"

    def __init__(self, encoded: Any = None) -> None:
        self.encoded = encoded

    def encode(self, state: list[str]) -> Any:
        """Join words, or return what a test has given."""
        return " ".join(state).encode() if self.encoded is None else self.encoded

    def decode(self, data: bytes) -> list[str]:
        """Split them."""
        return data.decode().split()


def there_and_back(codec: Codec, state: Any) -> Any:
    """Encode and decode."""
    name, data = codec.encode(state)
    return codec.decode(name, bytes(data))


# --- msgpack -----------------------------------------------------------------------------------------------------------


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(plain.filter(lambda state: not isinstance(state, bytes)))
def test_plain_values(state: Any) -> None:
    """Whatever msgpack knows comes back as it was."""
    codec = Codec()
    assert codec.encode(state)[0] == MSGPACK
    assert there_and_back(codec, state) == state


def test_plain_values_need_no_text_as_keys() -> None:
    """Numbers are keys, too; a tuple comes back as a list, because msgpack has no tuples."""
    assert there_and_back(Codec(), {1: (2, 3)}) == {1: [2, 3]}


@pytest.mark.parametrize(
    ("state", "plain"),
    [
        (Account("ann", [1, 2]), {"owner": "ann", "amounts": [1, 2]}),
        (Order(7, Account("bob")), {"number": 7, "account": {"owner": "bob", "amounts": []}}),
        (Point(1, 2), {"x": 1, "y": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_records(state: Any, plain: dict[str, Any]) -> None:
    """They are stored as plain values, and come back as what they were when the type or a default says so."""
    assert there_and_back(Codec(), state) == plain
    assert there_and_back(Codec(type(state)), state) == state
    assert Codec().like(plain, state) == state


@pytest.mark.parametrize("given", [list[int], dict[str, Point], datetime.date, int | None], ids=str)
def test_types(given: Any) -> None:
    """Any type that msgspec knows may be given, also generic ones and unions."""
    state = {"list[int]": [1], "dict[str": {"a": Point(1)}, "<class 'dat": datetime.date(1998, 5, 1), "int | None": None}
    value = next(value for name, value in state.items() if name[:8] in str(given))
    assert there_and_back(Codec(given), value) == value


@pytest.mark.parametrize("given", [Words, Point, dict[str, list[int]] | dict[int, int]], ids=str)
def test_type_that_does_not_fit_is_refused_when_something_is_stored(given: Any) -> None:
    """Such as a class in place of a codec object: else nobody would know before the first fail-over."""
    with pytest.raises(UsageError, match="could not be turned back into the codec's"):
        Codec(given).encode({"a": 1})


@pytest.mark.parametrize(
    "state",
    [object(), {"a": {1: object()}}, 1 << 64, -(1 << 63) - 1, "\ud800", lambda: None, 1j, [print]],
    ids=lambda state: type(state).__name__,
)
def test_what_cannot_be_encoded(state: Any) -> None:
    """The error says what it is and what can be done."""
    with pytest.raises(UsageError, match=r"cannot be stored as msgpack \(.+\): .*codec="):
        Codec().encode(state)


def test_state_that_holds_itself() -> None:
    """It has no end."""
    state: list[Any] = []
    state.append(state)
    with pytest.raises(UsageError, match="cannot be stored"):
        Codec().encode(state)


# --- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [MSGPACK, PICKLE, dict])
@pytest.mark.parametrize("make", [bytes, bytearray, memoryview], ids=lambda make: make.__name__)
def test_bytes_stay_what_they_are(make: Callable[[bytes], Any], given: Any) -> None:
    """Whatever the codec, and they come back as bytes; an empty state is one."""
    codec = Codec(given)
    for data in (b"", b"\0state\xff"):
        assert codec.encode(make(data))[0] == BYTES
        assert there_and_back(codec, make(data)) == data


def test_bytes_are_not_copied() -> None:
    """They cannot change."""
    state = bytes(100)
    assert Codec().encode(state)[1] is state


def test_what_may_change_is_copied() -> None:
    """The body may go on with it while it is handed over, and may resize it."""
    state = bytearray(b"before")
    _, data = Codec().encode(state)
    state[:] = b"after, and longer"
    assert data == b"before"


def test_memory_in_any_shape() -> None:
    """Views of numbers, and such with gaps, are stored as their bytes."""
    numbers = array.array("i", [1, 2, 3])
    assert Codec().encode(memoryview(numbers))[1] == numbers.tobytes()
    assert Codec().encode(memoryview(b"abcdef")[::2])[1] == b"ace"


# --- other codecs ------------------------------------------------------------------------------------------------------


def test_pickle_only_by_name() -> None:
    """What needs it is refused by msgpack, and checkpoints made by it are never decoded by another codec."""
    state = {1, 2}, 3 + 4j
    codec = Codec("pickle")
    assert codec.encode(state)[0] == PICKLE
    assert there_and_back(codec, state) == state
    for other in (Codec(), Codec(dict), Codec(Words())):
        with pytest.raises(CheckpointError, match="made with the codec 'pickle'"):
            other.decode(PICKLE, pickle.dumps(state))


def test_what_cannot_be_pickled() -> None:
    """That is the same kind of mistake."""
    with pytest.raises(UsageError, match="cannot be stored as pickle"):
        Codec("pickle").encode(lambda: None)


def test_own_codec() -> None:
    """An object with encode and decode gets everything, also bytes."""
    codec = Codec(Words())
    assert codec.encode(["a", "b"]) == ("words", b"a b")
    assert there_and_back(codec, ["a", "b"]) == ["a", "b"]
    with pytest.raises(CheckpointError, match="made with the codec 'bytes'"):
        codec.decode(BYTES, b"a b")


@pytest.mark.parametrize("make", [bytearray, memoryview], ids=lambda make: make.__name__)
def test_own_codec_may_use_its_buffer_again(make: Callable[[bytes], Any]) -> None:
    """What it returned has been copied by then."""
    buffer = bytearray(b"state")
    _, data = Codec(Words(make(buffer) if make is memoryview else buffer)).encode([])
    buffer[:] = b"other"
    assert data == b"state"


def test_own_codec_without_a_name_is_called_by_its_class() -> None:
    """So that the checkpoints of another one are told apart."""

    class Upper:
        """Nothing but what must be."""

        def encode(self, state: str) -> bytes:
            """To bytes."""
            return state.upper().encode()

        def decode(self, data: bytes) -> str:
            """And back."""
            return data.decode()

    assert Codec(Upper()).name == Upper.__qualname__[:64]


def test_own_codec_that_returns_no_bytes() -> None:
    """It is named."""
    with pytest.raises(UsageError, match="encode of the codec words returned str instead of bytes"):
        Codec(Words("text")).encode([])


@pytest.mark.parametrize("given", ["json", "", None, 5, b"msgpack", ["msgpack"], object()])
def test_what_is_no_codec(given: Any) -> None:
    """The message has what would be one."""
    with pytest.raises(UsageError, match="a codec is 'msgpack', 'pickle', a type"):
        Codec(given)


# --- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "name", "data"),
    [
        (Codec(), MSGPACK, b"\xc1"),
        (Codec(), MSGPACK, b""),
        (Codec(Point), MSGPACK, b"\x01"),
        (Codec("pickle"), PICKLE, b"?"),
        (Codec(Words()), "words", b"\xff"),
    ],
)
def test_what_does_not_decode(codec: Codec, name: str, data: bytes) -> None:
    """Whatever the decoder raises, it is a CheckpointError that says by what it was to be decoded."""
    with pytest.raises(CheckpointError, match=f"cannot be decoded as {name}"):
        codec.decode(name, data)


@pytest.mark.parametrize(("given", "name"), [(MSGPACK, "words"), (PICKLE, MSGPACK), (Point, PICKLE), (MSGPACK, "")])
def test_wrong_codec(given: Any, name: str) -> None:
    """A checkpoint of another codec is not guessed at."""
    with pytest.raises(CheckpointError, match=f"codec {name!r}, and this application uses"):
        Codec(given).decode(name, b"\x01")


def test_like_leaves_alone_what_needs_nothing() -> None:
    """Only plain dictionaries become records, and only where the default is one and no codec has done it."""
    codec = Codec()
    assert codec.like([1], Point(0)) == [1]
    assert codec.like({"x": 1}, {"x": 0}) == {"x": 1}
    assert codec.like({"x": 1}, None) == {"x": 1}
    assert Codec(Words()).like({"x": 1}, Point(0)) == {"x": 1}
    assert Codec(dict).like({"x": 1}, Point(0)) == {"x": 1}
    point = Point(3)
    assert codec.like(point, Point(0)) is point


def test_state_of_another_shape_is_not_like_the_default() -> None:
    """An application that has changed its record is told which field does not fit."""
    with pytest.raises(CheckpointError, match=r"no Point: .*`\$\.x`"):
        Codec().like({"x": "one"}, Point(0))
    with pytest.raises(CheckpointError, match=r"no Account: .*owner"):
        Codec().like({}, Account("ann"))


def test_default_of_a_class_that_msgspec_cannot_make() -> None:
    """That is an error of ours, too, and says why."""

    class Strange:
        """No record."""

    holder = dataclasses.make_dataclass("Holder", [("thing", Strange)])
    with pytest.raises(CheckpointError, match="no Holder"):
        Codec().like({"thing": 1}, holder(Strange()))


def test_records_are_known_without_their_libraries() -> None:
    """By what is on the class."""
    assert all(is_record(value) for value in (Account("a"), Order(1), Point(1)))
    assert not any(is_record(value) for value in (Account, Order, {}, None, 1, object()))


# --- sealed memory -----------------------------------------------------------------------------------------------------


def sealed(data: bytes) -> int:
    """Return memory with a state that is handed over."""
    fd = open_sealed()
    fill(fd, data)
    seal(fd)
    return fd


@pytest.mark.parametrize("size", [0, 1, 4096, 1_000_003])
def test_sealed_memory_has_the_state(size: int) -> None:
    """All of it, under the name by which the other side knows it, and no child inherits it."""
    data = os.urandom(size)
    fd = sealed(data)
    try:
        assert os.pread(fd, size + 1, 0) == data
        assert os.fstat(fd).st_size == size
        assert str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(f"/memfd:{STATE_NAME}")
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_sealed_memory_cannot_be_changed() -> None:
    """Not written, made longer or shorter, mapped for writing, nor can the seals be broken: not even by us."""
    fd = sealed(b"state")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        for each in (fd, again):
            with pytest.raises(PermissionError):
                os.pwrite(each, b"x", 0)
            for size in (0, 100):
                with pytest.raises(PermissionError):
                    os.ftruncate(each, size)
            with pytest.raises(PermissionError):
                mmap.mmap(each, 5, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            assert fcntl.fcntl(each, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
        assert os.pread(fd, 10, 0) == b"state"
    finally:
        os.close(fd)
        os.close(again)


def test_memory_is_not_sealed_while_somebody_may_write() -> None:
    """A mapping for writing that still is there would get around the seal."""
    fd = open_sealed()
    fill(fd, b"state")
    try:
        with mmap.mmap(fd, 5) as mapped:
            with pytest.raises(OSError, match="busy"):
                seal(fd)
            mapped[0] = 65
        seal(fd)
    finally:
        os.close(fd)
