"""The two pages of reference that `generate.py` writes: the command line as click knows it, the API from its docstrings."""

from __future__ import annotations

import enum
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import click

import etcdreplica
from etcdreplica import errors, testing
from etcdreplica.cli import cli

_NOTE = "Written by `make docs` from {source}; do not edit.\n"
_CODES = """Exit codes: 0 done; 1 it could not be done, and the message says why; 2 the command line is wrong; 130 interrupted.
`etcdreplica COMMAND --help` shows the same in a terminal.
"""


def cli_page() -> str:
    """Return the page of all commands, their arguments and options."""
    with click.Context(cli, info_name="etcdreplica") as context:
        commands = list(_commands(cli, context))
    head = "# Command line\n\n" + _NOTE.format(source="the commands themselves")
    return "\n".join([head, _CODES, *commands])


def _commands(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        with click.Context(command, info_name=name, parent=context) as inner:
            if isinstance(command, click.Group):
                yield f"## {inner.command_path}\n\n{_prose(command.help or '')}\n"
                yield from _commands(command, inner)
            else:
                yield _command(command, inner)


def _command(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [_row(parameter) for parameter in command.params if isinstance(parameter, click.Option) and not parameter.hidden]
    table = ["| option | meaning | default |", "| --- | --- | --- |", *rows] if rows else []
    parts = [f"## {context.command_path}", _fenced("text", usage), _prose(command.help or ""), "\n".join(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    if option.secondary_opts:
        names += " / " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    if not option.is_flag:
        value = option.metavar or (
            " or ".join(map(str, option.type.choices)) if isinstance(option.type, click.Choice) else option.type.name.upper()
        )
        names += f" {value}"
    shown = re.search(r"\s*\[default: (.*)\]$", option.help or "")
    told = re.sub(r"\s*\[(\$\w+|default: .*)\]", "", option.help or "")
    variable = f" `${option.envvar}`" if isinstance(option.envvar, str) else ""
    default = shown[1] if shown else option.default
    is_plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    return f"| {names} | {told}{variable} | {default if is_plain else ''} |".replace("  ", " ").replace("|  |", "| |")


def _prose(text: str) -> str:
    """Turn a help text into Markdown: what click is told to leave as it is becomes a block of code."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        head, _, lines = paragraph.removeprefix("\b").strip("\n").partition("\n")
        if not paragraph.startswith("\b"):
            parts.append(paragraph)
        elif head.endswith(":"):
            parts += [head, _fenced("text", textwrap.dedent(lines))]
        else:
            parts.append(_fenced("text", f"{head}\n{lines}"))
    return "\n\n".join(parts)


def api_page() -> str:
    """Return the page of all public names."""
    parts = ["# Python API\n\n" + _NOTE.format(source="the docstrings")]
    for module, names in (
        (etcdreplica, [name for name in etcdreplica.__all__ if not name.endswith("Error")]),
        (errors, [name for name, value in vars(errors).items() if inspect.isclass(value)]),
        (testing, testing.__all__),
    ):
        parts.append(f"## {module.__name__}\n\n{_doc(module)}\n")
        parts += [_entry(module, name) for name in names]
    return "\n".join(parts)


def _entry(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    if inspect.isfunction(value):
        parts = [_fenced("python", _signature(name, value)), _doc(value)]
    elif not inspect.isclass(value):  # `replica`, the only instance of its class
        parts = [_doc(type(value)), *_members(type(value))]
    elif issubclass(value, Exception):
        parts = [f"A kind of `{value.__mro__[1].__name__}`. {_doc(value)}"]
    elif issubclass(value, enum.Enum):
        parts = [_doc(value), "\n".join(f"- `{name}.{each.name}`: `{each.value!r}`" for each in value)]
    else:
        parts = [_fenced("python", _signature(name, value)), _doc(value), *_members(value)]
    return "\n\n".join([f"### `{name}`", *parts]) + "\n"


def _members(kind: type[Any]) -> Iterator[str]:
    for name, member in vars(kind).items():
        if not name.startswith("_") and (isinstance(member, (property, classmethod)) or inspect.isfunction(member)):
            yield _fenced("python", name if isinstance(member, property) else _signature(name, getattr(kind, name)))
            yield _doc(member)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _signature(name: str, value: Any) -> str:
    text = re.sub(r"\((self|cls)(, |(?=\)))", "(", _unquoted(value))
    if inspect.isclass(value):
        text = text.removesuffix(" -> None")
    prefix = "class " if inspect.isclass(value) else "async def " if inspect.iscoroutinefunction(value) else "def "
    line = f"{prefix}{name}{text}"
    if len(line) <= 100:
        return line
    inside, close, result = text[1:].rpartition(")")
    return f"{prefix}{name}(\n" + textwrap.indent(",\n".join(_split(inside)), "    ") + f",\n{close}{result}"


def _unquoted(value: Any) -> str:
    """Return the signature as it stands in the source, where annotations are not evaluated."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(value))).replace("NOTHING", "...")


def _split(arguments: str) -> Iterator[str]:
    """Split at the commas that stand in no bracket."""
    depth, start = 0, 0
    for at, character in enumerate(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield arguments[start:at].strip()
            start = at + 1
    yield arguments[start:].strip()


def _doc(value: Any) -> str:
    """Return a docstring in Markdown: the entries of its sections as a list, what is indented as code."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(inspect.getdoc(value) or "").splitlines():
        entry = re.match(r"    (\*{0,2}[\w, ]+): (.*)", line)
        if re.fullmatch(r"(Args|Raises|Returns|Attributes):", line):
            section = line[:-1]
            lines += [f"**{section}**", ""]
        elif section and entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section:
            lines.append(line.removeprefix("      ") if line else line)
        else:
            lines.append(line)
    return re.sub(r"\b(docs)/(\w+\.md)", r"[\2](\2)", "\n".join(lines))
