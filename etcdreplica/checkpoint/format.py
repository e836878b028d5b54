"""One checkpoint as a file: who it belongs to, the digest of each chunk, then the state, beginning at a whole page.

    magic, length of the header (4 bytes), header (JSON), digests of the chunks, digest of all before it, zeros, the state

A file that was torn, cut off or changed is told by the digests; `read_prefix` looks at all but the state, `damage` at that.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import msgspec
from attrs import frozen
from blake3 import blake3

from etcdreplica.errors import DamagedError
from etcdreplica.model import Stamp

MAGIC = b"etcdreplica checkpoint 1\n"
CHUNK = 1 << 16  # bytes; what has changed is found, and moved, in units of this
DIGEST = 16  # bytes
PAGE = 4096
_LENGTH = struct.Struct(">I")
_MAX_HEADER = 4096


class _Header(msgspec.Struct):
    app: str
    epoch: int
    sequence: int
    codec: str
    size: int
    wall: float


_decode = msgspec.json.Decoder(_Header).decode


@frozen
class Manifest:
    """What a checkpoint is, and the digest of each of its chunks, one after the other."""

    app: str
    stamp: Stamp
    codec: str
    size: int
    digests: bytes
    wall: float = 0.0

    @property
    def digest(self) -> str:
        """One digest for all of the state, in hexadecimal."""
        return digest(self.digests).hex()

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return chunk_count(self.size)

    def chunk(self, index: int) -> bytes:
        """The digest of one chunk."""
        return self.run(index, 1)

    def run(self, first: int, count: int) -> bytes:
        """The digests of chunks that follow each other."""
        return self.digests[DIGEST * first : DIGEST * (first + count)]

    def length(self, index: int) -> int:
        """How many bytes one chunk has."""
        return min(CHUNK, self.size - CHUNK * index)


def digest(data: bytes | memoryview) -> bytes:
    """Return the digest of a chunk."""
    return blake3(data).digest(DIGEST)


def digests(data: bytes | memoryview) -> bytes:
    """Return those of all chunks, one after the other."""
    view = memoryview(data)
    return b"".join(digest(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK))


def chunk_count(size: int) -> int:
    """Return how many chunks a state of so many bytes has."""
    return -(-size // CHUNK)


def prefix(manifest: Manifest) -> bytes:
    """Return what a file begins with."""
    stamp = manifest.stamp
    header = msgspec.json.encode(
        _Header(manifest.app, stamp.epoch, stamp.sequence, manifest.codec, manifest.size, manifest.wall)
    )
    told = b"".join((MAGIC, _LENGTH.pack(len(header)), header, manifest.digests))
    told += digest(told)
    return told + bytes(-len(told) % PAGE)


def read_prefix(fd: int) -> tuple[Manifest, int]:
    """Return what a file holds, and where its state begins. Raises DamagedError."""
    start = os.pread(fd, len(MAGIC) + _LENGTH.size + _MAX_HEADER, 0)
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + _LENGTH.size:
        raise DamagedError("it is no checkpoint")
    (length,) = _LENGTH.unpack_from(start, len(MAGIC))
    header_at = len(MAGIC) + _LENGTH.size
    try:
        header = _decode(start[header_at : header_at + length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise DamagedError("its header is damaged") from None
    end = header_at + length + DIGEST * chunk_count(header.size)
    found = os.fstat(fd).st_size
    if length > _MAX_HEADER or header.size < 0 or end + DIGEST > found:  # no memory is taken for what it only claims
        raise DamagedError("its header is damaged")
    told = os.pread(fd, end + DIGEST, 0)
    if len(told) < end + DIGEST or digest(told[:end]) != told[end:]:
        raise DamagedError("its header is damaged")
    begin = end + DIGEST + -(end + DIGEST) % PAGE
    if found != begin + header.size:
        raise DamagedError(f"it has {found} bytes instead of {begin + header.size}")
    stamp = Stamp(header.epoch, header.sequence)
    return Manifest(header.app, stamp, header.codec, header.size, told[header_at + length : end], header.wall), begin


def damaged_chunks(fd: int, begin: int, manifest: Manifest) -> Iterator[int]:
    """Yield the chunks of a file that are not what they were."""
    for index in range(manifest.count):
        if digest(os.pread(fd, manifest.length(index), begin + CHUNK * index)) != manifest.chunk(index):
            yield index
