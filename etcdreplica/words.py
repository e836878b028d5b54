"""The words a user's program needs, and the rules for them; nothing else, so that importing them costs nothing.

`model` builds its records on the same rules, so that the decorator and the WatchDog cannot disagree.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping

from etcdreplica.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
MAX_DEGREE = 30
MAX_STOP_TIMEOUT_S = 3600.0
MAX_DAY_S = 86400.0
SHORTEST_HANG_S = 0.5
PROBE_CALL = "call"  # a probe that the application itself answers, by its `health` function
PROBE_INTERVAL_S, PROBE_TIMEOUT_S, PROBE_FAILURES, PROBE_GRACE_S = 2.0, 1.0, 3, 10.0
HOOK_TIMEOUT_S = 10.0
_PROBE = re.compile(r"call|tcp:(\S+:)?(?P<port>[0-9]{1,5})|https?://\S+|exec:.*\S.*", re.DOTALL)


class Style(enum.StrEnum):
    """What backups do while they are backups."""

    COLD = "cold"
    WARM = "warm"
    HOT = "hot"


class Role(enum.StrEnum):
    """What a replica is to its application."""

    PRIMARY = "primary"
    BACKUP = "backup"


class Failover(enum.StrEnum):
    """When a host counts as lost."""

    SAFE = "safe"  # its lease has ended: nothing runs there any more
    FAST = "fast"  # its peers cannot reach it: what runs there may go on until its deadline


class Keep(enum.StrEnum):
    """Whether a body that returns ends the application."""

    UNTIL_DONE = "until-done"
    ALWAYS = "always"


def check_name(what: str, name: object) -> str:
    """Return `name` if it can stand in a key and a file name, else raise `UsageError`."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(
            f"bad {what} {name!r}: use 1 to 63 letters, digits, '.', '_' or '-', beginning and ending with a letter or digit"
        )
    return name


def parse_style(value: object) -> Style:
    """Turn a word of the user into a `Style`."""
    try:
        return Style(value)  # type: ignore[arg-type]
    except ValueError:
        raise UsageError(f"unknown style {value!r}: use one of {', '.join(Style)}") from None


def parse_keep(value: object) -> Keep:
    """Turn a word of the user into a `Keep`."""
    try:
        return Keep(value)  # type: ignore[arg-type]
    except ValueError:
        raise UsageError(f"unknown keep {value!r}: use one of {', '.join(Keep)}") from None


def parse_failover(value: object) -> Failover:
    """Turn a word of the user into a `Failover`."""
    try:
        return Failover(value)  # type: ignore[arg-type]
    except ValueError:
        raise UsageError(f"unknown failover {value!r}: use one of {', '.join(Failover)}") from None


def check_probe(target: object) -> str:
    """Return what a probe asks, if it is one of tcp:[HOST:]PORT, http[s]://URL, exec:COMMAND or call."""
    found = _PROBE.fullmatch(target) if isinstance(target, str) else None
    if not isinstance(target, str) or not found or not 0 < int(found["port"] or 1) < 65536:
        raise UsageError(f"bad probe {target!r}: use tcp:PORT, tcp:HOST:PORT, http://URL, https://URL or exec:COMMAND")
    return target


def check_seconds(what: str, value: object, least: float, most: float = MAX_DAY_S) -> float:
    """Return seconds within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UsageError(f"bad {what} {value!r}: seconds from {least:g} to {most:g}")
    return float(value)


def check_hang_timeout(value: object) -> float:
    """Return seconds without a sign of life after which a copy counts as hung; None and 0 mean never."""
    return 0.0 if value in (None, 0) else check_seconds("hang_timeout", value, SHORTEST_HANG_S)


def check_count(what: str, value: object, least: int = 0, most: int = 1_000_000) -> int:
    """Return a whole number within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"bad {what} {value!r}: a whole number from {least} to {most}")
    return value


def check_degree(value: object, hosts: tuple[str, ...] = ()) -> int:
    """Return a number of copies that can be kept, on these hosts if any are named."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DEGREE:
        raise UsageError(f"bad degree {value!r}: it is the number of copies, a whole number from 1 to {MAX_DEGREE}")
    if hosts and value > len(set(hosts)):
        raise UsageError(f"degree {value} cannot be met on {len(set(hosts))} host(s): name more hosts or lower it")
    return value


def check_replication(replicated: object, degree: int, min_in_sync: object, durable: object) -> None:
    """Raise `UsageError` unless these settings of a replicated object fit together, and with what is none."""
    if not all(isinstance(value, bool) for value in (replicated, durable)):
        raise UsageError(f"object and durable are True or False, not {replicated!r} and {durable!r}")
    check_count("min_in_sync", min_in_sync, 1, degree)
    if not replicated and (durable or min_in_sync != 1):
        raise UsageError("min_in_sync and durable are settings of replicated objects, and this is none")


def check_plain(plain: object, style: str, standby: str, hooks: Mapping[str, str], probes: Iterable[str]) -> None:
    """Raise `UsageError` unless these settings of a plain program fit together, and with what is none. `hooks` are by name."""
    given = [name for name, command in {"standby": standby, **hooks}.items() if command]
    for name, command in {"standby": standby, **hooks}.items():
        if not isinstance(command, str) or (command and not command.strip()) or "\0" in command:
            raise UsageError(f"bad {name} {command!r}: it is a shell command")
    if not plain:
        if given:
            raise UsageError(f"{', '.join(given)}: for plain programs only; one that uses @protected has its own code for that")
        return
    if style == Style.HOT:
        raise UsageError("style hot is for programs that use @protected: a plain one that runs on every host is warm")
    if standby and style != Style.WARM:
        raise UsageError(f"standby is for style warm: under {style} nothing runs on backups")
    if style == Style.WARM and not standby and not hooks.get("on_promote"):
        raise UsageError(
            "style warm needs standby (a command that runs on backups in the program's place) or on_promote (the program runs "
            "on every host, and this command makes one of them serve); without either, use style cold"
        )
    if PROBE_CALL in probes:
        raise UsageError('a probe "call" is answered by the health function of a program that uses @protected: use another one')


def check_failsafe(failsafe: object, degree: int) -> bool:
    """Return whether a primary may run on without its lease; that takes backups that vouch for it."""
    if not isinstance(failsafe, bool):
        raise UsageError(f"failsafe is True or False, not {failsafe!r}")
    if failsafe and degree < 2:
        raise UsageError("failsafe needs a degree of 2 or more: the hosts of the backups vouch for the primary")
    return failsafe


def check_stop_timeout(value: object) -> float:
    """Return seconds that a copy may take to end."""
    return check_seconds("stop_timeout", value, 0, MAX_STOP_TIMEOUT_S)
