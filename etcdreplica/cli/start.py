"""`start`: run a program as the first copy of an application."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from etcdreplica.app.decorator import is_protected, protected
from etcdreplica.app.session import RegisteredOnly
from etcdreplica.errors import UsageError


@click.command("start", context_settings={"allow_interspersed_args": False}, short_help="Run a protected program.")
@click.option("--detach", is_flag=True, help="Only register it: the hosts start all copies, this process ends.")
@click.option("--style", default=None, help="cold, warm or hot; for a function that is not decorated.")
@click.option("--degree", type=int, default=None, help="Number of copies; likewise.")
@click.option("--name", default=None, help="Name of the application; likewise.")
@click.argument("target", metavar="MODULE:FUNCTION|MODULE:CLASS|SCRIPT")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def start_command(
    detach: bool, style: str | None, degree: int | None, name: str | None, target: str, arguments: tuple[str, ...]
) -> None:
    """Run a protected function or script on this host; it becomes the primary, and other hosts run the other copies.

    A function or class decorated with @protected brings its own style and degree; for another one give them here.

    \b
    Examples:
      etcdreplica start shop.worker:main
      etcdreplica start --style warm --degree 3 --name mailer jobs:send_mail
      etcdreplica start --detach app.py --port 8000
    """
    if detach:
        os.environ["ETCDREPLICA_DETACH"] = "1"
    options = {key: value for key, value in (("style", style), ("degree", degree), ("name", name)) if value is not None}
    try:
        if target.endswith(".py"):
            _run_script(target, arguments, options)
        else:
            _run_function(target, arguments, options)
    except RegisteredOnly as done:
        click.echo(f"{done.name} is registered; its hosts start it. See: etcdreplica status {done.name}")


def _run_script(target: str, arguments: tuple[str, ...], options: dict[str, Any]) -> None:
    if options:
        raise UsageError("--style, --degree and --name are for functions: a script says them in @protected")
    if not Path(target).is_file():
        raise UsageError(f"no script {target} here")
    sys.argv = [target, *arguments]
    sys.path.insert(0, str(Path(target).resolve().parent))
    runpy.run_path(target, run_name="__main__")


def _run_function(target: str, arguments: tuple[str, ...], options: dict[str, Any]) -> None:
    function = _load(target)
    if is_protected(function):
        if options:
            raise UsageError(f"{target} is decorated with @protected already: leave --style, --degree and --name away")
    else:
        function = protected(**options)(function)
    sys.argv = [target, *arguments]
    if isinstance(function, type):
        from etcdreplica.objects.serve import serve

        serve(function)
        return
    result = function()
    if hasattr(result, "__await__"):
        import asyncio

        asyncio.run(result)


def _load(target: str) -> Callable[..., Any]:
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute or module_name.startswith("."):
        raise UsageError(
            f"cannot tell what to start from {target!r}: write MODULE:FUNCTION, or the name of a script ending in .py"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise UsageError(f"no module {error.name!r} in {Path.cwd()} or on the Python path") from None
        raise
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"module {module_name} has no function {attribute}")
    return found  # type: ignore[no-any-return]
