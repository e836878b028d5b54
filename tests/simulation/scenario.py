"""What happens in one run, all of it made from a seed: hosts, applications and a list of faults."""

from __future__ import annotations

from random import Random

from attrs import evolve, frozen

from etcdreplica.core.timing import PRESETS, Timing
from etcdreplica.model import Program, Registration
from etcdreplica.words import Failover, Style

WARM_UP_S = 8.0  # before the first fault
STORM_S = 60.0  # while there are faults
FAILSAFE = 0.2  # of the applications with backups


@frozen
class Fault:
    """One thing that goes wrong, or that somebody does, `lasts` seconds long. `target`: a host, an application or nothing."""

    at: float
    kind: str
    target: str = ""
    lasts: float = 0.0
    how: float = 0.0  # between 0 and 1: chooses among variants

    def __str__(self) -> str:
        lasts = f" for {self.lasts:.2f} s" if self.lasts else ""
        return f"{self.at:7.3f} {self.kind} {self.target}{lasts} ({self.how:.3f})"


@frozen
class App:
    """One application. `by_hand`: on this host somebody starts it; else it is registered from elsewhere."""

    registration: Registration
    by_hand: str = ""


@frozen
class Scenario:
    """One run. `calm`: its faults are those that nobody may notice."""

    seed: int
    hosts: int
    preset: str
    calm: bool
    apps: tuple[App, ...]
    faults: tuple[Fault, ...]

    @property
    def timing(self) -> Timing:
        """The timings of all hosts."""
        return PRESETS[self.preset]

    def __str__(self) -> str:
        apps = ", ".join(
            f"{a.registration.name} ({a.registration.style}, degree {a.registration.degree}, {a.registration.failover}"
            + (", failsafe" if a.registration.failsafe else "")
            + (f", by hand on {a.by_hand}" if a.by_hand else "") + ")" for a in self.apps
        )  # fmt: skip
        kind = "calm" if self.calm else "storm"
        return f"seed {self.seed}: {kind} on {self.hosts} hosts, timing {self.preset}; {apps}"


# kind of fault: how often, what it is about, and how long it lasts at most, in TTLs
_HOST, _APP, _NOBODY = "host", "app", ""
STORM: dict[str, tuple[float, str, float]] = {
    "kill primary": (4, _APP, 0),
    "kill backup": (2, _APP, 0),
    "hang primary": (2, _APP, 0),
    "stop copy": (1, _APP, 3),
    "leave": (1, _APP, 0),
    "kill WatchDog": (3, _HOST, 0),
    "stop WatchDog": (2, _HOST, 2.5),
    "kill manager": (3, _HOST, 0),
    "stop manager": (2, _HOST, 3),
    "kill guardian": (1, _HOST, 0),
    "stop guardian": (1, _HOST, 2),
    "stop host": (2, _HOST, 2.5),
    "lose power": (3, _HOST, 3),
    "end node": (1, _HOST, 2),
    "cut off": (4, _HOST, 2.5),
    "cut peers": (1, _HOST, 2),
    "slow link": (3, _HOST, 2),
    "slow answers": (1, _HOST, 1.5),
    "lose answers": (2, _HOST, 1),
    "cannot run": (1, _HOST, 3),
    "etcd loses its leader": (2, _NOBODY, 1.5),
    "etcd stalls": (2, _NOBODY, 1.5),
    "etcd member down": (1, _NOBODY, 3),
    "etcd member stops": (2, _NOBODY, 3),
    "etcd down": (1, _NOBODY, 2),
    "etcd compacts": (3, _NOBODY, 0),
    "streams break": (2, _NOBODY, 0),
    "streams fall silent": (1, _NOBODY, 0),
    "remove": (1, _APP, 0),
    "register again": (2, _APP, 0),
    "pause": (1, _APP, 2),
    "pause all": (0.5, _NOBODY, 2),
}
CALM: dict[str, tuple[float, str, float]] = {
    "kill WatchDog": (2, _HOST, 0),
    "stop WatchDog": (1, _HOST, 0.25),
    "kill manager": (2, _HOST, 0),
    "stop manager": (2, _HOST, 3),
    "stop host": (1, _HOST, 0.2),
    "slow link": (1, _HOST, 0.5),
    "cut off": (1, _HOST, 0.15),
    "etcd loses its leader": (2, _NOBODY, 0.2),
    "etcd stalls": (2, _NOBODY, 0.2),
    "etcd member down": (1, _NOBODY, 2),
    "etcd member stops": (1, _NOBODY, 2),
    "etcd compacts": (2, _NOBODY, 0),
    "streams break": (2, _NOBODY, 0),
    "streams fall silent": (1, _NOBODY, 0),
}


