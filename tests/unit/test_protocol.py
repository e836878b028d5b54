"""The local socket's frames: whatever way the bytes arrive, and whatever they are."""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.app.protocol import MAX_FRAME, SOCKET_ENV, Decoder, default_socket, encode
from etcdreplica.errors import ProtocolError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
fields = st.dictionaries(st.sampled_from(["app", "epoch", "role", "registration"]), values, max_size=4)
messages = st.lists(st.tuples(st.text(), fields), max_size=5)


def frame(body: bytes) -> bytes:
    """Return any body as a frame."""
    return struct.pack(">I", len(body)) + body


@given(messages, st.data())
def test_frames_survive_any_splitting(sent: list[tuple[str, dict[str, Any]]], data: st.DataObject) -> None:
    """Bytes may arrive in pieces of any size; the messages come out whole and in order."""
    stream = b"".join(encode(kind, **given_fields) for kind, given_fields in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    decoder = Decoder()
    received = [m for start, end in pairwise([0, *cuts, len(stream)]) for m in decoder.feed(stream[start:end])]
    assert received == [{"type": kind, **given_fields} for kind, given_fields in sent]


def test_message_is_out_as_soon_as_its_last_byte_is_in() -> None:
    """Nothing waits for the next frame."""
    data = encode("role", epoch=7)
    decoder = Decoder()
    for byte in data[:-1]:
        assert list(decoder.feed(bytes([byte]))) == []
    assert list(decoder.feed(data[-1:])) == [{"type": "role", "epoch": 7}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 5000,
        b"null",
        b"[]",
        b'"hello"',
        b"7",
        b"{}",
        b'{"type":null}',
        b'{"type":7}',
        b'{"type":["hello"]}',
    ],
)
def test_what_is_no_message_raises(body: bytes) -> None:
    """A body must be a JSON object whose type is a text."""
    with pytest.raises(ProtocolError):
        list(Decoder().feed(frame(body)))


def test_messages_before_garbage_are_delivered() -> None:
    """An error takes nothing back."""
    stream = Decoder().feed(encode("ok") + frame(b"garbage"))
    assert next(stream) == {"type": "ok"}
    with pytest.raises(ProtocolError):
        next(stream)


def test_oversized_frame_is_refused_by_its_length_alone() -> None:
    """Nobody has to buffer what is too long, and what is no frame at all, such as HTTP, looks too long."""
    with pytest.raises(ProtocolError, match="over the limit of 16"):
        list(Decoder(max_frame=16).feed(struct.pack(">I", 17)))
    with pytest.raises(ProtocolError):
        list(Decoder().feed(b"GET / HTTP/1.1\r\n"))


def test_frame_of_the_largest_size_passes() -> None:
    """The limit itself is allowed."""
    text = "x" * (MAX_FRAME - len(json.dumps({"type": "advertise", "endpoint": ""}, separators=(",", ":"))))
    data = encode("advertise", endpoint=text)
    assert len(data) == MAX_FRAME + 4
    (message,) = Decoder().feed(data)
    assert message["endpoint"] == text


def test_too_large_message_is_not_sent() -> None:
    """The sender learns it, not the receiver, and is told what was too large."""
    with pytest.raises(ProtocolError, match=r"a hello message of .* bytes is over the limit"):
        encode("hello", registration="x" * MAX_FRAME)


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_a_protocol_error(data: bytes) -> None:
    """A stranger on the socket can at most end his own connection."""
    try:
        received = list(Decoder(max_frame=64).feed(data))
    except ProtocolError:
        return
    assert all(isinstance(message["type"], str) for message in received)


def test_socket_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable decides where an application looks for its WatchDog."""
    monkeypatch.setenv(SOCKET_ENV, "/somewhere/s")
    assert default_socket() == "/somewhere/s"


def test_default_socket_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable each user has one place."""
    monkeypatch.delenv(SOCKET_ENV, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    path = Path(default_socket())
    assert path.name == "watchdog.sock"
    assert path.parent == Path("/run/etcdreplica" if os.geteuid() == 0 else "/run/user/7/etcdreplica")
