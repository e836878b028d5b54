"""The log of replicated objects under any order of faults: hypothesis plays copies, connections, clients and etcd.

Only the pure parts are real: Log, PrimaryLog, BackupLog, Machine. Around them stand the rules of `objects.leading`,
`objects.following` and `objects.client`, each in steps between which anything may happen: messages are late, come in part, or
are lost with their connection; changes of the in-sync set are refused, or happen untold, or happen later; primaries die
at any point, and any in-sync copy may be the next one. Logs are so short here that copies often need a snapshot.
"""

from __future__ import annotations

from itertools import count

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from etcdreplica.app.state import Codec
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.copies import Members
from etcdreplica.objects.leading import Me, survivors
from etcdreplica.objects.machine import BARRIER, CALLS, CHECK, TICK, Machine, record_of
from etcdreplica.objects.primary import PrimaryLog
from etcdreplica.objects.wire import DONE, Ack, Call, Calls, Part, Position, Records, decode, encode_value
from tests.unit.objects_world import Client, Copy, Journal, Link, Reign, Write


class Protocol(RuleBasedStateMachine):
    """One object, its copies and clients."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in (("BATCH_RECORDS", 2), ("KEEP_RECORDS", 3)):
            self.patch.setattr(f"etcdreplica.objects.log.{name}", value)
        self.copies: dict[int, Copy] = {}
        self.incarnations = count(1)
        self.clients = [Client(bytes([number]) * 16) for number in range(2)]
        self.record = Members(0, 0, 0, {})
        self.placed = 0  # the primary by what stands in etcd
        self.epoch = 0
        self.acknowledged: dict[str, int] = {}  # by entry what was answered
        self.committed: dict[int, bytes] = {}  # by index the record
        self.digests: dict[tuple[int, bytes], bytes] = {}

    def teardown(self) -> None:
        """Put the limits back."""
        self.patch.undo()

    @initialize(copies=st.integers(1, 3), settled=st.booleans())
    def begin(self, copies: int, settled: bool) -> None:
        """Start some copies."""
        for _ in range(copies):
            self.start()
        self.promote(0)
        if settled:
            for number in sorted(self.copies):
                self.connect(number)
                self.settle(number)
            self.want(set())
            self.write_happens(answered=True)

    # --- which copy ------------------------------------------------------------------------------------------------

    @property
    def leader(self) -> tuple[Copy, Reign] | None:
        """The copy that is primary, if one is."""
        return next(((copy, copy.reign) for copy in self.copies.values() if copy.reign is not None), None)

    def some(self, pick: int) -> Copy:
        """Choose a copy that is not primary if there is one."""
        backups = [copy for copy in self.copies.values() if copy.reign is None] or list(self.copies.values())
        return backups[pick % len(backups)]

    @precondition(lambda self: len(self.copies) < 4)
    @rule()
    def start(self) -> None:
        """Start a copy. It has nothing."""
        machine = Machine(Journal, Codec())
        number = next(self.incarnations)
        self.copies[number] = Copy(number, machine, BackupLog(machine))

    @rule(pick=st.integers(0, 5))
    def end_backup(self, pick: int) -> None:
        """Kill a copy that is not primary."""
        copy = self.some(pick)
        if copy.reign is None and (self.copies.keys() - {copy.number}) & self.record.hosts.keys():
            self.end(copy)

    @rule()
    def end_primary(self) -> None:
        """Kill the primary. What its clients had sent is lost, but answers may be on their way: they are lost too."""
        if self.leader is not None and (self.copies.keys() - {self.leader[0].number}) & self.record.hosts.keys():
            self.end(self.leader[0])

    def end(self, copy: Copy) -> None:
        """Kill a copy."""
        del self.copies[copy.number]
        for other in self.copies.values():
            if other.led is not None and other.led[0] == copy.number:
                other.led = None
            if other.reign is not None and other.reign.links.pop(copy.number, None) is not None:
                other.reign.log.gone(copy.number)

    @precondition(lambda self: self.leader is None)
    @rule(pick=st.integers(0, 5))
    def promote(self, pick: int) -> None:
        """Make an in-sync copy primary, or any one in the beginning."""
        able = sorted(n for n in self.copies if n in self.record.hosts or not self.record.hosts)
        copy = self.copies[able[pick % len(able)]]
        self.epoch += 1
        self.placed = copy.number
        assert not self.record.hosts or copy.machine.instance is not None, "an in-sync copy has no state"
        copy.backup.fence(self.epoch)
        copy.led = None
        copy.backup.apply_all()
        if copy.machine.instance is None:
            copy.machine.begin(0.0)
        me = Me("journal", str(copy.number), copy.number, float)
        log = PrimaryLog(copy.number, survivors(me, self.record), copy.backup.log, copy.backup.commit)
        copy.reign = Reign(self.epoch, log, self.record)
        for entry, place in self.acknowledged.items():
            entries = copy.machine.instance.entries
            assert len(entries) >= place, f"{entry} was acknowledged as number {place}, and is lost"
            assert entries[place - 1] == entry, f"{entry} was acknowledged as number {place}, and is another"
        for index, record in self.committed.items():
            assert index <= log.log.last
            assert index < log.log.first or log.log[index] == record
        log.advance()
        self.answer(copy)

    # --- clients ---------------------------------------------------------------------------------------------------

    @rule(who=st.integers(0, 1), calls=st.integers(1, 3))
    def call(self, who: int, calls: int) -> None:
        """Have a client begin updates, and send all it has."""
        client = self.clients[who]
        for _ in range(calls):
            client.number += 1
            client.open[client.number] = f"{who}/{client.number}"
        self.send(who)
        self.deliver_calls(who, 0)

    @rule(who=st.integers(0, 1))
    def send(self, who: int) -> None:
        """Have a client send what was not answered, as after its connection was lost."""
        client = self.clients[who]
        if self.leader is not None and client.open:
            calls: list[Call] = [(number, "add", [entry], None) for number, entry in client.open.items()]
            below = next(iter(client.open))
            client.late.append((self.leader[0].number, encode_value(Calls(client.session, client.new, below, calls))))

    @rule(who=st.integers(0, 1), pick=st.integers(0, 5))
    def deliver_calls(self, who: int, pick: int) -> None:
        """Have a message of a client come to the copy that it was meant for; messages of several connections overtake."""
        client = self.clients[who]
        if not client.late:
            return
        to, body = client.late.pop(pick % len(client.late))
        copy = self.copies.get(to)
        if copy is not None and copy.reign is not None:
            message = decode(body)
            assert isinstance(message, Calls)
            self.log(copy, record_of(CALLS, 0.0, body), who, message)

    @rule(kind=st.sampled_from([TICK, CHECK, BARRIER]))
    def note(self, kind: int) -> None:
        """Log a note of the primary."""
        if self.leader is not None:
            self.log(self.leader[0], record_of(kind, 0.0), -1, None)

    def log(self, copy: Copy, record: bytes, who: int, message: Calls | None) -> None:
        """Add a record, apply it, and wait until it is acknowledged."""
        assert copy.reign is not None
        copy.reign.log.log.append(record)
        results = copy.machine.apply(record, message)
        copy.reign.waiting.append((copy.machine.index, who, results))
        copy.reign.log.ack(copy.number, copy.reign.log.log.last)
        self.answer(copy)

    def answer(self, copy: Copy) -> None:
        """Answer what is acknowledged."""
        reign = copy.reign
        assert reign is not None
        for index in range(max(self.committed, default=0) + 1, reign.log.commit + 1):
            if index >= reign.log.log.first:
                self.committed[index] = reign.log.log[index]
        while reign.waiting and reign.waiting[0][0] <= reign.log.commit:
            _, who, results = reign.waiting.popleft()
            client = self.clients[who]
            for number, code, value in results:
                entry = f"{who}/{number}"
                if entry in self.acknowledged or code == DONE:
                    assert code == DONE or number not in client.open
                if code == DONE:
                    place = msgspec.msgpack.decode(value)
                    assert self.acknowledged.setdefault(entry, place) == place, f"{entry} was answered in two ways"
                    client.open.pop(number, None)
                    client.new = False

    # --- connections between copies ----------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 5))
    def connect(self, pick: int) -> None:
        """Have the primary connect to a copy that it has no connection to."""
        copy = self.some(pick)
        if self.leader is not None and copy.reign is None and copy.number not in self.leader[1].links:
            self.leader[1].links[copy.number] = Link()

    @rule(pick=st.integers(0, 5), heard=st.booleans())
    def cut(self, pick: int, heard: bool) -> None:
        """Cut a connection, and with it whatever is under way. The copy may notice only when it is led anew."""
        copy = self.some(pick)
        if self.leader is None:
            return
        reign = self.leader[1]
        if reign.links.pop(copy.number, None) is not None:
            reign.log.gone(copy.number)
            if heard:
                copy.led = None

    @rule(pick=st.integers(0, 5))
    def to_copy(self, pick: int) -> None:
        """Deliver the next message to a copy."""
        copy = self.some(pick)
        link = self.link(copy)
        if link is None or self.leader is None:
            return
        primary, reign = self.leader
        if not link.asked:
            if copy.backup.fence(reign.epoch):
                link.asked, copy.led = True, (primary.number, link)
                link.to_primary.append(copy.backup.position(copy.number))
        elif copy.led is not None and copy.led[1] is link and link.to_copy:
            message = link.to_copy.popleft()
            held = copy.backup.take(message) if isinstance(message, Records) else copy.backup.take_part(message)
            if held:
                link.to_primary.append(Ack(copy.backup.epoch, copy.backup.log.last))

    @rule(pick=st.integers(0, 5))
    def to_primary(self, pick: int) -> None:
        """Deliver the next message of a copy."""
        copy = self.some(pick)
        link = self.link(copy)
        if link is None or self.leader is None or not link.to_primary:
            return
        primary, reign = self.leader
        message = link.to_primary.popleft()
        if isinstance(message, Position):
            self.bring_up(primary, reign, link, message)
        elif message.epoch == reign.epoch:
            reign.log.ack(copy.number, message.index)
            self.answer(primary)

    def link(self, copy: Copy) -> Link | None:
        """The primary's connection to a copy."""
        return self.leader[1].links.get(copy.number) if self.leader is not None else None

    def bring_up(self, primary: Copy, reign: Reign, link: Link, position: Position) -> None:
        """Do as `Leading._bring_up`."""
        records, at = reign.log.log, position.applied + 1
        if position.history == primary.machine.history and records.first <= at <= records.last + 1:
            until = records.last
            while True:
                batch = records.batch(at)
                link.to_copy.append(Records(reign.epoch, at, batch, reign.log.commit, until))
                at += len(batch)
                if at > until:
                    break
            link.sent = at - 1
            return
        data = primary.machine.snapshot()
        half = len(data) // 2
        link.to_copy.append(Part(reign.epoch, 0, len(data), data[:half]))
        link.to_copy.append(Part(reign.epoch, half, len(data), data[half:]))
        link.sent = primary.machine.index

    @rule(pick=st.integers(0, 5))
    def pump(self, pick: int) -> None:
        """Send a copy what is new, or only what is acknowledged."""
        copy = self.some(pick)
        link = self.link(copy)
        if link is None or link.sent is None or self.leader is None:
            return
        log = self.leader[1].log
        if link.sent + 1 < log.log.first:
            self.cut(pick, heard=True)
            return
        batch = log.log.batch(link.sent + 1)
        link.to_copy.append(Records(self.leader[1].epoch, link.sent + 1, batch, log.commit, -1))
        link.sent += len(batch)

    @rule(pick=st.integers(0, 5))
    def settle(self, pick: int) -> None:
        """Exchange everything with one copy."""
        for _ in range(4):
            self.pump(pick)
            for _ in range(6):
                self.to_copy(pick)
                self.to_primary(pick)
        self.apply(pick)

    @rule(pick=st.integers(0, 5))
    def apply(self, pick: int) -> None:
        """Have a copy apply what it knows to be committed."""
        copy = self.some(pick)
        if copy.reign is None:
            for _ in copy.backup.apply_committed():
                pass

    # --- the in-sync set ---------------------------------------------------------------------------------------------

    @rule(leave=st.sets(st.integers(0, 5), max_size=2))
    def want(self, leave: set[int]) -> None:
        """Begin to write the in-sync set: some are taken out, those that may join do."""
        if self.leader is None or self.leader[1].writing is not None:
            return
        primary, reign = self.leader
        kept = reign.log.in_sync - {copy for place, copy in enumerate(sorted(reign.log.in_sync)) if place in leave}
        joining = {copy for copy, link in reign.links.items() if link.sent is not None and reign.log.may_join(copy)}
        members = kept | joining | {primary.number}
        reign.log.change(members)
        reign.writing = Write(reign.recorded.revision, primary.number, members)

    @rule(answered=st.booleans())
    def write_happens(self, answered: bool) -> None:
        """Have the change come to etcd, and its answer to the primary or not."""
        if self.leader is None or self.leader[1].writing is None:
            return
        primary, reign = self.leader
        write = reign.writing
        assert write is not None
        happened = self.try_write(write)
        reign.writing = None
        if not answered:
            self.reread(certain=False)
        elif happened:
            reign.recorded, reign.unsure = self.record, []
            reign.log.changed(write.members)
            self.answer(primary)
        else:
            self.reread(certain=True)

    @rule()
    def write_is_late(self) -> None:
        """Have the primary wait no longer for a change, which may still happen."""
        if self.leader is not None and self.leader[1].writing is not None:
            reign = self.leader[1]
            assert reign.writing is not None
            reign.unsure.append(reign.writing)
            reign.writing = None
            self.reread(certain=False)

    @rule(pick=st.integers(0, 3))
    def late_write_happens(self, pick: int) -> None:
        """Have such a change come to etcd."""
        if self.leader is not None and self.leader[1].unsure:
            unsure = self.leader[1].unsure
            self.try_write(unsure.pop(pick % len(unsure)))

    @rule()
    def refuse(self) -> None:
        """Have the node refuse a change without asking etcd, as while an earlier one is under way."""
        if self.leader is not None and self.leader[1].writing is not None:
            self.leader[1].writing = None
            self.reread(certain=True)

    def try_write(self, write: Write) -> bool:
        """Do as etcd: the conditions hold, or nothing happens."""
        if write.revision != self.record.revision or write.primary != self.placed:
            return False
        hosts = {copy: str(copy) for copy in write.members}
        self.record = Members(self.record.revision + 1, self.epoch, write.primary, hosts)
        return True

    def reread(self, *, certain: bool) -> None:
        """Do as `Leading._reread`."""
        assert self.leader is not None
        primary, reign = self.leader
        reign.recorded = self.record
        if certain and reign.log.changed(survivors(Me("journal", "", primary.number, float), self.record)):
            self.answer(primary)

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def applied_once(self) -> None:
        """No copy has an update twice."""
        for copy in self.copies.values():
            if copy.machine.instance is not None:
                entries = copy.machine.instance.entries
                assert len(entries) == len(set(entries)), f"{entries} has something twice"

    @invariant()
    def same_state(self) -> None:
        """What is committed is the same everywhere, and so are copies that have applied the same of it."""
        for copy in self.copies.values():
            machine, log = copy.machine, copy.backup.log
            for index in range(max(log.first, 1), min(copy.backup.commit, log.last) + 1):
                assert self.committed.get(index, log[index]) == log[index]
            if machine.instance is None or copy.backup.commit < machine.index or copy.reign is not None:
                continue
            digest = self.digests.setdefault((machine.index, machine.history), machine.digest())
            assert digest == machine.digest(), f"copies differ after record {machine.index}"

    @invariant()
    def held_by_all_in_sync(self) -> None:
        """Every copy that may become primary holds what is committed, each in its own epoch or by a snapshot."""
        last = max(self.committed, default=0)
        dead = self.record.primary if self.record.primary != self.placed else 0
        for number in self.record.hosts.keys() & self.copies.keys() - {dead}:
            log = self.copies[number].backup.log
            assert log.last >= last, f"copy {number} has {log.last} records of {last}"
            for index in range(log.first, last + 1):
                assert log[index] == self.committed.get(index, log[index])


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
