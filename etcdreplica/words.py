"""The words a user's program needs, and the rules for them; nothing else, so that importing them costs nothing.

`model` builds its records on the same rules, so that the decorator and the WatchDog cannot disagree.
"""

from __future__ import annotations

import enum
import re

from etcdreplica.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
MAX_DEGREE = 30
MAX_STOP_TIMEOUT_S = 3600.0


class Style(enum.StrEnum):
    """What backups do while they are backups."""

    COLD = "cold"
    WARM = "warm"
    HOT = "hot"


class Role(enum.StrEnum):
    """What a replica is to its application."""

    PRIMARY = "primary"
    BACKUP = "backup"


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


def check_degree(value: object, hosts: tuple[str, ...] = ()) -> int:
    """Return a number of copies that can be kept, on these hosts if any are named."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DEGREE:
        raise UsageError(f"bad degree {value!r}: it is the number of copies, a whole number from 1 to {MAX_DEGREE}")
    if hosts and value > len(set(hosts)):
        raise UsageError(f"degree {value} cannot be met on {len(set(hosts))} host(s): name more hosts or lower it")
    return value


def check_stop_timeout(value: object) -> float:
    """Return seconds that a copy may take to end."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_STOP_TIMEOUT_S:
        raise UsageError(f"bad stop_timeout {value!r}: seconds from 0 to {MAX_STOP_TIMEOUT_S:g}")
    return float(value)