def scenario(seed: int, *, calm: bool | None = None, only: tuple[str, ...] = (), failsafe: float | None = None) -> Scenario:
    """Make the scenario of a seed; `only`: a storm of these kinds of faults; `failsafe`: the share of applications with it."""
    random = Random(seed)
    hosts = random.choice((2, 3, 3, 3, 4, 5))
    preset = random.choice(("safe", "safe", "safe", "fast", "calm", "calm"))
    is_calm = random.random() < 0.2
    calm = (is_calm and not only) if calm is None else calm
    fast = not calm and random.random() < 0.1
    apps = tuple(_app(random, number, hosts, fast) for number in range(random.choice((1, 1, 2, 3))))
    share = (0.0 if only else FAILSAFE) if failsafe is None else failsafe
    apps = tuple(_failsafe(app, share, Random(f"{seed}/{app.registration.name}")) for app in apps)
    ttl_s = PRESETS[preset].lease_ttl_s
    faults = _calm(random, hosts, apps, ttl_s) if calm else _storm(random, hosts, apps, ttl_s, only or tuple(STORM))
    return Scenario(seed, hosts, preset, calm, apps, tuple(sorted(faults, key=lambda fault: fault.at)))


def _app(random: Random, number: int, hosts: int, fast: bool) -> App:
    style = random.choice((Style.WARM, Style.WARM, Style.COLD, Style.HOT))
    fast = fast and random.random() < 0.7
    registration = Registration(
        name=f"app-{number}",
        style=style,
        degree=random.randint(1, min(3, hosts)),
        program=Program(("app", f"app-{number}"), "/"),
        stop_timeout_s=random.choice((0.1, 2.0, 8.0)),
        hang_timeout_s=random.choice((3.0, 10.0)),
        failover=Failover.FAST if fast else Failover.SAFE,
        restarts_here=random.choice((0, 0, 0, 1)),
        max_restarts=0,
    )
    by_hand = f"host-{chr(97 + random.randrange(hosts))}" if random.random() < 0.3 else ""
    return App(registration, by_hand)


def _failsafe(app: App, share: float, random: Random) -> App:
    """With a chance of its own, so that the other choices of a seed stay what they were."""
    chosen = app.registration.degree > 1 and random.random() < share
    return evolve(app, registration=evolve(app.registration, failsafe=True)) if chosen else app


def _storm(random: Random, hosts: int, apps: tuple[App, ...], ttl_s: float, kinds: tuple[str, ...]) -> list[Fault]:
    weights = [STORM[kind][0] for kind in kinds]
    faults: list[Fault] = []
    for kind in random.choices(kinds, weights, k=random.randint(1, 14)):
        fault = _fault(random, WARM_UP_S + STORM_S * random.random(), kind, STORM, hosts, apps, ttl_s)
        if faults and random.random() < 0.5:  # troubles come together, and often to the same place
            before = random.choice(faults)
            near_s = random.choice((0.0, 0.001, 0.01, 0.2, 1.0, ttl_s)) * random.random()
            same = STORM[kind][1] == STORM[before.kind][1] and random.random() < 0.6
            fault = evolve(
                fault,
                at=round(min(before.at + near_s, WARM_UP_S + STORM_S - 0.1), 4),
                target=before.target if same else fault.target,
            )
        faults.append(fault)
    return faults


def _calm(random: Random, hosts: int, apps: tuple[App, ...], ttl_s: float) -> list[Fault]:
    """Faults one after the other: each of them alone goes unnoticed."""
    kinds, weights = list(CALM), [weight for weight, _, _ in CALM.values()]
    faults: list[Fault] = []
    at = WARM_UP_S
    for kind in random.choices(kinds, weights, k=random.randint(0, 5)):
        fault = _fault(random, at, kind, CALM, hosts, apps, ttl_s)
        faults.append(fault)
        at += fault.lasts + max(11.0, 1.5 * ttl_s) + random.random()
    return faults


def _fault(
    random: Random,
    at: float,
    kind: str,
    table: dict[str, tuple[float, str, float]],
    hosts: int,
    apps: tuple[App, ...],
    ttl_s: float,
) -> Fault:
    _, about, most = table[kind]
    lasts = most * ttl_s * random.random()
    target = ""
    if about == _HOST:
        target = f"host-{chr(97 + random.randrange(hosts))}"
    elif about == _APP:
        target = random.choice(apps).registration.name
    return Fault(round(at, 3), kind, target, round(lasts, 3), int(random.random() * 1000) / 1000)
