"""The whole protocol of checkpoints under any order of faults: hypothesis plays hosts, disks, etcd, primaries and the manager.

It takes the rules of `core.holders` in the order in which `checkpoint.reign`, `holding` and `exchange` take them. Whatever
takes time there is two steps here, between which anything may happen. In some examples old primaries run on beside the new
one (failover="fast"); no CheckpointServer is restarted in those, since it knows epochs only from its disk and its placement.

These mistakes were tried by hand, and 1500 examples found each: `acknowledged` without `changing`, without `copies`, of the
newest instead of the oldest; a joiner that needs only what stands in etcd, or nothing; leaving before there are enough;
`may_restore` without `me in holders`, without `here >= recorded`, without `damaged`; `enough` with any answer, with lossy
hosts trusted, without comparing with what is recorded; acknowledging although a newer epoch has asked this host; no
second look at the fence when an offer is held. A reign that begins with whatever is on its disk, which loses checkpoints as
well, was not found in so few; `changing` forgotten as soon as a write has failed was not tried to an end.
"""

from __future__ import annotations

import pytest
from attrs import Factory, define, frozen
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from etcdreplica.core.holders import NOTHING, acknowledged, durable, enough, may_restore, next_holders
from etcdreplica.model import Stamp

HOSTS = ("a", "b", "c", "d")
KEEP = 3
NOBODY: frozenset[str] = frozenset()

hosts = st.sampled_from(HOSTS)


@frozen
class Record:
    """What stands in etcd, and since which revision."""

    revision: int
    holders: frozenset[str]
    stamp: Stamp


@frozen
class Assigned:
    """An assignment; a change of it is a change of the primary's placement."""

    revision: int
    epoch: int
    primary: str
    seats: frozenset[str]


@frozen
class Write:
    """A transaction on its way to etcd."""

    record: Record | None
    assigned: int
    holders: frozenset[str]
    stamp: Stamp


@define(eq=False)
class Reign:
    """`checkpoint.reign.Reign`. `unread`: a write has failed, and what is there now has not been read."""

    host: str
    epoch: int
    assigned: Assigned
    source: Stamp = NOTHING
    held: dict[str, Stamp] = Factory(dict)
    silent: set[str] = Factory(set)
    entry: Record | None = None
    changing: frozenset[str] = NOBODY
    least: Stamp = NOTHING
    copies: int | None = None
    unread: bool = True
    over: bool = False

    @property
    def holders(self) -> frozenset[str]:
        """As it knows them."""
        return self.entry.holders if self.entry else NOBODY

    @property
    def recorded(self) -> Stamp:
        """What stands in etcd, as it knows it."""
        return self.entry.stamp if self.entry else NOTHING

    def take_up(self, stamp: Stamp) -> None:
        """Hand out what is all that was ever acknowledged."""
        if stamp > self.source:
            self.source = self.least = self.held[self.host] = stamp


@define(eq=False)
class Offer:
    """A checkpoint that a host has accepted and is writing."""

    reign: Reign
    to: str
    stamp: Stamp


@define(eq=False)
class Restore:
    """A new primary that looks for the newest checkpoint; `asked` has what each host has answered."""

    epoch: int
    record: Record | None
    asked: dict[str, Stamp] = Factory(dict)
    lossy: set[str] = Factory(set)


@define(eq=False)
class Server:
    """A CheckpointServer. What is before `fence` is on the disk."""

    disk: list[Stamp] = Factory(list)
    lost: Stamp = NOTHING
    fence: int = 0
    assigned: Assigned | None = None
    reign: Reign | None = None
    restore: Restore | None = None

    @property
    def newest(self) -> Stamp:
        """Of what is on its disk."""
        return max(self.disk, default=NOTHING)

    @property
    def damaged(self) -> bool:
        """Whether a newer one was there."""
        return self.lost > self.newest

    def epoch(self, host: str) -> int:
        """The newest one it has heard of."""
        placed = self.assigned.epoch if self.assigned is not None and host in self.assigned.seats else 0
        return max(self.fence, placed, self.newest.epoch)

    def keep(self, stamp: Stamp) -> None:
        """Store one that is newer than all."""
        if stamp > self.newest:
            self.disk = [*self.disk, stamp][-KEEP:]


