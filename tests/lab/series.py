"""A random series of faults, drawn from one seed, with checks after each of them and at the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import Factory, define

from etcdreplica import connect
from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from tests.lab.checks import Hit, lost_checkpoints, lost_tokens, needless
from tests.lab.faults import DELAYS, MISSING, NEMESES, Choice, afflicted
from tests.lab.leftovers import leftovers
from tests.lab.world import HOSTS, OBJECT, World

STALL_S = 1.5  # a lab that could not run for so long cannot tell what is needless
CALM_S = (0.0, 2.0)  # between faults


@define
class Report:
    """What a series did, and what it found."""

    seed: int
    faults: Counter[str] = Factory(Counter)
    fail_overs: int = 0
    updates: int = 0
    checkpoints: int = 0
    stalls: int = 0
    slowest_recovery_s: float = 0.0
    seconds: float = 0.0
    violations: list[str] = Factory(list)

    def as_json(self) -> dict[str, Any]:
        """Return it for a file."""
        return {name: getattr(self, name) for name in self.__slots__ if not name.startswith("__")} | {
            "faults": dict(self.faults.most_common()),
            "missing": MISSING,
        }

    def text(self) -> str:
        """Return it for people."""
        kinds = "\n".join(f"  {count:4} {kind}" for kind, count in sorted(self.faults.items()))
        missing = "".join(f"\n  not here: {kind} ({why})" for kind, why in MISSING.items())
        return (
            f"seed {self.seed}: {self.faults.total()} faults in {self.seconds:.0f} s\n{kinds}{missing}\n"
            f"  {self.fail_overs} fail-overs, {self.updates} updates and {self.checkpoints} checkpoints acknowledged, "
            f"slowest recovery {self.slowest_recovery_s:.1f} s, {self.stalls} stalls of this machine"
        )


class Series:
    """Do faults for so many seconds, those of `kinds`. Everything about it is in `world.out` afterwards."""

    def __init__(self, world: World, seed: int, seconds: float, kinds: Sequence[str] | None = None) -> None:
        self.world = world
        self.report = Report(seed)
        self._rng = random.Random(seed)
        self._until = time.monotonic() + seconds
        self._kinds = list(kinds or NEMESES)
        self._hits: list[Hit] = []
        self._since = boottime()

    def run(self) -> Report:
        """Do it. What is wrong stands in the report."""
        started = time.monotonic()
        with _Stalls(self._hits) as stalls:
            try:
                while time.monotonic() < self._until and not self.report.violations:
                    self._step()
                self._finish()
            except EtcdReplicaError as error:
                self.report.violations.append(str(error).partition("\n")[0])  # cluster.txt has the rest
            finally:
                self.report.stalls = stalls.count
                self.report.seconds = time.monotonic() - started
                self._write()
        return self.report

    def _step(self) -> None:
        rng, world = self._rng, self.world
        kinds = rng.sample(self._kinds, min(len(self._kinds), rng.choice((1, 1, 2))))
        choices = [Choice.draw(rng) for _ in kinds]
        pause_s = rng.uniform(*CALM_S)
        anybody = len(DELAYS.intersection(kinds)) > 1
        with contextlib.ExitStack() as stack:
            for kind, choice in zip(kinds, choices, strict=True):
                world.note(f"fault: {kind} ({choice.host}, {choice.member})")
                try:
                    stack.enter_context(afflicted(world, kind, choice, self._hits, anybody=anybody))
                except LookupError as error:
                    world.note(f"    nothing to hit: {error}")
                else:
                    self.report.faults[kind] += 1
        world.note("all undone")
        took_s = world.wait_whole(" and ".join(kinds))
        world.note(f"whole again after {took_s:.1f} s")
        self.report.slowest_recovery_s = max(self.report.slowest_recovery_s, took_s)
        world.revive_clients()
        self._check()
        time.sleep(pause_s)

    def _check(self) -> None:
        world, found = self.world, self.report.violations
        found += world.witness.violations()
        for app, journal in world.writers.items():
            found += lost_checkpoints(app, journal)
        found += needless(dict(world.cluster.events), self._hits, self._since)

    def _finish(self) -> None:
        """Stop the clients, compare what they were told with what is there, and end everything."""
        world, report = self.world, self.report
        world.end_clients()
        self._check()
        report.violations += self._check_tokens()
        report.updates = sum(len(journal.numbers("done")) for journal in world.clients.values())
        report.checkpoints = sum(path.read_text().count("acknowledged") for path in world.writers.values())
        report.fail_overs = len([event for event in world.cluster.events.values() if event.failure.role == "primary"])
        report.violations += leftovers(world)

    def _check_tokens(self) -> list[str]:
        os.environ[SOCKET_ENV] = str(self.world.cluster.hosts[HOSTS[-1]].socket_path)
        found: list[str] = []
        try:
            with connect(OBJECT, timeout=60) as tokens:
                for client, journal in self.world.clients.items():
                    held: list[int] = []
                    while page := tokens.page(client, len(held)):
                        held += page
                    found += lost_tokens(client, journal, held)
        finally:
            del os.environ[SOCKET_ENV]
        return found

    def _write(self) -> None:
        world = self.world
        events = [
            (event.failure.detected_at, f"  {app}: {event.failure.host} lost its {event.failure.role}, epoch "
             f"{event.failure.epoch} ({event.failure.kind}: {event.failure.reason}); {event.action}")
            for (app, _), event in list(world.cluster.events.items())
        ]  # fmt: skip
        reigns = [(reign.begin, f"  {reign.app}: process {reign.pid} acts as primary of epoch {reign.epoch}")
                  for reign in world.witness.reigns()]  # fmt: skip
        lines = [f"{at - world.began:9.3f} {what}" for at, what in sorted([*world.timeline, *events, *reigns])]
        (world.out / "timeline.txt").write_text("\n".join([*lines, "", *self.report.violations, ""]))
        (world.out / "report.json").write_text(json.dumps(self.report.as_json(), indent=1) + "\n")
        if self.report.violations:
            (world.out / "cluster.txt").write_text(world.cluster.describe())


class _Stalls(threading.Thread):
    """Notices when this machine does not let us run: then daemons do not run either, and copies end for that reason."""

    def __init__(self, hits: list[Hit]) -> None:
        super().__init__(name="lab-stalls", daemon=True)
        self.count = 0
        self._hits = hits
        self._over = threading.Event()

    def __enter__(self) -> _Stalls:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        before = boottime()
        while not self._over.wait(0.1):
            now = boottime()
            if now - before > STALL_S:
                self.count += 1
                self._hits.append(Hit("stall of the machine", frozenset(HOSTS), before, now))
                sys.stderr.write(f"the lab could not run for {now - before:.1f} s\n")
            before = now


def new_seed() -> int:
    """Return LAB_SEED, or a new one."""
    return int(os.environ.get("LAB_SEED") or random.SystemRandom().randrange(10**6))


def out_directory(base: Path, seed: int) -> Path:
    """Make the directory of one run."""
    out = base / f"lab-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    return out
