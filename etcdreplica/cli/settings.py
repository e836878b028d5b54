"""Every setting, once: the flags, the environment variables, the keys of the file and the table in the docs come from here.

A setting has one name: the flag is --name, the variable ETCDREPLICA_NAME, the key in the file name. A flag wins over the
environment, the environment over the file. `reload`: what a running node takes when it is sent SIGHUP. The others name the
host, or what its leases and deadlines were made with, and stay until the node is started anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from attrs import frozen

from etcdreplica.core.timing import PRESETS

F = TypeVar("F", bound=Callable[..., Any])


@frozen
class Setting:
    """One setting. `type`: of its value; dict for KEY=VALUE pairs. `shown`: the default, if it is found out at run time."""

    name: str
    help: str
    type: type = str
    default: Any = None
    shown: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    listed: bool = False  # the file may have a list of texts
    reload: bool = False
    parameter: str = ""  # of commands, if it is not the name
    short: str = ""

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"ETCDREPLICA_{self.name.upper().replace('-', '_')}"

    @property
    def key(self) -> str:
        """The parameter of commands."""
        return self.parameter or self.name.replace("-", "_")

    @property
    def click_type(self) -> Any:
        """What click makes of a text."""
        if self.choices:
            return click.Choice(self.choices)
        return (
            click.Path(path_type=Path) if self.type is Path else click.types.convert_type(str if self.is_pairs else self.type)
        )

    @property
    def is_file(self) -> bool:
        """Whether it names a file that is read."""
        return self.metavar == "FILE"

    @property
    def is_path(self) -> bool:
        """Whether it names a file or a directory."""
        return self.type is Path or self.is_file

    @property
    def is_pairs(self) -> bool:
        """Whether it is given as KEY=VALUE, again and again."""
        return self.type is dict

    @property
    def default_text(self) -> str:
        """The default as people read it."""
        if self.shown or self.default is None:
            return self.shown or "none"
        return (
            str(self.default).lower() if self.type is bool else f"{self.default:g}" if self.type is float else str(self.default)
        )

    def option(self, function: F) -> F:
        """Add it to a command."""
        flags = {"is_flag": True} if self.type is bool else {"type": self.click_type, "metavar": self.metavar}
        shows = self.type is not bool and (bool(self.shown) or self.default is not None)
        decorate = click.option(
            *((f"-{self.short}",) if self.short else ()),
            f"--{self.name}",
            self.key,
            envvar=self.variable,
            show_envvar=True,
            default=self.default,
            show_default=(self.shown or True) if shows else False,
            multiple=self.is_pairs,
            help=self.help,
            **flags,
        )
        return decorate(function)


CONNECTION = (
    Setting(
        "etcd",
        "Endpoints of etcd.",
        default="127.0.0.1:2379",
        metavar="HOST:PORT,...",
        listed=True,
        reload=True,
    ),
    Setting("cluster", "Name of the cluster; several may share one etcd.", default="default"),
    Setting("etcd-ca", "CA of etcd's certificate; turns TLS on.", metavar="FILE", reload=True),
    Setting("etcd-cert", "Client certificate.", metavar="FILE", reload=True),
    Setting("etcd-key", "Its key.", metavar="FILE", reload=True),
    Setting("etcd-user", "User of etcd; the password comes from $ETCDREPLICA_ETCD_PASSWORD.", reload=True),
)
TIMING = (
    Setting(
        "timing",
        "How soon a host that is cut off counts as lost: after 5 s, 2 s (quiet network and disks) or 15 s (crowded hosts).",
        default="safe",
        choices=tuple(PRESETS),
    ),
    Setting("lease-ttl", "That time in seconds.", float, shown="as timing says", parameter="lease_ttl_s", metavar="SECONDS"),
)
HOST_NAME = Setting("host", "Name of this host.", shown="its host name")
STATE_DIR = Setting(
    "state-dir", "Where state and logs go.", Path, shown="/var/lib/etcdreplica, or ~/.local/state/etcdreplica", metavar="PATH"
)
CHECKPOINTS = (
    Setting(
        "checkpoint-listen",
        "Where its CheckpointServer answers those of other hosts; port 0 takes any.",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
    ),
    Setting("checkpoint-keep", "How many checkpoints of each application stay on its disk.", int, default=3, reload=True),
    Setting(
        "checkpoint-bandwidth",
        "At most so many MiB of checkpoints are sent in a second; 0 is no limit.",
        float,
        default=0.0,
        metavar="MIB_S",
        reload=True,
        parameter="checkpoint_mib_s",
    ),
)
HOST = (
    HOST_NAME,
    Setting("address", "Where other hosts reach it.", shown="its host name", reload=True),
    STATE_DIR,
    Setting(
        "socket",
        "Where applications reach the WatchDog.",
        Path,
        shown="in /run/etcdreplica, or in $XDG_RUNTIME_DIR",
        metavar="PATH",
        parameter="socket_path",
    ),
    Setting("label", "A label of this host; may be repeated.", dict, metavar="KEY=VALUE", reload=True, parameter="labels"),
    Setting("capacity", "How many replicas it may hold.", int, default=100, reload=True),
    Setting(
        "peer-listen",
        'Where it answers other hosts\' probes (failover="fast"); port 0 takes any.',
        default="127.0.0.1:0",
        metavar="HOST:PORT",
    ),
    *CHECKPOINTS,
    Setting("insecure", "Let other hosts reach it at these without TLS.", bool, default=False),
)
PEER_TLS = (
    Setting("peer-ca", "CA of all hosts; turns TLS between them on.", metavar="FILE", reload=True),
    Setting("peer-cert", "Certificate of this host.", metavar="FILE", reload=True),
    Setting("peer-key", "Its key.", metavar="FILE", reload=True),
)
NODE = (
    Setting("no-manager", "This host is never ReplicaManager.", bool, default=False),
    Setting("no-checkpoints", "This host holds no checkpoints, and so no application that makes some.", bool, default=False),
)
VERBOSE = Setting("verbose", "Log more.", bool, default=False, reload=True, short="v")
SETTINGS = (*CONNECTION, *HOST, *PEER_TLS, *TIMING, *NODE, VERBOSE)


def add(*settings: Setting) -> Callable[[F], F]:
    """Add settings to a command, in this order."""

    def decorate(function: F) -> F:
        for setting in reversed(settings):
            function = setting.option(function)
        return function

    return decorate


def docs_table() -> str:
    """Return all of them as a Markdown table, for docs/configuration.md."""
    lines = ["| name | meaning | value | default | SIGHUP |", "| --- | --- | --- | --- | --- |"]
    for setting in SETTINGS:
        kind = _TYPES[Path if setting.is_path else setting.type]
        value = " or ".join(setting.choices) or kind + (", or a list" if setting.listed else "")
        default, taken = setting.default_text.replace("|", "\\|"), "taken" if setting.reload else "stays"
        lines.append(f"| `{setting.name}` | {setting.help} | {value} | {default} | {taken} |")
    return "\n".join(lines) + "\n"


_TYPES: dict[type, str] = {
    str: "text",
    Path: "path",
    int: "whole number",
    float: "number",
    bool: "true or false",
    dict: "table of texts",
}
