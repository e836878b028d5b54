"""What each kind of fault does to a cluster, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from attrs import evolve

from etcdreplica.cli.move import Change
from etcdreplica.cli.scale import rescale
from etcdreplica.daemon.registry import register
from etcdreplica.daemon.waiting import insist
from etcdreplica.errors import EtcdReplicaError, RefusedError
from etcdreplica.model import Ask, Drain, Pause, Registration, Request
from etcdreplica.store import Delete, Exists, Key, Kind, Put, Store, Txn
from etcdreplica.words import Style
from tests.simulation.application import Application
from tests.simulation.cluster import CLUSTER, ENDPOINTS, Cluster
from tests.simulation.machine import Process
from tests.simulation.scenario import App, Fault

T = TypeVar("T")
Undo = Callable[[], object]
REQUEST_S = 10.0  # a person waits so long for a change of primary
EMPTY_S = 20.0  # a drained host is empty by then, if nothing else happens


def inject(cluster: Cluster, fault: Fault) -> None:
    """Have it happen now, and end when it ends."""
    cluster.say(f"FAULT {fault}")
    undo = _DO[fault.kind](cluster, fault)
    if undo is not None:

        def end() -> None:
            if cluster.is_healed:
                return
            cluster.say(f"end of fault: {fault.kind} {fault.target}")
            undo()

        cluster.world.after(fault.lasts, end)


def heal(cluster: Cluster) -> None:
    """End every fault."""
    cluster.say("HEAL")
    cluster.is_healed = True
    etcd = cluster.etcd
    etcd.commit_s = 0.001
    for endpoint in ENDPOINTS:
        if endpoint in etcd.down:
            etcd.start(endpoint)
        if endpoint in etcd.frozen:
            etcd.thaw(endpoint)
    if not etcd.has_leader:
        etcd.elect()
    cluster.cuts.clear()
    cluster.send_home()
    for host in cluster.hosts.values():
        _mend(cluster, host.name)
        host.unable.clear()
        host.disk.pop("stopped", None)
        for process in list(host.processes.values()):
            process.go_on()
        if not host.is_on:
            cluster.turn_on(host)
        elif host.guardian is None:
            cluster.start_node(host)
    unpause(cluster)
    undrain(cluster, *cluster.hosts)
    take_back(cluster, *cluster.registrations)


# --- what people do -----------------------------------------------------------------------------------------------------


def introduce(cluster: Cluster, app: App) -> None:
    """Register an application, in one way or the other."""
    registration = cluster.registrations[app.registration.name]
    host = cluster.hosts.get(app.by_hand)
    if host is not None and host.listener is not None and host.listener.is_there:
        given = {
            "name": registration.name,
            "style": registration.style,
            "degree": registration.degree,
            "program": {"argv": registration.program.argv, "cwd": "/"},
            "stop_timeout_s": registration.stop_timeout_s,
            "hang_timeout_s": registration.hang_timeout_s,
            "failover": registration.failover,
            "failsafe": registration.failsafe,
            "restarts_here": registration.restarts_here,
            "max_restarts": registration.max_restarts,
        }
        Application(host, registration.name, registration.style, None, None, given)
    else:
        enrol(cluster, registration)


def enrol(cluster: Cluster, registration: Registration) -> None:
    """Register it from elsewhere, unless it is there."""
    cluster.do(lambda store: _enrol(cluster, store, registration))


async def _enrol(cluster: Cluster, store: Store, registration: Registration) -> None:
    for _ in range(200):
        try:
            await insist("register", lambda: register(store, registration, "desk"))
        except RefusedError as error:
            cluster.say(f"refused: {error}")
            if "try again" not in str(error):
                return
            await asyncio.sleep(0.5)
        else:
            return


def remove(cluster: Cluster, name: str) -> None:
    """As `etcdreplica remove`."""
    key = Key(Kind.REGISTRATIONS, (name,))

    async def work(store: Store) -> None:
        await insist(
            "remove", lambda: store.commit(Txn((Exists(key),), (Delete(key), Delete(Key(Kind.PAUSES, ("app", name))))))
        )

    cluster.do(work)


def pause(cluster: Cluster, name: str | None) -> None:
    """As `etcdreplica pause`."""
    record = Pause("somebody")

    async def work(store: Store) -> None:
        if name is None:
            await insist("pause", lambda: store.commit(Txn((), (Put(Key(Kind.PAUSES, ("cluster", CLUSTER)), record),))))
        else:
            registered = Exists(Key(Kind.REGISTRATIONS, (name,)))
            put = Put(Key(Kind.PAUSES, ("app", name)), record)
            await insist("pause", lambda: store.commit(Txn((registered,), (put,))))

    cluster.do(work)


def unpause(cluster: Cluster, name: str | None = None) -> None:
    """As `etcdreplica resume`: of one application, or of everything."""
    names = [name] if name else list(cluster.registrations)
    keys = [Key(Kind.PAUSES, ("app", each)) for each in names]
    keys += [] if name else [Key(Kind.PAUSES, ("cluster", CLUSTER))]

    async def work(store: Store) -> None:
        await insist("resume", lambda: store.commit(Txn((), tuple(Delete(key) for key in keys))))

    cluster.do(work)


def change_primary(cluster: Cluster, name: str, ask: Ask) -> None:
    """As `etcdreplica switchover` or `failover`."""

    async def work(store: Store) -> None:
        try:
            told = await Change(store, ask, name, None).make(dry_run=False, wait=True, timeout=REQUEST_S)
        except EtcdReplicaError as error:
            cluster.say(f"refused: {error}")
        else:
            cluster.say(f"{ask} of {name}: {told['from']} to {told['to']}")

    cluster.do(work)


def stop(cluster: Cluster, name: str) -> None:
    """As `etcdreplica stop`."""
    registered, key = Exists(Key(Kind.REGISTRATIONS, (name,))), Key(Kind.REQUESTS, (name,))

    async def work(store: Store) -> None:
        await insist("stop", lambda: store.commit(Txn((registered,), (Put(key, Request(Ask.STOP, "somebody")),))))

    cluster.do(work)


def take_back(cluster: Cluster, *names: str) -> None:
    """As `etcdreplica resume` of what is stopped."""

    async def work(store: Store) -> None:
        await insist("start", lambda: store.commit(Txn((), tuple(Delete(Key(Kind.REQUESTS, (name,))) for name in names))))

    cluster.do(work)


def scale(cluster: Cluster, name: str, degree: int, style: Style) -> None:
    """As `etcdreplica scale`."""

    async def work(store: Store) -> None:
        try:
            await rescale(store, name, degree, style, timeout=None)
        except EtcdReplicaError as error:
            cluster.say(f"refused: {error}")

    cluster.registrations[name] = evolve(cluster.registrations[name], degree=degree, style=style)
    cluster.do(work)


def drain(cluster: Cluster, host: str) -> None:
    """As `etcdreplica drain`."""

    async def work(store: Store) -> None:
        await insist("drain", lambda: store.commit(Txn((), (Put(Key(Kind.DRAINS, (host,)), Drain("somebody")),))))

    cluster.do(work)


def undrain(cluster: Cluster, *hosts: str) -> None:
    """As `etcdreplica undrain`."""

    async def work(store: Store) -> None:
        await insist("undrain", lambda: store.commit(Txn((), tuple(Delete(Key(Kind.DRAINS, (host,))) for host in hosts))))

    cluster.do(work)


# --- faults -------------------------------------------------------------------------------------------------------------


def _each(do: Callable[[T], object], things: Iterable[T]) -> None:
    for thing in things:
        do(thing)


def _copy(cluster: Cluster, fault: Fault, *, primary: bool | None) -> Application | None:
    copies = [c for c in cluster.copies(fault.target) if primary in (None, c.acts)]
    return copies[int(fault.how * len(copies))] if copies else None


def _kill_copy(primary: bool) -> Callable[[Cluster, Fault], Undo | None]:
    def do(cluster: Cluster, fault: Fault) -> None:
        copy = _copy(cluster, fault, primary=primary)
        if copy is not None:
            copy.kill() if fault.how < 0.8 else copy.exit(1)

    return do


def _hang(cluster: Cluster, fault: Fault) -> None:
    copy = _copy(cluster, fault, primary=True)
    if copy is not None:
        copy.hang()


def _stop(process: Process | None) -> Undo | None:
    if process is None:
        return None
    process.stop()
    return process.go_on


def _stop_copy(cluster: Cluster, fault: Fault) -> Undo | None:
    return _stop(_copy(cluster, fault, primary=None))


def _leave(cluster: Cluster, fault: Fault) -> None:
    copy = _copy(cluster, fault, primary=True)
    if copy is not None:
        copy.terminate()


def _first(cluster: Cluster, fault: Fault, kind: str) -> Process | None:
    found = cluster.hosts[fault.target].running(kind)
    return found[0] if found else None


def _leading_manager(cluster: Cluster, fault: Fault) -> Process | None:
    """Two times in three the one that leads."""
    records = cluster.etcd.store
    leaders = [records.record(key) for key in records.keys(f"/etcdreplica/{CLUSTER}/leaders/manager/".encode())]
    leaders.sort(key=lambda record: record.create_revision)
    line = cluster.records(Kind.LEADERS)
    if leaders and fault.how < 0.67:
        name = leaders[0].key.decode().rpartition("/")[2]
        leader = line["manager", name]
        return cluster.hosts[leader.host].processes.get(leader.pid)
    return _first(cluster, fault, "manager")


def _kill(kind: str) -> Callable[[Cluster, Fault], Undo | None]:
    def do(cluster: Cluster, fault: Fault) -> None:
        process = _first(cluster, fault, kind)
        if process is not None:
            process.kill()

    return do


def _stop_kind(kind: str) -> Callable[[Cluster, Fault], Undo | None]:
    return lambda cluster, fault: _stop(_first(cluster, fault, kind))


def _kill_manager(cluster: Cluster, fault: Fault) -> None:
    process = _leading_manager(cluster, fault)
    if process is not None:
        process.kill()


def _stop_manager(cluster: Cluster, fault: Fault) -> Undo | None:
    return _stop(_leading_manager(cluster, fault))


def _stop_host(cluster: Cluster, fault: Fault) -> Undo:
    stopped = list(cluster.hosts[fault.target].processes.values())
    for process in stopped:
        process.stop()
    return lambda: _each(Process.go_on, stopped)


def _lose_power(cluster: Cluster, fault: Fault) -> Undo:
    host = cluster.hosts[fault.target]
    host.lose_power()
    if fault.how < 0.1:
        host.disk.clear()
    return lambda: cluster.turn_on(host)


def _end_node(cluster: Cluster, fault: Fault) -> Undo:
    host = cluster.hosts[fault.target]
    host.disk["stopped"] = True
    if host.guardian is not None:
        host.guardian.terminate()

    def again() -> None:
        host.disk.pop("stopped", None)
        cluster.start_node(host)

    return again


def _mend(cluster: Cluster, host: str) -> None:
    link = cluster.hosts[host].link
    link.lose_answers, link.delay_s, link.answer_delay_s = 0.0, 0.0003, 0.0
    link.mend()
    cluster.cuts = {cut for cut in cluster.cuts if host not in cut}


def _cut_off(cluster: Cluster, fault: Fault) -> Undo:
    """From etcd and from its peers, or from etcd only; both directions or one."""
    link, how = cluster.hosts[fault.target].link, fault.how
    link.out_cut, link.in_cut = how < 0.7, how < 0.5 or how >= 0.7
    if how * 10 % 1 < 0.7:
        for other in cluster.hosts:
            cluster.cuts |= {(fault.target, other)} if link.out_cut else set()
            cluster.cuts |= {(other, fault.target)} if link.in_cut else set()
    return lambda: _mend(cluster, fault.target)


def _cut_peers(cluster: Cluster, fault: Fault) -> Undo:
    for other in cluster.hosts:
        if other != fault.target:
            cluster.cuts |= {(fault.target, other)} if fault.how < 0.8 else set()
            cluster.cuts |= {(other, fault.target)} if fault.how > 0.4 else set()
    return lambda: _mend(cluster, fault.target)


def _slow_link(cluster: Cluster, fault: Fault) -> Undo:
    cluster.hosts[fault.target].link.delay_s = 0.02 + 0.08 * fault.how
    return lambda: _mend(cluster, fault.target)


def _slow_answers(cluster: Cluster, fault: Fault) -> Undo:
    """Answers take longer and longer on their way, and then nothing comes through any more."""
    link, ttl_s = cluster.hosts[fault.target].link, cluster.timing.lease_ttl_s
    link.answer_delay_s = (0.5 + 0.5 * fault.how) * ttl_s / 3.2

    def then_cut() -> None:
        link.out_cut = link.in_cut = True
        cluster.world.after(1.3 * ttl_s, _mend, cluster, fault.target)

    return then_cut


def _lose_answers(cluster: Cluster, fault: Fault) -> Undo:
    cluster.hosts[fault.target].link.lose_answers = 0.2 + 0.6 * fault.how
    return lambda: _mend(cluster, fault.target)


def _cannot_run(cluster: Cluster, fault: Fault) -> Undo:
    host = cluster.hosts[fault.target]
    host.unable.update(cluster.registrations)
    return host.unable.clear


def _member(fault: Fault) -> str:
    return ENDPOINTS[int(fault.how * len(ENDPOINTS))]


def _etcd_leaderless(cluster: Cluster, fault: Fault) -> Undo:
    cluster.etcd.lose_leader()
    return cluster.etcd.elect


def _etcd_stalls(cluster: Cluster, fault: Fault) -> Undo:
    for endpoint in ENDPOINTS:
        cluster.etcd.freeze(endpoint)
    return lambda: _each(cluster.etcd.thaw, ENDPOINTS)


def _etcd_member_down(cluster: Cluster, fault: Fault) -> Undo:
    cluster.etcd.shut(_member(fault))
    return lambda: cluster.etcd.start(_member(fault))


def _etcd_member_stops(cluster: Cluster, fault: Fault) -> Undo:
    cluster.etcd.freeze(_member(fault))
    return lambda: cluster.etcd.thaw(_member(fault))


def _etcd_down(cluster: Cluster, fault: Fault) -> Undo:
    for endpoint in ENDPOINTS:
        cluster.etcd.shut(endpoint)
    return lambda: _each(cluster.etcd.start, ENDPOINTS)


def _remove(cluster: Cluster, fault: Fault) -> None:
    remove(cluster, fault.target)


def _register_again(cluster: Cluster, fault: Fault) -> None:
    """Remove it and at once register it, perhaps otherwise."""
    name = fault.target
    registration = cluster.registrations[name]
    if fault.how < 0.5:
        degree = 1 + registration.degree % min(3, len(cluster.hosts))
        registration = evolve(registration, degree=degree, failsafe=registration.failsafe and degree > 1)
    key = Key(Kind.REGISTRATIONS, (name,))

    async def work(store: Store) -> None:
        await insist("remove", lambda: store.commit(Txn((Exists(key),), (Delete(key),))))
        await _enrol(cluster, store, registration)

    cluster.registrations[name] = registration
    cluster.do(work)


def _pause(cluster: Cluster, fault: Fault) -> Undo:
    pause(cluster, fault.target)
    return lambda: unpause(cluster, fault.target)


def _pause_all(cluster: Cluster, fault: Fault) -> Undo:
    pause(cluster, None)
    return lambda: unpause(cluster)


def _change(ask: Ask) -> Callable[[Cluster, Fault], None]:
    return lambda cluster, fault: change_primary(cluster, fault.target, ask)


def _scale(cluster: Cluster, fault: Fault) -> None:
    least = 2 if cluster.registrations[fault.target].failsafe else 1
    degree = max(least, 1 + int(fault.how * min(3, len(cluster.hosts))))
    scale(cluster, fault.target, degree, list(Style)[int(fault.how * 100) % len(Style)])


def _stop_app(cluster: Cluster, fault: Fault) -> Undo:
    stop(cluster, fault.target)
    return lambda: take_back(cluster, fault.target)


def _drain(cluster: Cluster, fault: Fault) -> Undo:
    drain(cluster, fault.target)

    def end() -> None:
        if cluster.is_calm and fault.lasts > EMPTY_S:
            _check_drained(cluster, fault.target)
        undrain(cluster, fault.target)

    return end


def _check_drained(cluster: Cluster, host: str) -> None:
    """Nothing is there any more but copies that no other host can take, and no primary."""
    for (name,), assignment in cluster.records(Kind.ASSIGNMENTS).items():
        stays = [seat for seat in assignment.seats if seat.host == host]
        if assignment.primary in stays or (stays and cluster.registrations[name].degree < len(cluster.hosts)):
            cluster.complain(f"{name} is still on {host}, which is drained: {assignment}")


def _on_etcd(share: Callable[[Cluster, Fault], object]) -> Callable[[Cluster, Fault], Undo | None]:
    def do(cluster: Cluster, fault: Fault) -> None:
        share(cluster, fault)

    return do


_DO: dict[str, Callable[[Cluster, Fault], Undo | None]] = {
    "kill primary": _kill_copy(primary=True),
    "kill backup": _kill_copy(primary=False),
    "hang primary": _hang,
    "stop copy": _stop_copy,
    "leave": _leave,
    "kill WatchDog": _kill("watchdog"),
    "stop WatchDog": _stop_kind("watchdog"),
    "kill manager": _kill_manager,
    "stop manager": _stop_manager,
    "kill guardian": _kill("guardian"),
    "stop guardian": _stop_kind("guardian"),
    "stop host": _stop_host,
    "lose power": _lose_power,
    "end node": _end_node,
    "cut off": _cut_off,
    "cut peers": _cut_peers,
    "slow link": _slow_link,
    "slow answers": _slow_answers,
    "lose answers": _lose_answers,
    "cannot run": _cannot_run,
    "etcd loses its leader": _etcd_leaderless,
    "etcd stalls": _etcd_stalls,
    "etcd member down": _etcd_member_down,
    "etcd member stops": _etcd_member_stops,
    "etcd down": _etcd_down,
    "etcd compacts": _on_etcd(lambda cluster, fault: cluster.etcd.compact()),
    "streams break": _on_etcd(lambda cluster, fault: cluster.etcd.break_streams(fault.how)),
    "streams fall silent": _on_etcd(lambda cluster, fault: cluster.etcd.silence_streams(fault.how)),
    "remove": _remove,
    "register again": _register_again,
    "pause": _pause,
    "pause all": _pause_all,
    "scale": _scale,
    "switchover": _change(Ask.SWITCHOVER),
    "failover": _change(Ask.FAILOVER),
    "stop application": _stop_app,
    "drain": _drain,
}
