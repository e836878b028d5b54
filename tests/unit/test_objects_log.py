"""The log of an object and its two sides at their edges."""

from __future__ import annotations

import pytest

from etcdreplica import update
from etcdreplica.app.state import Codec
from etcdreplica.errors import CheckpointError, ProtocolError
from etcdreplica.objects import log as log_module
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.log import Log
from etcdreplica.objects.machine import BARRIER, CHECK, Machine, record_of
from etcdreplica.objects.primary import PrimaryLog
from etcdreplica.objects.wire import Part, Records

NOTE = record_of(BARRIER, 0.0)
OTHER = record_of(BARRIER, 1.0)


class Thing:
    """Something."""

    def __init__(self) -> None:
        self.count = 0

    @update
    def add(self) -> None:
        """Count."""
        self.count += 1


def filled(count: int, first: int = 1) -> Log:
    """Return a log of records that tell them apart."""
    log = Log(first)
    log.extend(b"%d" % index for index in range(first, first + count))
    return log


def backup(applied: int = 0, held: int = 0) -> BackupLog:
    """Return a copy that has applied so many records, and holds more."""
    machine = Machine(Thing, Codec())
    machine.begin(0.0)
    found = BackupLog(machine)
    found.take(Records(1, 1, [NOTE] * (applied + held), applied, applied + held))
    list(found.apply_committed())
    return found


def test_batches_are_of_some_records_or_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From either end, and never nothing if there is something."""
    monkeypatch.setattr(log_module, "BATCH_RECORDS", 3)
    log = filled(10, first=5)
    for index in range(5, 15):
        assert log.batch(index) == [b"%d" % found for found in range(index, min(index + 3, 15))]
    assert log.batch(15) == log.batch(16) == []
    monkeypatch.setattr(log_module, "BATCH_BYTES", 1)
    assert log.batch(13) == [b"13"]


@pytest.mark.parametrize(("records", "size", "first"), [(4, 1 << 20, 7), (100, 6, 6), (100, 0, 9), (0, 1 << 20, 9)])
def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch, records: int, size: int, first: int) -> None:
    """The oldest records go first, none that is not committed."""
    monkeypatch.setattr(log_module, "KEEP_RECORDS", records)
    monkeypatch.setattr(log_module, "KEEP_BYTES", size)
    log = filled(10)
    log.trim(8)
    assert (log.first, log.last) == (first, 10)
    assert log.size == sum(len(log[index]) for index in range(log.first, 11))


def test_a_log_is_cut_and_cleared() -> None:
    """Sizes and indices follow."""
    log = filled(10)
    log.cut(3)
    log.cut(8)
    assert (log.last, log.size, log.append(b"xx")) == (3, 3, 4)
    log.clear(100)
    assert (log.first, log.last, log.size) == (100, 99, 0)


def test_acknowledged_is_what_all_in_sync_copies_hold() -> None:
    """While the set changes, those of both sets."""
    log = PrimaryLog(1, {1, 2}, filled(5), 0)
    assert log.ack(2, 3)
    log.change({1, 3})
    assert not log.ack(2, 5)
    assert log.commit == 3
    assert not log.may_join(3)
    assert log.ack(3, 4)
    assert log.commit == 4
    assert log.changed({1, 2})
    assert log.commit == 5
    assert (log.ack(2, 99), log.commit) == (False, 5)


def test_commit_never_goes_back() -> None:
    """Whoever joins or goes; who comes back has to say anew what it holds."""
    log = PrimaryLog(1, {1, 2}, filled(5), 0)
    log.ack(2, 5)
    log.gone(2)
    assert not log.advance()
    assert log.commit == 5
    log.ack(2, 4)
    assert log.commit == 5
    log.log.append(b"6")
    log.changed({1})
    assert not log.may_join(2), "it lacks what is committed"
    assert log.commit == 5, "it holds nothing more itself yet"
    assert log.ack(1, 6)


def test_a_takeover_is_staged() -> None:
    """Until all of a new primary's records are there, the old ones are."""
    copy = backup(applied=2, held=3)
    assert not copy.take(Records(2, 3, [OTHER], 2, 4))
    assert [copy.log[index] for index in range(1, 6)] == [NOTE] * 5
    with pytest.raises(ProtocolError, match="record 5 came for a copy that has 3"):
        copy.take(Records(2, 5, [OTHER], 2, 4))
    assert not copy.take(Records(2, 3, [OTHER], 2, 4)), "from the beginning"
    assert copy.take(Records(2, 4, [OTHER], 3, 4))
    assert [copy.log[index] for index in range(1, copy.log.last + 1)] == [NOTE, NOTE, OTHER, OTHER]
    assert copy.commit == 3


