"""`start`: functions and scripts, decorated and not, and targets that are none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.model import AssignmentState
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import (
    APPS,
    PATIENCE_S,
    STEADY,
    cli,
    command,
    fails_over,
    forget,
    raw_keys,
    the_error,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Two hosts."""
    with LocalCluster(2, etcd=etcd_server, cluster=unique("start"), lease_ttl_s=LASTING_TTL_S) as running:
        yield running


def environment(name: str = "unnamed") -> dict[str, str]:
    """Return what makes the functions found, and names the decorated ones."""
    return {"PYTHONPATH": str(APPS), "CLI_TEST_NAME": name}


def start(cluster: LocalCluster, *arguments: str, name: str = "unnamed") -> subprocess.CompletedProcess[str]:
    """Run `etcdreplica start ARGUMENTS` on host-a to its end."""
    env = {**environment(name), "ETCDREPLICA_SOCKET": str(cluster.hosts["host-a"].socket_path)}
    return cli("start", *arguments, env=env)


@pytest.mark.parametrize("function", ["plain", "plain_async", "Nested.plain"])
@pytest.mark.parametrize("style", ["warm", "cold"])
def test_start_a_function(cluster: LocalCluster, function: str, style: str) -> None:
    """An undecorated one takes style, degree and name from the options; its copies start and take over."""
    name = unique(style)
    words = command("start", "--style", style, "--degree", "2", "--name", name, f"cli_functions:{function}")
    process = cluster.run(words, env=environment())
    cluster.wait_ready(name)
    assert cluster.primary(name) == ("host-a", process.pid)
    registration = cluster.view.apps[name].registration
    assert registration is not None
    assert (registration.style, registration.degree) == (style, 2)
    fails_over(cluster, name)
    assert cluster.primary(name)[0] == "host-b"
    forget(cluster, name)


@pytest.mark.parametrize(("function", "style"), [("decorated", "hot"), ("decorated_async", "cold")])
def test_start_a_decorated_function(cluster: LocalCluster, function: str, style: str) -> None:
    """It brings its own style, degree and name."""
    name = unique(function.replace("_", "-"))
    process = cluster.run(command("start", f"cli_functions:{function}"), env=environment(name))
    cluster.wait_ready(name)
    assert cluster.primary(name) == ("host-a", process.pid)
    registration = cluster.view.apps[name].registration
    assert registration is not None
    assert registration.style == style
    fails_over(cluster, name)
    forget(cluster, name)


def test_the_default_name_is_that_of_the_function(cluster: LocalCluster) -> None:
    """Module and function."""
    cluster.run(command("start", "cli_functions:plain"), env=environment())
    cluster.wait_ready("cli_functions.plain")
    forget(cluster, "cli_functions.plain")


def test_start_by_the_console_script(cluster: LocalCluster) -> None:
    """The installed `etcdreplica` is found again on the other hosts."""
    name = unique("console")
    script = Path(sys.executable).parent / "etcdreplica"
    cluster.run([str(script), "start", "--name", name, "cli_functions:plain"], env=environment())
    fails_over(cluster, name)
    forget(cluster, name)


def test_start_a_script(cluster: LocalCluster) -> None:
    """What stands after the script belongs to the script, though `start` has options of these names."""
    name = unique("script")
    words = command("start", str(STEADY), "--name", name, "--style", "cold", "--degree", "2", "--stop-timeout", "4")
    process = cluster.run(words)
    cluster.wait_ready(name)
    assert cluster.primary(name) == ("host-a", process.pid)
    registration = cluster.view.apps[name].registration
    assert registration is not None
    assert (registration.style, registration.stop_timeout_s) == ("cold", 4.0)
    fails_over(cluster, name)
    forget(cluster, name)


def test_help_after_a_script_is_the_scripts_own(cluster: LocalCluster) -> None:
    """`start app.py --help` asks app.py."""
    done = start(cluster, str(STEADY), "--help")
    assert done.returncode == 0
    assert "--copies-exit" in done.stdout


