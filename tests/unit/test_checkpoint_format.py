"""A checkpoint as a file: what was written comes back, and whatever else stands there is told from it."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.checkpoint.format import (
    CHUNK,
    DIGEST,
    MAGIC,
    PAGE,
    Manifest,
    chunk_count,
    damaged_chunks,
    digest,
    digests,
    prefix,
    read_prefix,
)
from etcdreplica.errors import DamagedError
from etcdreplica.model import Stamp

SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 77)
Opened = Callable[[bytes], int]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Return a way to have a file with some bytes, in memory."""
    fds: list[int] = []

    def open_file(data: bytes) -> int:
        fds.append(memory(data))
        return fds[-1]

    yield open_file
    for fd in fds:
        os.close(fd)


def memory(data: bytes) -> int:
    """Return a descriptor of a file in memory."""
    fd = os.memfd_create("checkpoint")
    os.pwrite(fd, data, 0)
    return fd


@functools.cache
def state_of(size: int) -> bytes:
    """Return a state in which no two chunks are the same."""
    return b"".join(struct.pack(">Q", i) for i in range(-(-size // 8)))[:size]


def manifest_of(state: bytes) -> Manifest:
    """Return what belongs to a state."""
    return Manifest("shop", Stamp(7, 3), "msgpack", len(state), digests(state), 12.5)


@functools.cache
def file_of(state: bytes) -> bytes:
    """Return the whole file of a state."""
    return prefix(manifest_of(state)) + state


def damage(data: bytes) -> str:
    """Say what is wrong with a file, or nothing."""
    fd = memory(data)
    try:
        manifest, begin = read_prefix(fd)
        assert manifest.app == "shop"
        return ", ".join(f"chunk {index}" for index in damaged_chunks(fd, begin, manifest))
    except DamagedError as error:
        return str(error)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(size: int, opened: Opened) -> None:
    """All of the manifest comes back, the state begins at a whole page, and no chunk is damaged."""
    state = state_of(size)
    manifest = manifest_of(state)
    fd = opened(file_of(state))
    found, begin = read_prefix(fd)
    assert found == manifest
    assert begin == len(prefix(manifest))
    assert begin % PAGE == 0
    assert os.pread(fd, size + 1, begin) == state
    assert list(damaged_chunks(fd, begin, found)) == []


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (CHUNK, 1), (CHUNK + 1, 2), (3 * CHUNK, 3)])
def test_chunks(size: int, count: int) -> None:
    """Every chunk is full but the last one, and has a digest of its own."""
    state = state_of(size)
    manifest = manifest_of(state)
    assert chunk_count(size) == manifest.count == count
    assert len(manifest.digests) == DIGEST * count
    assert sum(manifest.length(i) for i in range(count)) == size
    assert [manifest.chunk(i) for i in range(count)] == [digest(state[CHUNK * i :][:CHUNK]) for i in range(count)]


def test_digest_of_a_manifest_is_one_for_all_of_the_state() -> None:
    """It changes with the last byte."""
    state = state_of(2 * CHUNK)
    assert manifest_of(state).digest != manifest_of(state[:-1] + b"x").digest
    assert len(manifest_of(b"").digest) == 2 * DIGEST


@given(st.sampled_from((1, CHUNK, CHUNK + 1)), st.data())
def test_flipped_bit_is_found(size: int, data: st.DataObject) -> None:
    """Wherever it is, but for the zeros before the state, which carry nothing."""
    whole = bytearray(file_of(state_of(size)))
    told = len(MAGIC) + 4 + struct.unpack_from(">I", whole, len(MAGIC))[0] + DIGEST * chunk_count(size) + DIGEST
    begin = len(whole) - size
    at = data.draw(st.integers(0, told - 1) | st.integers(begin, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    assert damage(bytes(whole))


@given(st.sampled_from(SIZES), st.data())
def test_file_that_was_cut_off_is_found(size: int, data: st.DataObject) -> None:
    """Wherever it was cut."""
    whole = file_of(state_of(size))
    assert damage(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.sampled_from(SIZES), st.binary(min_size=1, max_size=100))
def test_file_that_has_grown_is_found(size: int, more: bytes) -> None:
    """Whatever was added."""
    whole = file_of(state_of(size))
    assert damage(whole + more) == f"it has {len(whole) + len(more)} bytes instead of {len(whole)}"


@pytest.mark.parametrize("index", [0, 2, 4])
def test_damaged_chunks_are_named(index: int, opened: Opened) -> None:
    """Only the chunk that has changed is damaged."""
    state = bytearray(state_of(5 * CHUNK))
    whole = bytearray(file_of(bytes(state)))
    begin = len(whole) - len(state)
    whole[begin + CHUNK * index + 5] ^= 0x10
    fd = opened(bytes(whole))
    manifest, begin = read_prefix(fd)
    assert list(damaged_chunks(fd, begin, manifest)) == [index]


# --- what others have written ------------------------------------------------------------------------------------------


def forged(header: bytes, *, length: int | None = None, rest: bytes = b"") -> bytes:
    """Return a file with any header, whose digest is right as far as it goes."""
    told = MAGIC + struct.pack(">I", len(header) if length is None else length) + header + rest
    return told + digest(told)


def header_of(**changes: object) -> bytes:
    """Return a header as JSON."""
    fields = {"app": "shop", "epoch": 1, "sequence": 1, "codec": "bytes", "size": 0, "wall": 0.0}
    return msgspec.json.encode({**fields, **changes})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        MAGIC[:-1],
        MAGIC + b"\0\0\0",
        MAGIC + b"\xff" * 4,
        MAGIC + b"\xff" * 5000,
        MAGIC + bytes(5000),
        forged(b"\xff\xfe"),
        forged(header_of(app="shop").replace(b"shop", b"sh\xffp")),
        forged(b"{}"),
        forged(b"[]"),
        forged(b"null"),
        forged(b"[" * 4000),
        forged(header_of(), length=0xFFFFFFFF),
        forged(header_of(), length=4097),
        forged(header_of(size=-1)),
        forged(header_of(size=-(1 << 62))),
        forged(header_of(size=1 << 40)),
        forged(header_of(size=1 << 62)),
        forged(header_of(size=(1 << 63) - 1)),
        forged(header_of(size=(1 << 64) - 1)),
        forged(header_of().replace(b'"size":0', b'"size":' + b"9" * 40)),
        forged(header_of().replace(b'"size":0', b'"size":1e300')),
        forged(header_of(epoch="x")),
        forged(header_of(wall=None)),
    ],
    ids=lambda data: repr(data[:70]),
)
def test_what_is_no_checkpoint(data: bytes, opened: Opened) -> None:
    """It is damaged, and nothing else happens: no memory is taken for what only a header claims."""
    with pytest.raises(DamagedError):
        read_prefix(opened(data))


@given(st.binary(max_size=6000), st.booleans())
def test_garbage(data: bytes, magic: bool) -> None:
    """No bytes make anything else happen."""
    assert damage((MAGIC if magic else b"") + data)


@given(st.binary(min_size=1, max_size=64), st.integers(0, 300))
def test_overwritten_beginning(data: bytes, at: int) -> None:
    """A page that another one was written over is damaged, or as it was."""
    whole = bytearray(file_of(state_of(10)))
    before = bytes(whole)
    whole[at : at + len(data)] = data
    told = len(MAGIC) + 4 + struct.unpack_from(">I", before, len(MAGIC))[0] + 2 * DIGEST
    assert damage(bytes(whole)) or whole[:told] == before[:told]
