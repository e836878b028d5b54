"""How values look to a person."""

from __future__ import annotations

import datetime
import json
from typing import Any

import click

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_AGES = (("s", 120, 1), ("min", 7200, 60), ("h", 172_800, 3600))


def printed(value: Any, output: str) -> bool:
    """Print a value as JSON or YAML, if one of them is wanted; return whether it was."""
    if output == "json":
        click.echo(json.dumps(value, indent=2))
    elif output == "yaml":
        import yaml

        plain = json.loads(json.dumps(value))  # enums as texts, tuples as lists
        click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)
    return output != "table"


def table(heads: list[str], rows: list[list[Any]], *, empty: str) -> None:
    """Print rows under heads, or what to say when there are none."""
    if not rows:
        click.echo(empty)
        return
    texts = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [heads, *texts]) for i in range(len(heads))]
    for row in [[head.upper() for head in heads], *texts]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def when(wall: float) -> str:
    """Return a time of day, here."""
    return datetime.datetime.fromtimestamp(wall).astimezone().isoformat(" ", "seconds")


def size_text(size: int) -> str:
    """Return a number of bytes in the unit that suits it."""
    power = min(len(_UNITS) - 1, max(0, size.bit_length() - 1) // 10)
    return f"{size / 1024**power:.{1 if power else 0}f} {_UNITS[power]}"


def age_text(seconds: float) -> str:
    """Return how long ago something was, roughly."""
    seconds = max(0.0, seconds)  # clocks of hosts differ
    for unit, most, length in _AGES:
        if seconds < most:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)