@pytest.mark.parametrize("kind", ["function", "script"])
def test_start_and_detach(cluster: LocalCluster, kind: str) -> None:
    """The command only registers, says so, and ends; the hosts start every copy, the first one here."""
    name = unique("detached")
    words = [str(STEADY), f"--name={name}"] if kind == "script" else ["--name", name, "cli_functions:plain"]
    done = start(cluster, "--detach", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert name in done.stdout
    cluster.wait_ready(name)
    assert cluster.primary(name)[0] == "host-a"
    registration = cluster.view.apps[name].registration
    assert registration is not None
    assert "--detach" not in registration.program.argv
    assert not any(variable.startswith("ETCDREPLICA_") for variable in registration.program.env)
    fails_over(cluster, name)
    forget(cluster, name)


def test_detach_twice_is_refused(cluster: LocalCluster) -> None:
    """The second time the application is protected already."""
    name = unique("detached")
    assert start(cluster, "--detach", "--name", name, "cli_functions:plain").returncode == 0
    assert name in the_error(start(cluster, "--detach", "--name", name, "cli_functions:plain"), 1)
    forget(cluster, name)


def test_a_body_that_returns_ends_the_command(cluster: LocalCluster) -> None:
    """Exit code 0, and the application is complete everywhere. A function without parameters is called without."""
    name = unique("returns")
    done = start(cluster, "--name", name, "cli_functions:returns")
    assert (done.returncode, done.stdout, done.stderr) == (0, "the body ran\n", "")
    cluster.wait_until(
        lambda view: (found := view.apps[name].assignment) is not None and found.state is AssignmentState.COMPLETED,
        "its completion",
    )
    forget(cluster, name)


def test_a_body_that_raises_ends_the_command(cluster: LocalCluster) -> None:
    """The user sees the user's own error."""
    name = unique("raises")
    done = start(cluster, "--name", name, "--degree", "1", "cli_functions:raises")
    assert done.returncode == 1
    assert "ValueError: no luck today" in done.stderr
    forget(cluster, name)


def test_without_a_watchdog(tmp_path: Path) -> None:
    """The socket is named, and what to start."""
    env = {**environment(), "ETCDREPLICA_SOCKET": str(tmp_path / "nobody")}
    error = the_error(cli("start", "cli_functions:plain", env=env), 1)
    assert str(tmp_path / "nobody") in error
    assert "etcdreplica node" in error


def test_unprotected_on_a_laptop(tmp_path: Path) -> None:
    """ETCDREPLICA_STANDALONE=1 needs no WatchDog."""
    env = {**environment(), "ETCDREPLICA_SOCKET": str(tmp_path / "nobody"), "ETCDREPLICA_STANDALONE": "1"}
    done = cli("start", "cli_functions:returns", env=env)
    assert (done.returncode, done.stdout) == (0, "the body ran\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("no_such_module:main",), "no_such_module"),
        (("cli_functions.deeper:main",), "cli_functions"),
        (("cli_functions:nothing",), "nothing"),
        (("cli_functions:NOT_CALLABLE",), "NOT_CALLABLE"),
        (("cli_functions:Nested",), "Nested"),
        (("cli_functions:",), "MODULE:FUNCTION"),
        ((":plain",), "MODULE:FUNCTION"),
        (("cli_functions",), "MODULE:FUNCTION"),
        ((".cli_functions:plain",), ".cli_functions"),
        (("no_such_script.py",), "no_such_script.py"),
        (("--style", "lukewarm", "cli_functions:plain"), "lukewarm"),
        (("--degree", "0", "cli_functions:plain"), "degree"),
        (("--degree", "two", "cli_functions:plain"), "two"),
        (("--name", "a b", "cli_functions:plain"), "a b"),
        (("--name", "x", "cli_functions:decorated"), "decorated with @protected already"),
        (("--style", "warm", str(STEADY)), "@protected"),
        ((), "MODULE:FUNCTION|MODULE:CLASS|SCRIPT"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, tuple) else None,
)
def test_a_bad_target_exits_2(cluster: LocalCluster, words: tuple[str, ...], named: str) -> None:
    """What is wrong is named, nothing is started, nothing is registered."""
    before = {key for key in raw_keys(cluster) if key.startswith("registrations/")}
    assert named in the_error(start(cluster, *words), 2)
    assert {key for key in raw_keys(cluster) if key.startswith("registrations/")} == before


def test_a_function_ended_by_sigint_hands_over(cluster: LocalCluster) -> None:
    """Ctrl-C to the first copy is a planned handover, also under `start`."""
    import signal

    name = unique("handover")
    process = cluster.run(command("start", "--name", name, "cli_functions:plain"), env=environment())
    epoch = cluster.wait_ready(name)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    cluster.wait_ready(name, after_epoch=epoch)
    forget(cluster, name)
