"""Pieces as they travel: what we write and read is what the protobuf library reads and writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.checkpoint import exchange_pb2 as pb
from etcdreplica.checkpoint.wire import decode_piece, encode_piece

FIRST = st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1))


@given(FIRST, st.binary(max_size=400))
def test_protobuf_reads_what_we_write(first: int, data: bytes) -> None:
    """The message means the same to it."""
    message = pb.Piece.FromString(encode_piece((first, data)))
    assert (message.first, message.data) == (first, data)


@given(FIRST, st.binary(max_size=400))
def test_we_read_what_protobuf_writes(first: int, data: bytes) -> None:
    """Also where it leaves out what is zero or empty."""
    found, view = decode_piece(pb.Piece(first=first, data=data).SerializeToString())
    assert (found, bytes(view)) == (first, data)


@given(FIRST, st.binary(max_size=400))
def test_round_trip(first: int, data: bytes) -> None:
    """A view of other memory travels as well."""
    found, view = decode_piece(encode_piece((first, memoryview(data))))
    assert (found, bytes(view)) == (first, data)


def test_fields_in_another_order() -> None:
    """As another library may write them."""
    whole = pb.Piece(first=7, data=b"state").SerializeToString()
    head, tail = whole[:2], whole[2:]
    assert decode_piece(tail + head) == (7, b"state")


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_read_as_protobuf_does(garbage: bytes) -> None:
    """Nothing else comes of it than an error, or what the library makes of it."""
    try:
        expected = pb.Piece.FromString(garbage)
    except Exception:
        with pytest.raises(Exception, match=r".*"):
            decode_piece(garbage)
        return
    found, view = decode_piece(garbage)
    assert (found, bytes(view)) == (expected.first, expected.data)
