"""Frames of objects: what is no message ends the connection, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdreplica.errors import ProtocolError
from etcdreplica.objects.wire import (
    MAX_MESSAGE,
    Ack,
    Asks,
    Calls,
    Decoder,
    Hello,
    Message,
    Part,
    Records,
    Refuse,
    decode,
    encode_value,
    frame,
)

MESSAGES: list[Message] = [
    Hello(1, "ledger"),
    Calls(b"s" * 16, True, 1, [(1, "put", [1, "a", b"b", None, [1.5]], {"x": {"y": 1}})]),
    Asks([(2, "get", [], None)], None),
    Asks([], 0.5),
    Part(1, 0, 3, b"abc"),
    Records(1, 1, [b"", b"x" * 1000], 0, -1),
    Ack(1, 1 << 60),
    Refuse("no", diverged=True),
]


@given(st.lists(st.integers(1, 500), min_size=1))
@settings(max_examples=50, deadline=None)
def test_messages_come_out_as_they_went_in(cuts: list[int]) -> None:
    """However the bytes are cut up on their way."""
    data = b"".join(map(frame, MESSAGES))
    found: list[tuple[Message, bytes]] = []
    decoder, at = Decoder(), 0
    while at < len(data):
        size = cuts[at % len(cuts)]
        found += decoder.feed(data[at : at + size])
        at += size
    assert [message for message, _ in found] == MESSAGES
    assert [decode(body) for _, body in found] == MESSAGES


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_is_no_message(body: bytes) -> None:
    """Whatever it is, it is a message or a ProtocolError."""
    for data in (body, b"\x95\x03" + body, b"\x95\x03\xc4\x01s\xc3\x01\x91\x94\x01\xa1a\x91" + body + b"\xc0"):
        try:
            decode(data)
        except ProtocolError:
            continue


WRONG = [
    b"",
    b"\xc1",
    encode_value([]),
    encode_value({}),
    encode_value([99, 1]),
    encode_value(["1", 1, "a"]),
    encode_value([1, 1]),
    encode_value([1, "1", "ledger"]),
    encode_value([3, "text", True, 1, []]),
    encode_value([3, b"s", True, 1, [[1, "put", {}, None]]]),
    encode_value([3, b"s", True, 1, [[1, "put", [], [1]]]]),
    encode_value([3, b"s", True, 1, [[1, "put"]]]),
    encode_value([3, b"s", True, 1 << 64 - 1, None]),
    encode_value([11, 1, 2.5]),
    b"\x93\x01\x01\xa1\xff",
    b"\x95\x03\xc4\x01s\xc3\x01\x91\x94\x01\xa1a\x91\xa1\xff\xc0",
    b"\x95\x03\xc4\x01s\xc3\x01" + b"\x91" * 100_000,
    encode_value([1, 1, "a"])[:-1],
    encode_value([1, 1, "a"]) + b"\x00",
]


@pytest.mark.parametrize("body", WRONG)
def test_wrong_types_and_depths(body: bytes) -> None:
    """They are refused, also text that is no UTF-8 and nesting without end."""
    with pytest.raises(ProtocolError):
        decode(body)


def test_a_frame_over_the_limit() -> None:
    """It is refused by its length alone, before it is there; ours are refused before they are sent."""
    decoder = Decoder()
    with pytest.raises(ProtocolError, match="over the limit"):
        list(decoder.feed((MAX_MESSAGE + 1).to_bytes(4, "big")))
    with pytest.raises(ProtocolError, match="over the limit"):
        frame(Part(1, 0, 1, bytes(MAX_MESSAGE)))


def test_a_truncated_frame_is_waited_for() -> None:
    """Only what is complete comes out, and what came before it is not kept."""
    data = frame(MESSAGES[0])
    decoder = Decoder()
    assert [message for message, _ in decoder.feed(data * 3 + data[:-1])] == MESSAGES[:1] * 3
    assert list(decoder.feed(b"")) == []
    assert [message for message, _ in decoder.feed(data[-1:])] == MESSAGES[:1]


def test_messages_before_a_wrong_one_come_out() -> None:
    """Then it raises."""
    found = Decoder().feed(frame(MESSAGES[0]) + b"\x00\x00\x00\x01\xc1" + frame(MESSAGES[0]))
    assert next(found)[0] == MESSAGES[0]
    with pytest.raises(ProtocolError):
        next(found)