class Protocol(RuleBasedStateMachine):
    """One application on four hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.servers = {host: Server() for host in HOSTS}
        self.apps: dict[str, int] = {}  # epoch of the primary that runs on a host
        self.down: set[str] = set()
        self.record: Record | None = None
        self.revision = 1
        self.writes: list[Write] = []
        self.offers: list[Offer] = []
        self.promises: dict[Stamp, set[str]] = {}  # what was acknowledged, and the hosts that have had it ever since
        self.sequence = 0
        self.begun = 0  # the newest epoch that has restored
        self.restored_with: dict[int, Stamp] = {}  # what each of them got
        self.losses = 0

    @initialize(
        sizes=st.sampled_from([(1, 1), (2, 2), (2, 2), (3, 3), (3, 2), (3, 2), (3, 1)]),
        fast=st.booleans(),
        settled=st.booleans(),
    )
    def begin(self, sizes: tuple[int, int], fast: bool, settled: bool) -> None:
        """Start the application on a. It may want fewer copies than there are seats, as when the degree was raised."""
        self.degree, self.copies = sizes
        self.fast = fast
        self.assigned = Assigned(1, 1, "a", frozenset(HOSTS[: self.degree]))
        for host in HOSTS:
            self.learn(host)
        self.restore_begin("a")
        if settled:
            self.settle("a")

    # --- the manager -----------------------------------------------------------------------------------------------

    @rule(host=hosts, others=st.permutations(HOSTS))
    def promote(self, host: str, others: list[str]) -> None:
        """Choose another primary, and have it know. If the old one is not dead by then, this is failover="fast"."""
        if not self.fast:
            self.apps.clear()
        self.assign(host, others, self.assigned.epoch + 1)
        self.learn(host)
        self.restore_begin(host)

    @rule(others=st.permutations(HOSTS))
    def replace_backups(self, others: list[str]) -> None:
        """Give the seats of backups to other hosts."""
        self.assign(self.assigned.primary, others, self.assigned.epoch)

    def assign(self, primary: str, others: list[str], epoch: int) -> None:
        """Write an assignment."""
        self.revision += 1
        seats = [primary, *(other for other in others if other != primary)][: self.degree]
        self.assigned = Assigned(self.revision, epoch, primary, frozenset(seats))

    @rule(host=hosts)
    def learn(self, host: str) -> None:
        """Have a host see its placement."""
        server = self.servers[host]
        if host in self.down or server.assigned == self.assigned:
            return
        server.assigned = self.assigned
        reign = server.reign
        if reign is not None and reign.epoch < self.assigned.epoch:
            reign = server.reign = None
        if reign is not None:
            reign.assigned = self.assigned
            for other in (reign.held.keys() | reign.silent) - self.assigned.seats:
                reign.held.pop(other, None)
                reign.silent.discard(other)
        elif self.assigned.primary == host and server.newest > NOTHING:
            server.reign = Reign(host, self.assigned.epoch, self.assigned)

    # --- the primary -----------------------------------------------------------------------------------------------

    def reign_of(self, host: str) -> Reign | None:
        """Return the reign that a running primary has on its host."""
        reign = self.servers[host].reign
        if reign is None or self.apps.get(host) != reign.epoch:
            return None
        if self.servers[host].epoch(host) > reign.epoch:
            reign.over = True
        return None if reign.over else reign

    def ruling(self, host: str) -> str:
        """Return this host if a primary's CheckpointServer is there, else one where there is: most others would do nothing."""
        found = {other for other in HOSTS if self.servers[other].reign}
        return host if host in found or not found else max(found, key=self.epoch_of)

    def epoch_of(self, host: str) -> tuple[int, str]:
        """Return that of the reign on a host, to choose the newest."""
        reign = self.servers[host].reign
        return (reign.epoch if reign else 0, host)

    def pair(self, host: str, peer: str) -> tuple[str, str]:
        """Return such a host, and another one with a seat."""
        host = self.ruling(host)
        reign = self.servers[host].reign
        others = sorted(reign.assigned.seats - {host}) if reign else []
        return host, peer if peer in others or not others else others[0]

    @rule(host=hosts)
    def read(self, host: str) -> None:
        """Read what stands in etcd; at first this tells whether the reign may begin."""
        host = self.ruling(host)
        reign, server = self.servers[host].reign, self.servers[host]
        if reign is None:
            return
        reign.over |= self.record is not None and self.record.stamp.epoch > reign.epoch
        reign.entry = self.record
        if reign.unread:
            reign.changing, reign.unread = NOBODY, False
        if may_restore(host, reign.holders, server.newest, reign.recorded, damaged=server.damaged):
            reign.take_up(server.newest)

    @rule(host=hosts)
    def make(self, host: str) -> None:
        """Make a checkpoint."""
        host = self.ruling(host)
        reign, server = self.reign_of(host), self.servers[host]
        if reign is not None:
            self.sequence += 1
            stamp = Stamp(reign.epoch, self.sequence)
            server.keep(stamp)
            reign.source = reign.held[host] = stamp
            reign.copies = self.copies

    @rule(host=hosts, peer=hosts)
    def offer(self, host: str, peer: str) -> None:
        """Have another host accept the newest one."""
        host, peer = self.pair(host, peer)
        reign, there = self.servers[host].reign, self.servers[peer]
        if reign is None or reign.over or peer in self.down or peer not in reign.assigned.seats - {host}:
            return
        if reign.held.get(peer, NOTHING) >= reign.source or any(
            offer.to == peer and offer.reign is reign for offer in self.offers
        ):
            return
        if reign.epoch < there.epoch(peer):
            reign.over = True
        else:
            there.fence = reign.epoch
            self.offers.append(Offer(reign, peer, reign.source))

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), answered=st.booleans())
    def hold(self, data: st.DataObject, answered: bool) -> None:
        """Finish writing, and answer if the connection still is there."""
        self.finish(self.offers.pop(data.draw(st.integers(0, len(self.offers) - 1))), answered=answered)

    def finish(self, offer: Offer, *, answered: bool) -> None:
        """Store what was offered, and look at the fence once more."""
        there, reign = self.servers[offer.to], offer.reign
        there.keep(offer.stamp)
        stale = reign.epoch < there.epoch(offer.to)
        if answered and stale:
            reign.over = True
        elif answered and offer.to in reign.assigned.seats:
            reign.held[offer.to] = max(offer.stamp, reign.held.get(offer.to, NOTHING))
            reign.silent.discard(offer.to)

    @rule(host=hosts, peer=hosts, answered=st.booleans())
    def hand_out(self, host: str, peer: str, answered: bool) -> None:
        """Offer at once and to the end."""
        host, peer = self.pair(host, peer)
        before = len(self.offers)
        self.offer(host, peer)
        if len(self.offers) > before:
            self.finish(self.offers.pop(), answered=answered)

    @rule(host=hosts, peer=hosts)
    def give_up(self, host: str, peer: str) -> None:
        """Count a host as silent."""
        host, peer = self.pair(host, peer)
        reign = self.servers[host].reign
        if reign is not None and peer in reign.assigned.seats - {host}:
            reign.silent.add(peer)

    @rule(host=hosts, confirmed=st.booleans())
    def write(self, host: str, confirmed: bool) -> None:
        """Bring the record up to date; if not confirmed, it may be written later or never."""
        host = self.ruling(host)
        reign = self.servers[host].reign
        if reign is None or reign.over or reign.unread or self.servers[host].epoch(host) > reign.epoch:
            return
        copies = len(reign.holders) if reign.copies is None else reign.copies
        least = max(reign.least, reign.recorded)
        new = next_holders(host, reign.holders, reign.assigned.seats | {host}, reign.silent, reign.held, least, copies)
        if new is None and not reign.changing and durable(reign.holders, reign.held) <= reign.recorded:
            return
        holders = new or reign.holders
        reign.changing |= holders
        stamp = max(durable(holders, reign.held), reign.recorded)
        write = Write(reign.entry, reign.assigned.revision, holders, stamp)
        if not confirmed:
            self.writes.append(write)
            reign.entry = self.record
        elif self.land(write):
            reign.entry, reign.changing = self.record, NOBODY
        else:
            reign.unread = True

    def land(self, write: Write) -> bool:
        """Commit a transaction."""
        if write.record != self.record or write.assigned != self.assigned.revision:
            return False
        self.revision += 1
        self.record = Record(self.revision, write.holders, write.stamp)
        return True

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), lost=st.booleans())
    def arrive(self, data: st.DataObject, lost: bool) -> None:
        """Have a write arrive that was given up, or lose it."""
        write = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        if not lost:
            self.land(write)

    @rule(host=hosts)
    def acknowledge(self, host: str) -> None:
        """Tell the application what is durable."""
        host = self.ruling(host)
        reign = self.reign_of(host)
        if reign is None:
            return
        stamp = acknowledged(reign.holders, reign.changing, reign.held, self.copies)
        if stamp.epoch != reign.epoch or stamp in self.promises:
            return
        without = [epoch for epoch, found in self.restored_with.items() if epoch > reign.epoch and found < stamp]
        assert not without, f"{stamp} was acknowledged when epochs {without} had restored without it"
        reign.least = max(reign.least, stamp)
        self.promises[stamp] = {other for other in HOSTS if self.servers[other].newest >= stamp}
        assert len(self.promises[stamp]) >= self.copies - self.losses, f"{stamp} is only on {self.promises[stamp]}"

    @rule(host=hosts)
    def settle(self, host: str) -> None:
        """Make a checkpoint, have it held everywhere, record and acknowledge it."""
        host = self.ruling(host)
        self.learn(host)
        self.read(host)
        self.make(host)
        for _ in range(2):
            for peer in HOSTS:
                self.hand_out(host, peer, answered=True)
            self.write(host, confirmed=True)
        self.acknowledge(host)

    @rule(host=hosts, peer=hosts)
    def spread(self, host: str, peer: str) -> None:
        """Make a checkpoint and acknowledge it as soon as one other host holds it."""
        host, peer = self.pair(host, peer)
        self.make(host)
        self.hand_out(host, peer, answered=True)
        self.acknowledge(host)

    @rule(host=hosts, peer=hosts, other=hosts, slow=st.booleans())
    def come_back_late(self, host: str, peer: str, other: str, slow: bool) -> None:
        """Have a holder leave and join again while a checkpoint is acknowledged that it does not have.

        It is slow to say what it holds, or etcd is slow to say that it is a holder.
        """
        host, peer = self.pair(host, peer)
        self.settle(host)
        self.give_up(host, peer)
        self.write(host, confirmed=True)
        self.make(host)
        before = len(self.offers)
        self.offer(host, peer)
        if len(self.offers) == before:
            return
        offer = self.offers.pop()
        if slow:
            self.spread(host, other)
        self.finish(offer, answered=True)
        self.write(host, confirmed=slow)
        if not slow:
            self.spread(host, other)

    @rule(host=hosts, others=st.permutations(HOSTS), peers=st.sets(hosts))
    def fail_over(self, host: str, others: list[str], peers: set[str]) -> None:
        """Promote and restore."""
        self.promote(host, others)
        self.ask(host, peers)
        self.restore_end(host)

    @rule(host=hosts, peer=hosts, new=hosts, others=st.permutations(HOSTS))
    def fail_over_during_an_offer(self, host: str, peer: str, new: str, others: list[str]) -> None:
        """Have a new primary ask a host that is just writing what the old one has offered."""
        host, peer = self.pair(host, peer)
        self.make(host)
        before = len(self.offers)
        self.offer(host, peer)
        if len(self.offers) > before:
            offer = self.offers.pop()
            self.fail_over(new, others, {peer})
            self.finish(offer, answered=True)
            self.acknowledge(host)

    @rule(host=hosts, others=st.permutations(HOSTS), peers=st.sets(hosts))
    def fail_over_slowly(self, host: str, others: list[str], peers: set[str]) -> None:
        """Have the CheckpointServer of a new primary look into etcd before its application restores."""
        self.promote(host, others)
        self.read(host)
        self.write(host, confirmed=True)
        self.restore_at_once(host, peers)

    # --- restoring -------------------------------------------------------------------------------------------------

    @rule(host=hosts)
    def restore_begin(self, host: str) -> None:
        """Read what stands in etcd, and refuse older epochs; a holder that has lost nothing need not ask anybody."""
        host = host if self.servers[host].restore else self.assigned.primary
        server, assigned = self.servers[host], self.servers[host].assigned
        if host in self.down or assigned is None or assigned.primary != host or self.begun >= assigned.epoch:
            return
        if assigned.epoch < server.epoch(host):
            return
        server.fence = assigned.epoch
        server.restore = Restore(assigned.epoch, self.record)
        holders, stamp = (self.record.holders, self.record.stamp) if self.record else (NOBODY, NOTHING)
        if may_restore(host, holders, server.newest, stamp, damaged=server.damaged):
            self.restored(host, server.newest)

    @rule(host=hosts, peers=st.sets(hosts))
    def ask(self, host: str, peers: set[str]) -> None:
        """Have other hosts say what they hold, and refuse older epochs."""
        host = host if self.servers[host].restore else self.assigned.primary
        restore = self.servers[host].restore
        if restore is None:
            return
        holders = restore.record.holders if restore.record else NOBODY
        for peer in sorted((peers & (holders | self.assigned.seats)) - self.down - {host}):
            there = self.servers[peer]
            if there.epoch(peer) <= restore.epoch and peer not in restore.asked:
                there.fence = restore.epoch
                restore.asked[peer] = there.newest
                restore.lossy |= {peer} if there.damaged else set()

    @rule(host=hosts)
    def restore_end(self, host: str) -> None:
        """Take the newest of what there is, if that is all there can be."""
        host = host if self.servers[host].restore else self.assigned.primary
        server, restore = self.servers[host], self.servers[host].restore
        if restore is None or server.epoch(host) > restore.epoch:
            return
        holders, stamp = (restore.record.holders, restore.record.stamp) if restore.record else (NOBODY, NOTHING)
        answers = {**restore.asked, host: server.newest}
        if not enough(holders, answers, restore.lossy | ({host} if server.damaged else set()), stamp):
            return
        best = max(answers, key=lambda other: (answers[other], other == host))
        if best in self.down or self.servers[best].newest < answers[best]:
            return  # it cannot be fetched: everything is asked again
        server.keep(answers[best])
        self.restored(host, answers[best])

    @rule(host=hosts, peers=st.sets(hosts))
    def restore_at_once(self, host: str, peers: set[str]) -> None:
        """Do all of it without anything between."""
        self.restore_begin(host)
        self.ask(host, peers)
        self.restore_end(host)

    def restored(self, host: str, stamp: Stamp) -> None:
        """Have a primary begin with this checkpoint.

        One that has been replaced is dead (G1), and just its CheckpointServer goes on; or it lives (failover="fast"), and need
        not have what its successors acknowledged: `acknowledge` sees to it that nothing comes of what it does without that.
        """
        server = self.servers[host]
        assert server.restore is not None
        assert server.assigned is not None
        epoch, server.restore = server.restore.epoch, None
        if self.fast or epoch == self.assigned.epoch:
            for promised, kept in self.promises.items():
                lost = stamp < promised and promised.epoch <= epoch and kept
                assert not lost, f"{host} got {stamp}, but {promised} was acknowledged and is on {kept}"
            self.begun = max(self.begun, epoch)
            self.apps[host] = epoch
            self.restored_with[epoch] = stamp
        if server.reign is None or server.reign.epoch < epoch:
            server.reign = Reign(host, epoch, server.assigned)
        server.reign.take_up(stamp)

    # --- faults ----------------------------------------------------------------------------------------------------

    @rule(host=hosts)
    def crash(self, host: str) -> None:
        """Lose a host, and with it what was only in memory."""
        if not self.fast:
            self.end(host)
            self.down.add(host)

    @rule(host=hosts)
    def come_back(self, host: str) -> None:
        """Start a host again."""
        self.down.discard(host)
        self.learn(host)

    def end(self, host: str) -> None:
        """Kill everything on a host."""
        server = self.servers[host]
        self.servers[host] = Server(server.disk, server.lost)
        self.apps.pop(host, None)
        self.offers = [offer for offer in self.offers if offer.to != host and offer.reign is not server.reign]

    @precondition(lambda self: not self.fast and self.losses < self.copies - 1)
    @rule(host=hosts)
    def lose_disk(self, host: str) -> None:
        """Replace a disk by an empty one. There are fewer such losses than copies."""
        self.losses += 1
        self.end(host)
        self.servers[host] = Server()
        self.learn(host)
        self.forget(host)

    @precondition(lambda self: self.losses < self.copies - 1)
    @rule(host=hosts)
    def damage(self, host: str) -> None:
        """Find the newest checkpoint of a host damaged."""
        server = self.servers[host]
        if server.disk:
            self.losses += 1
            server.lost = max(server.lost, server.disk.pop())
            self.forget(host)

    @precondition(lambda self: self.losses < self.copies - 1)
    @rule(host=hosts, others=st.permutations(HOSTS))
    def promote_damaged(self, host: str, others: list[str]) -> None:
        """Choose a primary that has just found its newest one damaged."""
        self.damage(host)
        self.promote(host, others)

    def forget(self, host: str) -> None:
        """A host has some checkpoints no longer."""
        for promised, kept in self.promises.items():
            if self.servers[host].newest < promised:
                kept.discard(host)


