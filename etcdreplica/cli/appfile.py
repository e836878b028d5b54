"""Application files: TOML with one table [application.NAME] for each application, and what `protect` takes as options.

The keys are named after the options of `protect` and the arguments of `@protected`. Reading and writing go through the same
plain form, so what is written reads back as it was.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from attrs import evolve, fields_dict

from etcdreplica.errors import ConfigurationError
from etcdreplica.model import Hooks, Probe, Registration
from etcdreplica.words import Keep, Style

TABLE = "application"
_PLAIN = ("standby", "pre_start", "on_promote", "on_demote", "notify", "hook_timeout")
_DECORATED = ("hang_timeout", "object", "min_in_sync", "durable")
_SIMPLE = (
    *("style", "degree", "hosts", "labels", "keep", "stop_timeout", "start_timeout", "hang_timeout", "probes"),
    *("restarts_here", "max_restarts", "restart_window", "failover", "failsafe", "object", "min_in_sync", "durable", "standby"),
)
_PROGRAM = ("command", "cwd", "needs", "env")
KEYS = (*_PROGRAM, "decorated", *_SIMPLE, *_PLAIN[1:], "overrides")
"""All that may stand in the table of an application."""
ENVIRONMENT = re.compile(r"(^|\.)env\.")  # keys of what may be secret
_PROBE_KEYS = ("target", "interval", "timeout", "failures", "grace")
_OVERRIDE_KEYS = ("command", "python", "cwd", "env")
_FIELD = {"argv": "command", "timeout_s": "hook_timeout"}  # names in records that no rule turns into those in files


def registration_of(name: str, settings: Mapping[str, Any]) -> Registration:
    """Return the registration with these settings, by their names in files. Raises ConfigurationError, which names the key."""
    _check_keys(settings, KEYS)
    if "command" not in settings:
        raise ConfigurationError("it has no command")
    decorated = settings.get("decorated", False)
    if not isinstance(decorated, bool):
        raise ConfigurationError(f"decorated is true or false, not {decorated!r}")
    others, why = (_PLAIN, "a program that does not use @protected") if decorated else (_DECORATED, "one that uses @protected")
    for key in settings:
        if key in others:
            raise ConfigurationError(f"{key} is for {why}" + ("" if decorated else ", which needs decorated = true"))
    record: dict[str, Any] = {
        "name": name,
        "style": Style.WARM if decorated else Style.COLD,
        "degree": 2,
        "keep": Keep.UNTIL_DONE if decorated else Keep.ALWAYS,
        "plain": not decorated,
        "program": {"cwd": "/", **{_record_key(key): settings[key] for key in _PROGRAM if key in settings}},
        "hooks": {_record_key(key): settings[key] for key in _PLAIN[1:] if key in settings},
    }
    record |= {_record_key(key): settings[key] for key in _SIMPLE if key in settings}
    record["probes"] = _list(settings, "probes", _probe)
    record["overrides"] = {host: _override(host, given) for host, given in _table(settings, "overrides").items()}
    for key in ("hosts", "command", "needs"):
        _list(settings, key, lambda word: word)
    try:
        registration = msgspec.convert(record, Registration)
    except msgspec.ValidationError as error:
        raise ConfigurationError(_in_their_words(str(error))) from None
    if not registration.program.argv or not registration.program.argv[0] or not registration.program.cwd:
        raise ConfigurationError("command is a list of words, the program first, and cwd a directory")
    return evolve(registration, hosts=tuple(dict.fromkeys(registration.hosts)))


def settings_of(registration: Registration, *, defaults: bool = False) -> dict[str, Any]:
    """Return the settings that make this registration, with or without those that are as by default."""
    plain = msgspec.json.decode(msgspec.json.encode(registration))
    found: dict[str, Any] = {"command": plain["program"]["argv"], "decorated": not registration.plain}
    found |= {key: plain[_record_key(key)] for key in _SIMPLE}
    found |= {key: plain["program"][key] for key in _PROGRAM[1:]}
    found |= {key: plain["hooks"][_record_key(key)] for key in _PLAIN[1:]}
    found["probes"] = [_probe_settings(probe) for probe in registration.probes]
    found["overrides"] = {
        host: {_file_key(key): value for key, value in override.items() if value}
        for host, override in plain["overrides"].items()
    }
    for key in _PLAIN if not registration.plain else _DECORATED:
        del found[key]
    if defaults:
        return found
    least = {"command": found["command"], "decorated": not registration.plain}
    usual = settings_of(registration_of("x", {**least, "style": "cold"}), defaults=True)
    shown = {"command", "style", "degree", *([] if registration.plain else ["decorated"])}
    return {key: value for key, value in found.items() if key in shown or value != usual[key]}


def read_files(paths: Iterable[Path]) -> dict[str, Registration]:
    """Return the registrations in files, by name. Raises ConfigurationError, which names the file and the application."""
    found: dict[str, Registration] = {}
    where: dict[str, Path] = {}
    for path in paths:
        try:
            document = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} is no TOML: {error}") from None
        for name, registration in _read(document, path).items():
            if name in found:
                raise ConfigurationError(f"application {name} stands in {where[name]} and in {path}")
            found[name], where[name] = registration, path
    return found


def write(registrations: Iterable[Registration]) -> str:
    """Return the file with these applications."""
    import tomli_w

    return tomli_w.dumps({TABLE: {each.name: settings_of(each) for each in registrations}})


def differences(before: Registration | None, after: Registration) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by their names in files, as they are and as they would be; None where there is none.

    The values of environment variables are left out: they may be secrets.
    """
    old = _flat(settings_of(before, defaults=True)) if before is not None else {}
    new = _flat(settings_of(after, defaults=before is not None))
    changed = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    return {key: tuple(map(_hidden, pair)) if ENVIRONMENT.search(key) else pair for key, pair in changed.items()}


