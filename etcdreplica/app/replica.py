"""The handle a body gets: who it is, what it may do, and whether it should stop."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from etcdreplica.app.kernel import Slot
from etcdreplica.app.log import logger
from etcdreplica.clock import boottime
from etcdreplica.errors import UsageError
from etcdreplica.words import Role

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from etcdreplica.app.checkpoints import Checkpoints
    from etcdreplica.app.kernel import Page
    from etcdreplica.app.link import Link
    from etcdreplica.app.protocol import Message
    from etcdreplica.app.state import Codec

    RoleCallback = Callable[[Role, int], Any]


class Replica:
    """One running copy of an application, as its own body sees it. All members may be used from any thread."""

    def __init__(self, name: str, host: str, role: Role, epoch: int, link: Link | None) -> None:
        self._name = name
        self._host = host
        self._is = (role, epoch)
        self._link = link
        self._stop = threading.Event()
        self._callbacks: list[RoleCallback] = []
        self._page: Page | None = None
        self._endpoint: str | None = None
        self._codec: Codec | None = None
        self._checkpoints: Checkpoints | None = None  # None when this runs unprotected
        self._provider: Callable[[], Any] | None = None
        self._serves: str | None = None  # where a replicated object answers
        self._heard: dict[str, Message] = {}  # the last message of each kind
        self._listener: Callable[[Message], None] | None = None
        self._hearing = threading.Lock()

    @property
    def name(self) -> str:
        """The application's name."""
        return self._name

    @property
    def host(self) -> str:
        """The name of the host this copy runs on."""
        return self._host

    @property
    def role(self) -> Role:
        """`Role.PRIMARY` or `Role.BACKUP`; equal to the strings "primary" and "backup"."""
        return self._is[0]

    @property
    def epoch(self) -> int:
        """The fencing token: it grows with every new primary and is never used again.

        Store it with your own writes and refuse smaller ones (`WHERE epoch <= ?`).
        """
        return self._is[1]

    @property
    def stopping(self) -> bool:
        """True once this copy should end: it was asked to, or it hands over to another one."""
        return self._stop.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep for `timeout` seconds, or for ever, but no longer than until `stopping`, and return that."""
        return self._stop.wait(timeout)

    def on_role_change(self, callback: RoleCallback) -> RoleCallback:
        """Call `callback(role, epoch)` at each change, from a thread of its own; usable as a decorator."""
        if not callable(callback):
            raise UsageError(f"on_role_change needs something to call, not {callback!r}")
        self._callbacks.append(callback)
        return callback

    def heartbeat(self) -> None:
        """Tell that the body makes progress. Cheap enough for an inner loop: it writes a clock to memory.

        From the first call on, a body that has not called for `hang_timeout` counts as hung.
        """
        if self._page:
            self._page.beat(Slot.PROGRESS, boottime())

    def checkpoint(self, state: Any, *, wait: bool = False, timeout: float = 30.0) -> None:
        """Store a state, so that `restore` gives it back to whoever is primary next.

        A state is bytes, or whatever the application's codec takes (by default msgpack: plain values, attrs, dataclasses).
        It is turned into bytes before this returns, and may be changed afterwards. Without `wait` the rest happens in the
        background; when checkpoints are made faster than they can be stored, only the newest follows. With `wait` this
        returns once the state is durable on as many hosts as the degree says, so that it survives as long as one of them
        does. In an event loop call it by `asyncio.to_thread`. A backup (style hot) stores nothing.

        Raises:
            UsageError: the state cannot be turned into bytes.
            NotDurableError: with `wait`, not enough hosts hold it after `timeout` seconds; it may get there later.
            CheckpointError: with `wait`, it was refused: the disk is full, or another copy is primary by now.
        """
        role, epoch = self._is  # together: both may change
        if self._codec is None or role is not Role.PRIMARY:
            return
        if self._checkpoints is None:
            self._codec.encode(state)  # unprotected: nothing is kept, but what would fail fails here too
            return
        self._checkpoints.save(state, epoch, wait=wait, timeout=timeout)

    def restore(self, default: Any = None, *, timeout: float = 30.0) -> Any:
        """Return the state of the newest checkpoint, or the default if there is none.

        It is never older than one that was acknowledged by `checkpoint(wait=True)`. If the default is an object of a class
        made by attrs, dataclasses or msgspec, so is the state that is returned.

        Raises:
            CheckpointUnavailableError: a newer one may exist on hosts that cannot be reached within `timeout` seconds.
            CheckpointError: it cannot be decoded.
        """
        if self._checkpoints is None or self._codec is None:
            return default
        role, epoch = self._is
        found, state = self._checkpoints.restore(epoch if role is Role.PRIMARY else 0, timeout)
        return self._codec.like(state, default) if found else default

    def state(self, provider: Callable[[], Any]) -> Callable[[], Any]:
        """Have `provider()` called for the state every `checkpoint_interval` seconds, and when this copy hands over.

        It is called in a thread of its own, for an `async def` in its event loop. Usable as a decorator.
        """
        if not callable(provider):
            raise UsageError(f"state needs something to call, not {provider!r}")
        self._provider = provider
        return provider

    def _store_provided(self, ask: Callable[[], Any], *, wait: bool = False, timeout: float = 30.0) -> None:
        """Store what the provider gives. It counts as made when it was asked: what the body stores meanwhile is newer."""
        role, epoch = self._is
        if self._checkpoints is not None and role is Role.PRIMARY:
            number = self._checkpoints.number()
            self._checkpoints.save(ask(), epoch, wait=wait, timeout=timeout, number=number)

    def advertise(self, endpoint: str) -> None:
        """Publish where clients reach this copy, as a URL or HOST:PORT; `etcdreplica describe` shows it."""
        if not isinstance(endpoint, str) or not 0 < len(endpoint) <= 1024:
            raise UsageError(f"bad endpoint {endpoint!r}: a text of 1 to 1024 characters")
        self._endpoint = endpoint
        if self._link:
            self._link.send("advertise", endpoint=endpoint)

    def _hear(self, message: Message) -> None:
        """Pass on what the WatchDog says, to a replicated object."""
        with self._hearing:
            self._heard[message["type"]] = message
            if self._listener is not None:
                self._listener(message)

    def _listen(self, listener: Callable[[Message], None]) -> None:
        """Tell somebody the last message of each kind, and all that come."""
        with self._hearing:
            self._listener = listener
            for message in self._heard.values():
                listener(message)

    def _serve(self, address: str) -> None:
        """Publish where this copy of an object answers."""
        self._serves = address
        if self._link:
            self._link.send("serves", endpoint=address)

    def _beat_loop(self) -> None:
        """Give a sign of life of the event loop that answers for a replicated object."""
        if self._page:
            self._page.beat(Slot.LOOP, boottime())

    def _become(self, role: Role, epoch: int) -> None:
        if epoch < self.epoch:
            return  # from a WatchDog that has only begun to learn what its predecessor knew
        changed = role is not self.role
        self._is = (role, epoch)
        if changed and self._callbacks:
            threading.Thread(target=self._call_back, args=(role, epoch), name="etcdreplica role change", daemon=True).start()

    def _call_back(self, role: Role, epoch: int) -> None:
        for callback in self._callbacks:
            try:
                callback(role, epoch)
            except BaseException:
                logger().exception("a role-change callback of %s raised", self._name)

    def _ask_to_stop(self) -> None:
        self._stop.set()