def test_a_takeover_that_is_interrupted_leaves_everything() -> None:
    """A newer primary begins anew, and what was staged is forgotten."""
    copy = backup(applied=2, held=3)
    copy.take(Records(2, 3, [OTHER], 2, 9))
    assert copy.fence(3)
    with pytest.raises(ProtocolError):
        copy.take(Records(3, 4, [OTHER], 2, 4))
    assert not copy.take(Records(2, 4, [OTHER] * 6, 2, 9)), "of an older epoch"
    copy.apply_all()
    assert copy.machine.index == 5


def test_records_only_follow_a_takeover() -> None:
    """In each epoch anew, and without gaps."""
    copy = backup(applied=2)
    with pytest.raises(ProtocolError):
        copy.take(Records(2, 3, [OTHER], 3, -1))
    assert copy.take(Records(2, 3, [], 2, 2))
    assert copy.take(Records(2, 3, [OTHER], 99, -1))
    assert copy.commit == 3, "no further than what is held"
    with pytest.raises(ProtocolError, match="record 5 came"):
        copy.take(Records(2, 5, [OTHER], 5, -1))


def test_a_snapshot_is_certain_when_it_is_committed() -> None:
    """Before that this copy can become primary with it, but another primary must not build on it."""
    source = backup(applied=0, held=4)
    source.apply_all()
    data = source.machine.snapshot()
    machine = Machine(Thing, Codec())
    copy = BackupLog(machine)
    assert copy.position(7).history == b""
    assert not copy.take_part(Part(2, 0, len(data), data[:5]))
    assert copy.take_part(Part(2, 5, len(data), data[5:]))
    assert (machine.index, copy.log.first, copy.log.last) == (4, 5, 4)
    assert (copy.position(7).history, copy.position(7).applied) == (b"", 0)
    assert copy.take(Records(2, 5, [NOTE], 3, -1))
    assert copy.position(7).history == b""
    copy.take(Records(2, 6, [], 4, -1))
    assert (copy.position(7).history, copy.position(7).applied) == (machine.history, 4)


def test_parts_of_snapshots_out_of_order() -> None:
    """They are refused; the first part begins anew, and an older epoch is not heard."""
    data = backup(applied=1).machine.snapshot()
    copy = BackupLog(Machine(Thing, Codec()), 2)
    assert not copy.take_part(Part(1, 0, len(data), data))
    assert not copy.take_part(Part(2, 0, len(data), data[:3]))
    for part in (Part(2, 4, len(data), b"x"), Part(2, 3, 4, b"too long")):
        with pytest.raises(ProtocolError, match="out of order"):
            copy.take_part(part)
    assert copy.take_part(Part(2, 0, len(data), data))
    with pytest.raises(CheckpointError):
        copy.take_part(Part(2, 0, 3, b"bad"))
    assert copy.machine.index == 1


def test_a_digest_is_asked_for_after_its_record() -> None:
    """Not after those that were applied with it."""
    copy = backup()
    copy.take(Records(1, 1, [NOTE, record_of(CHECK, 0.0), NOTE, record_of(CHECK, 0.0), NOTE], 5, -1))
    assert [(index, copy.machine.index) for index in copy.apply_committed()] == [(2, 2), (4, 4)]
    assert copy.machine.index == 5