def _hidden(value: Any) -> Any:
    return None if value is None else "(not shown)"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _read(document: Mapping[str, Any], path: Path) -> dict[str, Registration]:
    try:
        _check_keys(document, (TABLE,))
        tables = _table(document, TABLE)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    if not tables:
        raise ConfigurationError(f"{path}: there is no application: write a table [{TABLE}.NAME] for each")
    found = {}
    for name, settings in tables.items():
        try:
            if not isinstance(settings, dict):
                raise ConfigurationError(f"write it as a table [{TABLE}.{name}]")
            found[name] = registration_of(name, settings)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: application {name}: {error}") from None
    return found


def _check_keys(given: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known are: {', '.join(known)}"
            raise ConfigurationError(f"unknown key '{key}'{where}: {hint}")


def _table(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = settings.get(key, {})
    if not isinstance(found, dict):
        raise ConfigurationError(f"{key} is a table, not {found!r}")
    return found


def _list(settings: Mapping[str, Any], key: str, read: Any) -> list[Any]:
    found = settings.get(key, [])
    if not isinstance(found, (list, tuple)):
        raise ConfigurationError(f"{key} is a list, not {found!r}")
    return [read(each) for each in found]


def _probe(given: Any) -> Any:
    if not isinstance(given, dict):
        return {"target": given}
    _check_keys(given, _PROBE_KEYS, " of a probe")
    return {_record_key(key, _PROBE_SECONDS): value for key, value in given.items()}


def _probe_settings(probe: Probe) -> Any:
    plain = msgspec.to_builtins(probe)
    usual = msgspec.to_builtins(Probe(probe.target))
    changed = {key.removesuffix("_s"): value for key, value in plain.items() if value != usual[key]}
    return {"target": probe.target, **changed} if changed else probe.target


def _override(host: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigurationError(f"overrides.{host} is a table, not {given!r}")
    _check_keys(given, _OVERRIDE_KEYS, f" in overrides.{host}")
    return {_record_key(key): value for key, value in given.items()}


_SECONDS = frozenset(key for key in (*fields_dict(Registration), *fields_dict(Hooks)) if key.endswith("_s"))
_PROBE_SECONDS = frozenset(key for key in fields_dict(Probe) if key.endswith("_s"))


def _record_key(key: str, seconds: frozenset[str] = _SECONDS) -> str:
    """Return how a key of a file is called in the records."""
    special = {theirs: ours for ours, theirs in _FIELD.items()}
    return special.get(key) or (f"{key}_s" if f"{key}_s" in seconds else key)


def _file_key(key: str) -> str:
    return _FIELD.get(key) or key.removesuffix("_s")


def _in_their_words(error: str) -> str:
    """Return what the decoder has found wrong, with the place as it stands in the file."""
    text, _, place = error.partition(" - at `$")
    path = [_file_key(part) for part in re.findall(r"\.(\w+)|(\[.*?\])", place) for part in part if part]
    path = [part for part in path if part not in ("program", "hooks")]
    return f"{'.'.join(path).replace('.[', '[')}: {text}" if path else text
