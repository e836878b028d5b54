"""One gRPC channel to etcd that survives the loss of an endpoint, with TLS and a password if asked.

gRPC's own balancing does not mix host names, TLS names and several endpoints well, so the channel talks to one endpoint
at a time and moves on when a call fails there: to the first of all that answers, if it can tell which is the right etcd, else
to the next. A write is never repeated by itself: when its answer is lost it may have happened, and only the caller can tell
whether to read or to repeat.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
from aetcd.rpc import rpc_pb2 as rpc
from aetcd.rpc import rpc_pb2_grpc as stubs
from attrs import field, frozen

from etcdreplica.errors import ConfigurationError, EtcdReplacedError, StoreDeniedError, StoreError, StoreUnavailableError
from etcdreplica.store.origin import Answer, OriginCheck

log = logging.getLogger(__name__)

Connect = Callable[[str], grpc.aio.Channel]

HEAD_START = 0.2  # of a timeout: so much later the next endpoint is asked as well
AGAIN_S = 0.05  # one that could not answer is asked again after that

_UNAVAILABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_DENIED = ("authentication", "user name is empty", "permission denied", "invalid auth token")
_EXPIRED = ("invalid auth token", "revision of auth store is old", "revision in header is old")
# Pings keep a silent stream honest: a dead peer is noticed after at most their sum. etcd refuses pings closer than 5 s, and
# those of a connection without streams: it hangs up on whoever sends them, and with it on every stream of that connection.
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),  # its pings count as well
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


@frozen
class EtcdOptions:
    """How to reach etcd. Endpoints are `host:port`; the files are PEM paths; no file means no TLS."""

    endpoints: tuple[str, ...] = field(default=("127.0.0.1:2379",))
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout_s: float = 1.0  # of one attempt of one call

    def __attrs_post_init__(self) -> None:
        if not self.endpoints:
            raise ConfigurationError("no etcd endpoint given: name at least one HOST:PORT")
        for endpoint in self.endpoints:
            host, _, port = endpoint.rpartition(":")
            if not host or not port.isdigit() or "/" in endpoint:
                raise ConfigurationError(f"bad etcd endpoint {endpoint!r}: write it HOST:PORT, without http://")
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigurationError("a TLS client certificate needs both the certificate file and the key file")
        if bool(self.user) != bool(self.password):
            raise ConfigurationError("an etcd user needs a password, and a password a user")


@frozen(eq=False)
class _Connection:
    """An endpoint and the way there. Its methods are kept, for making one costs as much as a call."""

    endpoint: str
    channel: grpc.aio.Channel
    _methods: dict[str, Callable[..., Any]] = field(factory=dict, init=False)

    def method(self, name: str) -> Callable[..., Any]:
        """Return one, as `KV.Range`."""
        if name not in self._methods:
            service, method = name.split(".")
            self._methods[name] = getattr(getattr(stubs, f"{service}Stub")(self.channel), method)
        return self._methods[name]


class EtcdChannel:
    """Calls to whichever endpoint answers. Make one in the loop that uses it, and close it there.

    `connect` opens a connection to an endpoint in another way than over the network; `check` sees that it is the etcd of
    before.
    """

    def __init__(self, options: EtcdOptions, connect: Connect | None = None, check: OriginCheck | None = None) -> None:
        self.options = options
        self._check = check
        self._connect = connect or self._dial
        self._credentials = _credentials(options)
        self._index = 0
        self._open: _Connection | None = None
        self._retired: list[_Connection] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._token: str | None = None
        self._authenticating = asyncio.Lock()

    @property
    def endpoint(self) -> str:
        """The endpoint in use."""
        return self.options.endpoints[self._index]

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        connections, self._retired = [*self._retired, *([self._open] if self._open else [])], []
        self._open = None
        for connection in connections:
            await connection.channel.close()

    async def call(self, name: str, request: Any, *, repeat: bool = False, timeout_s: float | None = None) -> Any:
        """Make one unary call, as `KV.Range`. `repeat` tries every endpoint once; only reads may ask for it.

        Raises StoreUnavailableError when no answer came, StoreDeniedError, or StoreError with etcd's words.
        """
        attempts = len(self.options.endpoints) + 1 if repeat else 1
        for attempt in range(attempts):
            try:
                return await self._attempt(name, request, timeout_s or self.options.timeout_s)
            except StoreUnavailableError:
                if attempt == attempts - 1:
                    raise
        raise AssertionError("unreachable")

    async def _attempt(self, name: str, request: Any, timeout_s: float) -> Any:
        refused_token = None
        while True:
            metadata = await self._metadata(refused_token)
            used = await self._trusted(metadata)
            try:
                at_least = self._check.expected(name) if self._check is not None else 0
                answer = await used.method(name)(request, timeout=timeout_s, metadata=metadata)
                if self._check is not None:
                    self._check.see(answer, at_least)
                return answer
            except grpc.aio.AioRpcError as error:
                if refused_token is not None or not metadata or not _token_expired(error):
                    self._fail(used, error)
                refused_token = metadata[0][1]
            except asyncio.CancelledError:
                raise _given_up(used) from None

    async def stream(
        self, name: str, requests: AsyncIterator[Any], silence_s: float | None = None
    ) -> AsyncGenerator[Any, None]:
        """Open a bidirectional stream, as `Watch.Watch`, and yield its answers until it ends or fails.

        No answer for `silence_s` seconds is a failure too, as is a StoreUnavailableError that `requests` raises: a
        stopped peer keeps its connections open.
        """
        metadata = (*(await self._metadata()), ("hasleader", "true"))
        used = await self._trusted(metadata)
        call = used.method(name)(metadata=metadata)
        writing = asyncio.create_task(_write(call, requests))
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    return
                if self._check is not None:
                    self._check.see(answer)
                yield answer
        except (TimeoutError, asyncio.CancelledError):
            error = _given_up(used)
            if isinstance(error, StoreUnavailableError):  # and not this task being cancelled: the endpoint is fine then
                self._rotate(used)
            raise error from None
        except grpc.aio.AioRpcError as error:
            if isinstance(cancelled := _given_up(used), asyncio.CancelledError):
                raise cancelled from None  # gRPC may have swallowed it: a call that fails at that very moment only fails
            if _token_expired(error):
                self._token = None
                raise StoreUnavailableError(f"etcd at {used.endpoint} wants a new token") from None
            self._fail(used, error)
        finally:
            if self._check is not None:
                self._check.doubt()  # why it ended may be that another etcd is there now
            writing.cancel()
            await asyncio.wait((writing,))
            call.cancel()

    async def _trusted(self, metadata: Any) -> _Connection:
        """Return the connection in use, known to lead to the etcd of before. Raises StoreError."""
        if self._check is None or self._check.is_sure:
            return self._connection()
        async with self._check.asking:
            if not self._check.is_sure:  # nobody else has asked meanwhile
                await self._search(self._check, metadata)
            return self._connection()

    async def _search(self, check: OriginCheck, metadata: Any) -> None:
        """Use the first endpoint that answers, and as the etcd of before. Raises StoreError when none does.

        One after the other would take too long for a lease that has waited for a renewal already: a leader that falls silent
        takes a whole timeout, and so does each other member that is asked before these have elected a new one.
        """
        first = found = self._connection()
        connections = {first.endpoint: first}
        turn = deque(self.options.endpoints)
        turn.rotate(-self._index)
        asking: dict[asyncio.Task[Answer | StoreError], str] = {}
        failed: dict[str, StoreError] = {}
        try:
            while not check.is_sure:
                if turn:
                    endpoint = turn.popleft()
                    asked = connections.get(endpoint) or connections.setdefault(endpoint, self._to(endpoint))
                    pause_s = AGAIN_S if endpoint in failed else 0.0
                    asking[asyncio.create_task(self._ask(check, asked, metadata, pause_s))] = endpoint
                patience_s = HEAD_START * self.options.timeout_s if turn else None
                done, _ = await asyncio.wait(asking, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    endpoint = asking.pop(task)
                    if (error := _refused(check, task.result())) is None:
                        found = connections[endpoint]
                        break
                    failed[endpoint] = error
                    turn.append(endpoint)
                    if len(failed) == len(set(self.options.endpoints)) or not isinstance(error, StoreUnavailableError):
                        raise error
        finally:
            for task in asking:
                task.cancel()
            for each in connections.values():
                if each is not first and each is not found:
                    self._close_later(each)
        if found is not first:
            self._retire(first)
            self._open, self._index = found, self.options.endpoints.index(found.endpoint)
            log.warning("etcd endpoint %s is used now", self.endpoint)

    async def _ask(self, check: OriginCheck, asked: _Connection, metadata: Any, pause_s: float) -> Answer | StoreError:
        await asyncio.sleep(pause_s)
        try:
            return await check.ask(asked.method, self.options.timeout_s, metadata)
        except grpc.aio.AioRpcError as error:
            if _token_expired(error):
                self._token = None
                return StoreUnavailableError(f"etcd at {asked.endpoint} wants a new token")
            return _reason(asked, error)
        except asyncio.CancelledError:
            if isinstance(reason := _given_up(asked), StoreUnavailableError):
                return reason
            raise

    def forget_token(self) -> None:
        """Authenticate again before the next call."""
        self._token = None

    def _connection(self) -> _Connection:
        if self._open is None:
            self._open = self._to(self.endpoint)
        return self._open

    def _to(self, endpoint: str) -> _Connection:
        return _Connection(endpoint, self._connect(endpoint))

    def _dial(self, target: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(target, options=_OPTIONS)
        return grpc.aio.secure_channel(target, self._credentials, options=_OPTIONS)

    def _rotate(self, used: _Connection) -> None:
        if used is not self._open:
            return  # another call has already moved on
        if self._check is not None:
            self._check.doubt()
            if self._check.asking.locked():
                return  # a search is under way
        if len(self.options.endpoints) == 1:
            return  # gRPC reconnects by itself
        self._index = (self._index + 1) % len(self.options.endpoints)
        self._open = None
        self._retire(used)
        log.warning("etcd endpoint lost, trying %s", self.endpoint)

    def _retire(self, connection: _Connection) -> None:
        """Let what is under way there go on for a while."""
        self._retired.append(connection)
        if len(self._retired) > len(self.options.endpoints):
            self._close_later(self._retired.pop(0))

    def _close_later(self, connection: _Connection) -> None:
        closing = asyncio.get_running_loop().create_task(connection.channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _fail(self, used: _Connection, error: grpc.aio.AioRpcError) -> NoReturn:
        if self._check is not None and used is self._open:
            self._check.doubt()
        reason = _reason(used, error)
        if isinstance(reason, StoreUnavailableError):
            self._rotate(used)
        raise reason from None

    async def _metadata(self, refused_token: str | None = None) -> tuple[tuple[str, str], ...]:
        if not self.options.user:
            return ()
        async with self._authenticating:
            if self._token is None or self._token == refused_token:
                self._token = None
                request = rpc.AuthenticateRequest(name=self.options.user, password=self.options.password)
                used = self._connection()
                try:
                    answer = await used.method("Auth.Authenticate")(request, timeout=self.options.timeout_s)
                except grpc.aio.AioRpcError as error:
                    self._fail(used, error)
                self._token = answer.token
            return (("token", self._token or ""),)


def _reason(used: _Connection, error: grpc.aio.AioRpcError) -> StoreError:
    code, text = error.code(), error.details() or ""
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED) or any(t in text for t in _DENIED):
        return StoreDeniedError(f"etcd at {used.endpoint} refuses: {text}")
    if code in _UNAVAILABLE:
        return StoreUnavailableError(f"etcd at {used.endpoint} does not answer ({code.name.lower()}: {text})")
    return StoreError(f"etcd at {used.endpoint} answered {code.name.lower()}: {text}")


def _refused(check: OriginCheck, answer: Answer | StoreError) -> StoreError | None:
    if isinstance(answer, StoreError):
        return answer
    try:
        check.believe(answer)
    except EtcdReplacedError as error:
        return error
    return None


async def _write(call: Any, requests: AsyncIterator[Any]) -> None:
    try:
        async for request in requests:
            await call.write(request)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # the reading side sees it too
    except StoreUnavailableError:
        call.cancel()


def _given_up(used: _Connection) -> BaseException:
    """Tell a call that gRPC cancelled, because its channel was closed or fell silent, from this task being cancelled."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return asyncio.CancelledError()
    return StoreUnavailableError(f"etcd at {used.endpoint} is silent, or the connection to it was given up")


def _token_expired(error: grpc.aio.AioRpcError) -> bool:
    return any(text in (error.details() or "") for text in _EXPIRED)


def _credentials(options: EtcdOptions) -> grpc.ChannelCredentials | None:
    if not (options.ca_file or options.cert_file):
        return None

    def read(path: str | None) -> bytes | None:
        try:
            return Path(path).read_bytes() if path else None
        except OSError as error:
            raise ConfigurationError(f"cannot read the TLS file {path}: {error.strerror}") from None

    return grpc.ssl_channel_credentials(read(options.ca_file), read(options.key_file), read(options.cert_file))
