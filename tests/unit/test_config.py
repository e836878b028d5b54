"""The configuration file, where settings come from, and what a reload may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from etcdreplica.cli import cli
from etcdreplica.cli.config_file import CONFIG_ENV, read_file
from etcdreplica.cli.reload import reloaded
from etcdreplica.cli.settings import SETTINGS
from etcdreplica.errors import ConfigurationError

CLEAN: dict[str, str | None] = {setting.variable: None for setting in SETTINGS}


def show(*words: str, **environment: str) -> dict[str, tuple[Any, str]]:
    """Return the value of each setting and where it comes from, as `config show` tells."""
    outcome = CliRunner().invoke(cli, ["config", "show", "-o", "json", *words], env={**CLEAN, CONFIG_ENV: None, **environment})
    assert outcome.exit_code == 0, outcome.output + repr(outcome.exception)
    return {each["name"]: (each["value"], each["from"]) for each in json.loads(outcome.output)}


def parameters(**changed: Any) -> dict[str, Any]:
    """Return what a node is given when nothing but this is said."""
    plain = {s.key: () if s.is_pairs else s.default for s in SETTINGS}
    return {**plain, "host": "host-a", **changed}


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    """Each setting tells who said it last; what nobody says is the default."""
    file = tmp_path / "node.toml"
    file.write_text('etcd = ["a:1", "b:2"]\ncluster = "of-file"\ncapacity = 7\nlease-ttl = 4\nlabel = { zone = "a" }\n')
    found = show("--config", str(file), "--capacity", "9", ETCDREPLICA_CLUSTER="of-env", ETCDREPLICA_CAPACITY="8")
    assert found["etcd"] == ("a:1,b:2", str(file))
    assert found["cluster"] == ("of-env", "$ETCDREPLICA_CLUSTER")
    assert found["capacity"] == (9, "--capacity")
    assert found["lease-ttl"] == (4.0, str(file))
    assert found["label"] == ({"zone": "a"}, str(file))
    assert found["checkpoint-keep"] == (3, "default")
    assert set(found) == {setting.name for setting in SETTINGS}


def test_every_setting_has_a_flag_a_variable_and_a_key(tmp_path: Path) -> None:
    """The three ways lead to the same value."""
    file = tmp_path / "node.toml"
    for setting in SETTINGS:
        if setting.name.startswith(("etcd-", "peer-", "timing", "lease")):
            continue  # those that must fit to others
        text = {int: "5", float: "5.0", bool: "true", dict: "zone=b"}.get(
            setting.type, "c" if setting.name != "etcd" else "c:1"
        )
        text = {"checkpoint-listen": "127.0.0.1:7000"}.get(setting.name, text)
        flags = [f"--{setting.name}"] if setting.type is bool else [f"--{setting.name}", text]
        by_flag, by_variable = show(*flags), show(**{setting.variable: text})
        key = (
            'label = { zone = "b" }'
            if setting.is_pairs
            else f"{setting.name} = {text if setting.type in (int, float, bool) else json.dumps(text)}"
        )
        file.write_text(key)
        by_file = show("--config", str(file))
        assert by_flag[setting.name][0] == by_variable[setting.name][0] != show()[setting.name][0], setting.name
        relative = str(tmp_path / text) if setting.is_path else by_flag[setting.name][0]
        assert by_file[setting.name] == (relative, str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lease_tll = 3", "unknown key 'lease_tll': the nearest one there is is 'lease-ttl'"),
        ("[labels]\nzone = 'a'", "unknown key 'labels': the nearest one there is is 'label'"),
        ("capacity = '5'", "capacity = '5': must be a whole number"),
        ("capacity = 5.5", "capacity = 5.5: must be a whole number"),
        ("capacity = true", "must be a whole number"),
        ("insecure = 1", "must be true or false"),
        ("label = { zone = 1 }", "must be a table of texts"),
        ("etcd = [1]", "must be a text"),
        ("timing = 'quick'", "'quick' is not one of 'safe', 'fast', 'calm'"),
        ("cluster = ", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    """File, key and what would be right."""
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as raised:
        read_file(file)
    assert str(file) in str(raised.value)
    assert message in str(raised.value)


def test_check_looks_at_what_must_fit_together(tmp_path: Path) -> None:
    """A file whose values are right one by one, a file that is not there, and one beside a default one that is broken."""
    file, broken = tmp_path / "node.toml", tmp_path / "broken.toml"
    file.write_text('timing = "calm"\nlease-ttl = 2')
    broken.write_text("nonsense")

    def check(*words: str) -> Any:
        return CliRunner().invoke(cli, ["config", "check", *words], env={**CLEAN, CONFIG_ENV: str(broken)}).exception

    assert "fence_margin must hold" in str(check(str(file)))
    assert "cannot read the configuration file" in str(check(str(tmp_path / "none.toml")))
    assert "broken.toml: not TOML" in str(check())
    file.write_text("capacity = 3")
    assert check(str(file)) is None


def test_reload_takes_what_it_may(caplog: pytest.LogCaptureFixture) -> None:
    """What leases, names and places were made with stays, and the log says so."""
    before = parameters(state_dir=Path("/s"), socket_path=Path("/s/s"), address="a")
    given = {**before, "capacity": 5, "etcd": "c:1", "labels": ("zone=b",), "host": "host-b", "timing": "fast", "cluster": "x"}
    options = reloaded(before, given)
    assert options == {**before, "capacity": 5, "etcd": "c:1", "labels": ("zone=b",)}
    stays = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split()[0] for text in stays] == ["cluster", "host", "timing"]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"capacity": 0}, ""),
        ({"etcd": "nowhere"}, ""),
        ({"peer_ca": "/none.pem"}, ""),
        ({"labels": ("x",)}, ""),
        ({}, "bad file"),
    ],
)
def test_bad_reload_changes_nothing(changed: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not even what is right in it."""
    before = parameters(state_dir=Path("/s"), socket_path=Path("/s/s"), address="a")
    assert reloaded(before, {**before, "checkpoint_keep": 9, **changed}, problem) == before
    assert "going on with the settings of before" in caplog.text
