"""Application files: what is written reads back as it was, and what is wrong is named."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, fields_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdreplica.cli.appfile import KEYS, differences, read_files, registration_of, settings_of, write
from etcdreplica.errors import ConfigurationError
from etcdreplica.model import Hooks, Override, Probe, Program, Registration
from etcdreplica.words import Failover, Keep, Style

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
WORD = st.from_regex(r"[A-Za-z0-9_/-]{1,12}", fullmatch=True)
NAME = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True)
COMMAND = st.one_of(st.just(""), WORD.map(lambda word: f"echo '{word}' \"$X\""))
SECONDS = st.floats(1, 3600).map(lambda value: round(value, 3))
PROBE = st.builds(
    Probe,
    target=st.sampled_from(["tcp:6379", "tcp:[::1]:80", "http://127.0.0.1:8000/health?x=1", "exec:test -e '/x'"]),
    interval_s=SECONDS,
    timeout_s=st.just(1.0),
    failures=st.integers(1, 9),
    grace_s=SECONDS,
)
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "name": NAME,
    "program": st.builds(
        Program,
        argv=st.tuples(WORD, st.just(""), TEXT),
        cwd=WORD,
        env=st.dictionaries(NAME, TEXT, max_size=3),
        needs=st.lists(WORD, max_size=2).map(tuple),
    ),
    "degree": st.integers(2, 3),
    "labels": st.dictionaries(NAME, TEXT, max_size=2),
    "keep": st.sampled_from(Keep),
    "stop_timeout_s": SECONDS,
    "start_timeout_s": SECONDS,
    "restarts_here": st.integers(0, 5),
    "max_restarts": st.integers(0, 50),
    "restart_window_s": SECONDS,
    "failover": st.sampled_from(Failover),
    "failsafe": st.booleans(),
    "probes": st.lists(PROBE, max_size=2).map(tuple),
    "hosts": st.sampled_from([(), ("a", "b", "c")]),
    "overrides": st.dictionaries(
        NAME,
        st.builds(
            Override,
            argv=st.none() | st.tuples(WORD, TEXT),
            python=st.none() | WORD,
            cwd=st.none() | WORD,
            env=st.dictionaries(NAME, TEXT, max_size=2),
        ),
        max_size=2,
    ),
}
HOOKS = st.builds(Hooks, pre_start=COMMAND, on_promote=COMMAND, on_demote=COMMAND, notify=COMMAND, timeout_s=SECONDS)
PLAIN = st.builds(
    Registration,
    **SHARED,
    plain=st.just(True),
    style=st.just(Style.WARM),
    standby=st.sampled_from(["sleep 1000"]),
    hooks=HOOKS,
) | st.builds(Registration, **SHARED, plain=st.just(True), style=st.just(Style.COLD), hooks=HOOKS)
DECORATED = st.builds(
    Registration, **SHARED, style=st.sampled_from(Style), hang_timeout_s=st.sampled_from([0.0, 10.0, 2.5])
) | st.builds(Registration, **SHARED, style=st.just(Style.HOT), object=st.just(True), durable=st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(PLAIN | DECORATED, max_size=3, unique_by=lambda each: each.name))
def test_what_is_written_reads_back(registrations: list[Registration]) -> None:
    """Every setting of every kind of application survives the file, and then nothing differs."""
    tables = tomllib.loads(write(registrations))["application"]
    assert list(tables) == [each.name for each in registrations]
    for each in registrations:
        read = registration_of(each.name, tables[each.name])
        assert read == each
        assert differences(each, read) == {}


def test_every_field_has_a_key() -> None:
    """A setting that is added to the registration must have its place in files."""
    fields = {*fields_dict(Registration), *fields_dict(Hooks), *fields_dict(Program)} - {"name", "origin", "program", "hooks"}
    renamed = {"argv": "command", "timeout_s": "hook_timeout", "plain": "decorated"}
    assert {renamed.get(name) or name.removesuffix("_s") for name in fields} == set(KEYS)


def test_defaults_are_not_written() -> None:
    """A file is as short as it can be, and says style and degree all the same."""
    registration = registration_of("cache", {"command": ["redis-server"], "hosts": ["b", "a", "b"]})
    assert (registration.plain, registration.keep, registration.program.cwd) == (True, Keep.ALWAYS, "/")
    assert settings_of(registration) == {"command": ["redis-server"], "style": "cold", "degree": 2, "hosts": ["b", "a"]}
    decorated = registration_of("worker", {"command": ["python3", "w.py"], "decorated": True})
    assert (decorated.plain, decorated.style, decorated.keep) == (False, Style.WARM, Keep.UNTIL_DONE)
    assert set(settings_of(decorated)) == {"command", "decorated", "style", "degree"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["there is no application", "[application.NAME]"]),
        ("[applications.cache]", ["unknown key 'applications'", "'application'"]),
        ("[application.cache]", ["application cache", "no command"]),
        ("[application.cache]\ncommand = ['x']\nprobe = ['tcp:1']", ["application cache", "unknown key 'probe'", "'probes'"]),
        ("[application.cache]\ncommand = ['x']\nzzz = 1", ["unknown key 'zzz'", "known are", "stop_timeout"]),
        ("[application.cache]\ncommand = 'redis-server'", ["command is a list"]),
        ("[application.cache]\ncommand = []", ["command is a list of words"]),
        ("[application.cache]\ncommand = ['x', 1]", ["command[1]", "`str`", "`int`"]),
        ("[application.cache]\ncommand = ['x']\ndegree = '2'", ["degree", "`int`", "`str`"]),
        ("[application.cache]\ncommand = ['x']\ndegree = 0", ["bad degree 0"]),
        ("[application.cache]\ncommand = ['x']\nstop_timeout = '9'", ["stop_timeout: ", "`float`"]),
        ("[application.cache]\ncommand = ['x']\nhook_timeout = 0", ["hook_timeout", "0.1"]),
        ("[application.cache]\ncommand = ['x']\nstyle = 'lukewarm'", ["style", "lukewarm"]),
        ("[application.cache]\ncommand = ['x']\nstyle = 'hot'", ["style hot", "@protected"]),
        ("[application.cache]\ncommand = ['x']\nstyle = 'warm'", ["standby", "on_promote"]),
        ("[application.cache]\ncommand = ['x']\nstandby = 'y'", ["standby is for style warm"]),
        ("[application.cache]\ncommand = ['x']\nhang_timeout = 1", ["hang_timeout", "decorated = true"]),
        ("[application.cache]\ncommand = ['x']\ndecorated = true\nnotify = 'y'", ["notify", "does not use @protected"]),
        ("[application.cache]\ncommand = ['x']\nprobes = 'tcp:1'", ["probes is a list"]),
        ("[application.cache]\ncommand = ['x']\nprobes = ['tcp:x']", ["bad probe 'tcp:x'"]),
        ("[application.cache]\ncommand = ['x']\nprobes = [{target = 'tcp:1', every = 2}]", ["unknown key 'every' of a probe"]),
        ("[application.cache]\ncommand = ['x']\n[application.cache.overrides.a]\nargv = ['y']", ["'argv' in overrides.a"]),
        ("[application.'a/b']\ncommand = ['x']", ["bad application name 'a/b'"]),
        ("application = 1", ["application is a table"]),
        ("[application]\ncache = 1", ["write it as a table [application.cache]"]),
        ("[application.cache", ["is no TOML", "Expected ']'"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    """The file, the application, the key, and what is near."""
    path = tmp_path / "app.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_files([path])
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_a_name_stands_in_one_file(tmp_path: Path) -> None:
    """Two files that name one application would contradict each other; both are named."""
    paths = [tmp_path / name for name in ("one.toml", "two.toml")]
    for path in paths:
        path.write_text("[application.cache]\ncommand = ['x']\n")
    with pytest.raises(ConfigurationError, match=r"cache stands in .*one.toml and in .*two.toml"):
        read_files(paths)
    with pytest.raises(ConfigurationError, match=r"cannot read .*three.toml: No such file"):
        read_files([tmp_path / "three.toml"])


def test_differences_do_not_show_the_environment() -> None:
    """Single values are compared, and those of variables are not shown."""
    before = registration_of("cache", {"command": ["x"], "env": {"A": "secret", "B": "1"}, "labels": {"zone": "a"}})
    program = evolve(before.program, env={"A": "other", "C": "3"})
    after = evolve(before, program=program, degree=3, labels={}, overrides={"h": Override(env={"D": "4"})})
    assert differences(before, after) == {
        "env.A": ("(not shown)", "(not shown)"),
        "env.B": ("(not shown)", None),
        "env.C": (None, "(not shown)"),
        "degree": (2, 3),
        "labels.zone": ("a", None),
        "overrides.h.env.D": (None, "(not shown)"),
    }
    assert differences(None, before)["command"] == (None, ["x"])
