"""Options of TLS between hosts, and the arithmetic of chunks on their way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.checkpoint.format import CHUNK, Manifest, digests
from etcdreplica.checkpoint.peers import PIECE, Holds, from_message, pieces, span_bytes, spans, to_message
from etcdreplica.core.holders import NOTHING
from etcdreplica.daemon.tls import PeerTls
from etcdreplica.errors import ConfigurationError
from etcdreplica.model import Stamp

chunks = st.sets(st.integers(0, 200))


def manifest_of(size: int, epoch: int = 3, sequence: int = 4) -> Manifest:
    """Return that of a state of zeros."""
    return Manifest("shop", Stamp(epoch, sequence), "msgpack", size, digests(bytes(size)), 1.5)


# --- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [("ca",), ("ca", "cert"), ("ca", None, "key"), (None, "cert", "key"), (None, None, "key")])
def test_tls_is_whole_or_not_at_all(given: tuple[str | None, ...]) -> None:
    """A part of it would be no protection: the error names the options."""
    with pytest.raises(ConfigurationError, match="three files: --peer-ca, --peer-cert and --peer-key"):
        PeerTls(*given)


def test_tls_is_off_without_files() -> None:
    """Also where a variable of the environment is empty."""
    assert not PeerTls()
    assert not PeerTls("", "", "")
    assert PeerTls("ca", "cert", "key")


class Server:
    """Takes ports as gRPC does."""

    def __init__(self, error: bool = False) -> None:
        self.error = error

    def add_insecure_port(self, listen: str) -> int:
        """Listen in clear."""
        if self.error:
            raise RuntimeError("taken")
        return int(listen.rpartition(":")[2])

    def add_secure_port(self, listen: str, _: Any) -> int:
        """Listen with TLS."""
        return self.add_insecure_port(listen)


def test_address_that_is_taken() -> None:
    """The error names what listens there."""
    assert PeerTls().bind(Server(), "127.0.0.1:7410", "checkpoint") == 7410
    with pytest.raises(ConfigurationError, match=r"cannot listen on the checkpoint address 127\.0\.0\.1:7410"):
        PeerTls().bind(Server(error=True), "127.0.0.1:7410", "checkpoint")


@pytest.mark.parametrize("missing", ["ca", "cert", "key"])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, missing: str) -> None:
    """Both where one listens and where one connects."""
    paths = {name: tmp_path / name for name in ("ca", "cert", "key")}
    for name, path in paths.items():
        if name != missing:
            path.write_text("?")
    tls = PeerTls(*map(str, paths.values()))
    with pytest.raises(ConfigurationError, match=f"cannot read the TLS file {paths[missing]}: No such file"):
        tls.bind(Server(), "127.0.0.1:0", "peer")
    with pytest.raises(ConfigurationError, match=f"cannot read the TLS file {paths[missing]}"):
        tls.channel("127.0.0.1:1", ())


# --- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "runs"),
    [
        ([], []),
        ([5], [(5, 1)]),
        ([0, 1, 2], [(0, 3)]),
        ([0, 2, 4], [(0, 1), (2, 1), (4, 1)]),
        ([3, 1, 2, 9, 8], [(1, 3), (8, 2)]),
    ],
)
def test_spans(numbers: list[int], runs: list[tuple[int, int]]) -> None:
    """Numbers in a row become one run, whatever their order."""
    assert spans(numbers) == runs


@given(chunks)
def test_spans_have_each_chunk_once(numbers: set[int]) -> None:
    """Nothing is lost or asked for twice, and no two runs touch."""
    runs = spans(numbers)
    assert [i for first, many in runs for i in range(first, first + many)] == sorted(numbers)
    assert all(before + many < after for (before, many), (after, _) in pairwise(runs))


@given(chunks, st.integers(0, 200))
def test_pieces_carry_each_chunk_once(numbers: set[int], count: int) -> None:
    """In order, no more at once than fits into a message, and nothing that is not there."""
    cut = list(pieces(spans(numbers), count))
    assert [i for first, many in cut for i in range(first, first + many)] == sorted(i for i in numbers if i < count)
    assert all(1 <= many <= PIECE for _, many in cut)


@pytest.mark.parametrize(
    "ranges", [[(-5, 3)], [(10, 1)], [(0, 0)], [(3, -1)], [(1 << 62, 1 << 62)], [(-(1 << 62), 1)], [(10, 1 << 62)]]
)
def test_what_a_peer_cannot_have_meant_is_left_out(ranges: list[tuple[int, int]]) -> None:
    """Ranges come from the network."""
    assert list(pieces(ranges, 10)) == []


def test_ranges_that_overlap_the_ends_are_cut() -> None:
    """What is there is sent."""
    assert list(pieces([(-2, 4), (8, 1 << 62)], 10)) == [(0, 2), (8, 2)]


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 20 * CHUNK + 7])
def test_span_bytes_cover_the_state(size: int) -> None:
    """The pieces of all chunks are the whole state, one after the other."""
    manifest, at = manifest_of(size), 0
    for first, count in pieces([(0, manifest.count)], manifest.count):
        begin, length = span_bytes(manifest, first, count)
        assert begin == at
        at += length
    assert at == size


@pytest.mark.parametrize("whole", [True, False])
def test_manifests_travel(whole: bool) -> None:
    """With their digests where they are wanted."""
    manifest = manifest_of(3 * CHUNK)
    found = from_message(to_message(manifest, whole=whole))
    assert found.digests == (manifest.digests if whole else b"")
    assert (found.app, found.stamp, found.codec, found.size, found.wall) == ("shop", Stamp(3, 4), "msgpack", 3 * CHUNK, 1.5)


def test_newest_of_what_a_host_holds() -> None:
    """It comes first; a host without any holds nothing."""
    assert Holds((manifest_of(1, 2, 2), manifest_of(1, 2, 1))).stamp == Stamp(2, 2)
    assert Holds().stamp == NOTHING
