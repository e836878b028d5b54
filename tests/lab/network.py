"""Hosts as network namespaces on one bridge; needs root.

A cut in one direction is a false neighbour: the sender's table has a hardware address for the receiver that nobody has. So
packets vanish without a sign, in one direction, and on connections that exist already, with nothing but the program `ip`.
Lost packets need nftables.
"""

from __future__ import annotations

import shutil
import subprocess
import zlib
from collections.abc import Iterable, Sequence

from attrs import define, field

FIRST = 10  # of the addresses of the hosts
NOBODY = "02:00:00:00:00:01"
DROP = "numgen random mod 100 < {percent} drop"


@define
class Network:
    """One bridge, with an address of this machine on it, and one namespace for each host. `tag` is unique on this machine."""

    tag: str
    hosts: Sequence[str]
    _number: int = field(default=0, init=False)
    _cuts: set[tuple[str, str]] = field(factory=set, init=False)

    @property
    def address(self) -> str:
        """The address at which the hosts reach this machine."""
        return f"10.213.{self._number}.1"

    def address_of(self, host: str) -> str:
        """The address of a host."""
        return f"10.213.{self._number}.{FIRST + self.hosts.index(host)}"

    def namespace(self, host: str) -> str:
        """The namespace of a host."""
        return f"er{self.tag}-{host}"

    def prefix(self, host: str) -> tuple[str, ...]:
        """What a command is started with to run on a host. It shares the mounts of this machine."""
        return ("nsenter", f"--net=/run/netns/{self.namespace(host)}")

    def make(self) -> None:
        """Make the bridge and the namespaces."""
        self._number = _free_subnet(zlib.crc32(self.tag.encode()) % 250)
        _ip("link", "add", f"er{self.tag}", "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", f"er{self.tag}")
        _ip("link", "set", f"er{self.tag}", "up")
        for host in self.hosts:
            name, inner = self.namespace(host), self._end(host)
            _ip("netns", "add", name)
            _ip("link", "add", self._cable(host), "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", name)
            _ip("link", "set", self._cable(host), "master", f"er{self.tag}", "up")
            _ip("-n", name, "addr", "add", f"{self.address_of(host)}/24", "dev", inner)
            _ip("-n", name, "link", "set", inner, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove all of it, as far as it was made."""
        for host in self.hosts:
            _ip("netns", "del", self.namespace(host), check=False)
            _ip("link", "del", self._cable(host), check=False)
        _ip("link", "del", f"er{self.tag}", check=False)

    def cut(self, host: str) -> None:
        """Take the host's cable out."""
        _ip("link", "set", self._cable(host), "down")

    def mend(self, host: str) -> None:
        """Put it in again."""
        _ip("link", "set", self._cable(host), "up")

    def block(self, senders: Iterable[str], receivers: Iterable[str]) -> None:
        """Lose what these send to those."""
        receivers = list(receivers)
        for sender in senders:
            for receiver in receivers:
                if sender != receiver:
                    self._neighbour("replace", sender, receiver, "lladdr", NOBODY, "nud", "permanent")
                    self._cuts.add((sender, receiver))

    def split(self, one: Iterable[str], other: Iterable[str]) -> None:
        """Lose what two groups send to each other."""
        one, other = list(one), list(other)
        self.block(one, other)
        self.block(other, one)

    def unblock(self) -> None:
        """End all `block` and `split`."""
        while self._cuts:
            self._neighbour("del", *self._cuts.pop())

    def lose(self, host: str, percent: int) -> None:
        """Lose a share of all packets that reach a host, and of those that it sends."""
        rule = DROP.format(percent=percent)
        hooks = "".join(
            f"chain {hook} {{ type filter hook {hook} priority 0; {device} {rule}; }}; "
            for hook, device in (("input", 'iifname != "lo"'), ("postrouting", 'oifname != "lo"'))
        )
        _run([*self.prefix(host), "nft", f"table ip loss {{ {hooks} }}"])

    def lose_nothing(self, host: str) -> None:
        """End `lose`."""
        _run([*self.prefix(host), "nft", "delete table ip loss"], check=False)

    def _neighbour(self, what: str, sender: str, receiver: str, *more: str) -> None:
        where = ("-n", self.namespace(sender), "neigh", what, self.address_of(receiver), "dev", self._end(sender))
        _ip(*where, *more, check=what != "del")

    def _cable(self, host: str) -> str:
        return f"er{self.tag}o{self.hosts.index(host)}"

    def _end(self, host: str) -> str:
        return f"er{self.tag}i{self.hosts.index(host)}"


def can_lose_packets() -> bool:
    """Whether `lose` works here."""
    return shutil.which("nft") is not None


def _free_subnet(wished: int) -> int:
    """Return the number of a subnet that no other lab uses."""
    taken = subprocess.run(["ip", "-o", "-4", "addr"], check=True, capture_output=True, text=True, timeout=30).stdout
    return next(n for i in range(250) if f" 10.213.{(n := (wished + i) % 250 + 1)}." not in taken)


def _ip(*arguments: str, check: bool = True) -> None:
    _run(["ip", *arguments], check=check)


def _run(command: list[str], *, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=True, timeout=30)
