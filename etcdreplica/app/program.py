"""How this very process was started, so that other hosts can start it too."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from etcdreplica.app.protocol import DETACH_ENV
from etcdreplica.errors import UsageError

if TYPE_CHECKING:
    from typing import Any

# Variables that belong to one login, terminal or service invocation, or to this host's own etcdreplica.
_LOCAL = re.compile(
    r"_|PWD|OLDPWD|SHLVL|TERM(_.*|INFO)?|COLORTERM|LINES|COLUMNS|TTY|HOSTNAME|DISPLAY|WAYLAND_DISPLAY|WINDOWID|MAIL|SSH_.*|SUDO_.*"
    r"|DBUS_.*|XDG_(SESSION|RUNTIME|SEAT|VTNR).*|TMUX.*|STY|INVOCATION_ID|JOURNAL_STREAM|NOTIFY_SOCKET|WATCHDOG_.*"
    r"|LISTEN_.*|SYSTEMD_.*|PYTEST_.*|ETCDREPLICA_.*"
)


def capture() -> dict[str, Any]:
    """Return the command, directory and environment that start this program again, as `model.Program` has them.

    `sys.orig_argv` is the command line as the kernel saw it, so scripts, `-m`, `-c`, console scripts and interpreter
    options all come out right. Raises UsageError for a program that only exists in this process.
    """
    arguments = sys.orig_argv[1:]
    if os.environ.get(DETACH_ENV) == "1" and "--detach" in arguments:
        arguments.remove("--detach")  # the copies are to run, not to register
    main = sys.modules["__main__"]
    script: str | None = getattr(main, "__file__", None)
    by_name = getattr(main, "__spec__", None) is not None or (script is None and sys.argv[:1] == ["-c"])
    if not by_name and (script is None or script == "<stdin>"):
        raise UsageError("a program typed in or read from standard input cannot be started on another host: use a file")
    directory = os.getcwd()  # noqa: PTH109  (pathlib would cost every import 3 ms)
    for text in (directory, *arguments):
        if not _is_text(text):
            raise UsageError(f"the command line and the directory must be UTF-8 to be started on another host: {text!r}")
    environment = {n: v for n, v in os.environ.items() if not _LOCAL.fullmatch(n) and _is_text(n) and _is_text(v)}
    return {
        "argv": [sys.executable, *arguments],
        "cwd": directory,
        "env": environment,
        "needs": [] if by_name or script is None else [os.path.abspath(script)],  # noqa: PTH100
    }


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def default_name(function: Callable[..., Any]) -> str:
    """Name an application after its module, and its function unless that is called main."""
    module = function.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        script = os.path.basename(getattr(main, "__file__", None) or "app")  # noqa: PTH119
        module = spec.name if spec else os.path.splitext(script)[0]  # noqa: PTH122
    name = module.removesuffix(".__main__")
    if function.__qualname__ != "main":
        name += f".{function.__qualname__}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:63].rstrip("._-")
