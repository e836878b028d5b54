"""From the options of a daemon to its settings, and to those of the manager beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner

from etcdreplica.cli.daemons import _MANAGER, _environment
from etcdreplica.cli.options import host_options, manager_options, node_settings
from etcdreplica.core.timing import PRESETS, preset
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.errors import EtcdReplicaError

Options = Callable[[Callable[..., None]], Callable[..., None]]


def run(words: list[str], environment: dict[str, str], options: Options = host_options) -> dict[str, Any]:
    """Return the parameters that a command with these options gets."""
    got: dict[str, Any] = {}

    @click.command()
    @options
    def command(**parameters: Any) -> None:
        got.update(parameters)

    outcome = CliRunner().invoke(command, words, env={"ETCDREPLICA_TIMING": None, "ETCDREPLICA_LEASE_TTL": None, **environment})
    assert outcome.exit_code == 0, outcome.output
    return got


@pytest.mark.parametrize(
    ("words", "environment", "name", "ttl_s"),
    [
        ([], {}, "safe", None),
        (["--timing", "calm"], {}, "calm", None),
        (["--lease-ttl", "2"], {}, "safe", 2.0),
        (["--timing", "fast", "--lease-ttl", "3"], {}, "fast", 3.0),
        ([], {"ETCDREPLICA_TIMING": "fast"}, "fast", None),
        (["--timing", "calm"], {"ETCDREPLICA_TIMING": "fast", "ETCDREPLICA_LEASE_TTL": "20"}, "calm", 20.0),
    ],
)
@pytest.mark.parametrize("options", [host_options, manager_options])
def test_timing(options: Options, words: list[str], environment: dict[str, str], name: str, ttl_s: float | None) -> None:
    """A preset, a TTL, or both; calls to etcd take as long as the timing says, and the manager is told the same."""
    given = run(words, environment, options)
    settings = node_settings(**given)
    assert settings.timing == preset(name, ttl_s)
    assert settings.etcd.timeout_s == settings.timing.timeout_s
    again = node_settings(**run([], _environment(given, _MANAGER), manager_options))
    assert (again.timing, again.etcd) == (settings.timing, settings.etcd)


def test_set_that_does_not_fit() -> None:
    """It is refused with the rule, before anything is done."""
    with pytest.raises(EtcdReplicaError, match="fence_margin must hold"):
        node_settings(**run(["--timing", "calm", "--lease-ttl", "2"], {}))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_settings(name: str) -> None:
    """With the options that etcd is reached by."""
    settings: NodeSettings = node_settings(**run(["--timing", name], {}))
    assert settings.lease_ttl_s == PRESETS[name].lease_ttl_s