def test_what_the_next_primary_has_may_still_be_acknowledged() -> None:
    """Under failover="fast" the old primary may learn late that its holders held a state; the new one began with just that."""
    state = Protocol()
    state.begin(sizes=(3, 3), fast=True, settled=False)
    state.come_back_late(host="a", other="a", peer="c", slow=True)
    state.fail_over_during_an_offer(host="a", new="c", others=list(HOSTS), peer="a")
    assert state.restored_with == {1: NOTHING, 2: Stamp(1, 2)}
    assert Stamp(1, 2) in state.promises


@pytest.mark.parametrize("fast", [False, True])
def test_a_restore_may_end_when_its_primary_was_replaced_long_ago(fast: bool) -> None:
    """It finds less than its successor has acknowledged; nobody begins with that, or nothing comes of it."""
    state = Protocol()
    state.begin(sizes=(1, 1), fast=fast, settled=True)
    state.fail_over(host="b", others=list(HOSTS), peers=set())
    state.learn(host="a")
    state.ask(host="b", peers={"a"})
    state.fail_over(host="a", others=list(HOSTS), peers=set())
    state.settle(host="a")
    before = state.record
    state.restore_end(host="b")
    assert state.apps == ({"a": 3, "b": 2} if fast else {"a": 3})
    state.make(host="b")
    state.hand_out(host="b", peer="a", answered=True)
    state.write(host="b", confirmed=True)
    state.acknowledge(host="b")
    assert state.record == before == Record(state.revision, frozenset("a"), Stamp(3, 2))
    assert state.promises == {Stamp(1, 1): {"a"}, Stamp(3, 2): {"a"}}


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
