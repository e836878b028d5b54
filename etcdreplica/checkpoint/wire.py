"""Pieces of a state as they travel: the message Piece of `exchange.proto`, put together and taken apart without copies.

The protobuf library copies each piece twice more on either side, which makes a transfer take twice as long. What goes over the
wire is the same, and whatever else a protobuf library may write for a Piece is read as well.
"""

from __future__ import annotations

from etcdreplica.checkpoint import exchange_pb2 as pb

Piece = tuple[int, bytes | memoryview]
_FIRST, _DATA = 0x08, 0x12  # field 1, a varint; field 2, bytes


def encode_piece(piece: Piece) -> bytes:
    """Return a message."""
    first, data = piece
    return b"".join((bytes((_FIRST,)), _varint(first), bytes((_DATA,)), _varint(len(data)), data))


def decode_piece(message: bytes) -> Piece:
    """Return what a message says; the data are a view of it. Raises ValueError, or what protobuf raises."""
    at, first = 0, 0
    if message[:1] == bytes((_FIRST,)):
        first, at = _read_varint(message, 1)
    if message[at : at + 1] == bytes((_DATA,)):
        length, begin = _read_varint(message, at + 1)
        if begin + length == len(message):
            return first, memoryview(message)[begin:]
    other = pb.Piece.FromString(message)
    return other.first, other.data


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while shift < 64 and at < len(message):
        number |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 0x80:
            return number, at
    raise ValueError("a number is cut off")
