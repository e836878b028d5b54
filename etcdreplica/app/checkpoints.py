"""The application's side of checkpoints: hand states to the CheckpointServer of this host, and get the newest one back.

The body is held up only while its state is turned into bytes; bytes are not even copied there. A thread of its own hands them
over, one at a time: of what is made meanwhile only the newest one follows. A lost connection is made anew, and what was not
answered is said again: the server knows by epoch and sequence what it has already.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from etcdreplica.app.link import Link
from etcdreplica.app.log import logger
from etcdreplica.app.protocol import VERSION, checkpoint_socket, default_socket
from etcdreplica.app.state import fill, open_sealed, seal
from etcdreplica.clock import boottime
from etcdreplica.errors import (
    CheckpointError,
    CheckpointUnavailableError,
    NotDurableError,
    NoWatchDogError,
    ProtocolError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from etcdreplica.app.protocol import Message
    from etcdreplica.app.state import Codec

    Stamp = tuple[int, int]

RETRY_S = 0.05
RETRIES_SOON = 40  # then only every half a second: there may be no CheckpointServer at all
READ = 64 << 20


class _Job:
    """One state on its way. `fd` is its sealed memory, once it has some."""

    def __init__(self, epoch: int, sequence: int, codec: str, data: bytes | None, wait: bool) -> None:
        self.epoch = epoch
        self.sequence = sequence
        self.codec = codec
        self.data = data
        self.wait = wait
        self.fd: int | None = None
        self.size = 0
        self.reached = 0
        self.trouble = ""
        self.refused = ""
        self.until = 0.0  # when nobody waits any more
        self.over = threading.Event()

    def load(self) -> None:
        """Put the state into memory that can be handed over. Raises CheckpointError."""
        if self.fd is None and self.data is not None:
            fd = None
            try:
                fd = open_sealed()
                fill(fd, self.data)
                seal(fd)
            except OSError as error:
                if fd is not None:
                    os.close(fd)
                raise CheckpointError(f"no memory to hand a state over: {error.strerror}") from None
            self.size, self.data = os.fstat(fd).st_size, None
            self.fd = fd

    def end(self, refused: str = "") -> None:
        """Nothing more will come of it."""
        self.refused = refused
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.over.set()


class _Question:
    """One `restore` that waits for its answer."""

    def __init__(self, epoch: int, within_s: float) -> None:
        self.epoch = epoch
        self.until = boottime() + within_s
        self.answer: Message = {}
        self.over = threading.Event()


class Checkpoints:
    """Those of one application in this process. `copies`: on how many hosts each is to be. All calls from any thread."""

    def __init__(self, name: str, codec: Codec, copies: int) -> None:
        self._name = name
        self._codec = codec
        self._copies = copies
        self._path = checkpoint_socket(default_socket())
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._restoring = threading.Lock()
        self._sequence = 0
        self._jobs: dict[int, _Job] = {}  # said, and not answered yet
        self._pending: _Job | None = None  # the newest one that nobody waits for
        self._question: _Question | None = None
        self._on_checkpoint: Callable[[Any], Any] | None = None
        self._following = False
        self._loaded: tuple[Stamp, Any] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def number(self) -> int:
        """Return that of the next checkpoint, taken before a state is looked at so that an older one never passes for newer."""
        with self._lock:
            self._sequence += 1
            return self._sequence

    def want(self, copies: int) -> None:
        """Have each on so many hosts from now on, also those that somebody waits for."""
        with self._lock:
            if copies != self._copies:
                self._copies = copies
                for sequence in sorted(self._jobs):
                    self._say(self._jobs[sequence])

    def save(self, state: Any, epoch: int, *, wait: bool, timeout: float, number: int | None = None) -> None:
        """Store a state. Raises UsageError when it cannot be turned into bytes, and with `wait` CheckpointError."""
        sequence = self.number() if number is None else number
        codec, data = self._codec.encode(state)
        job = _Job(epoch, sequence, codec, data, wait)
        with self._lock:
            self._following = False  # whoever stores is primary: what comes to this host from now on is its own
            if not wait:
                self._put_off(job)
        self._start()
        if not wait:
            self._nudge()
            return
        until = job.until = boottime() + timeout
        job.load()
        with self._lock:
            if self._pending is not None and self._pending.sequence < job.sequence:
                self._pending.end()
                self._pending = None
            self._jobs[job.sequence] = job
            self._say(job)
        job.over.wait(max(0.0, until - boottime()))
        with self._lock:
            self._jobs.pop(job.sequence, None)
        done, refused = job.over.is_set(), job.refused
        job.end(refused)
        if refused:
            raise CheckpointError(f"{self._name}: the checkpoint was refused: {refused}")
        if not done:
            why = job.trouble or ("" if self._link else "the CheckpointServer of this host does not answer")
            raise NotDurableError(
                f"{self._name}: the checkpoint is on {job.reached} of {self._copies} hosts after {timeout:g} s"
                + (f" ({why})" if why else ""),
                job.reached,
                self._copies,
            )

    def _put_off(self, job: _Job) -> None:
        """Have the thread store a state, unless a newer one is on its way already."""
        others = [*self._jobs.values(), *([self._pending] if self._pending is not None else [])]
        if any(other.sequence > job.sequence for other in others):
            job.end()
            return
        if self._pending is not None:
            self._pending.end()  # nobody may go on waiting for it in `flush`
        self._pending = job

    def restore(self, epoch: int, timeout: float) -> tuple[bool, Any]:
        """Return whether there is a checkpoint, and the newest one's state. `epoch` 0: for a copy that only reads.

        Raises CheckpointUnavailableError, CheckpointError.
        """
        self._start()
        until = boottime() + timeout
        with self._restoring:  # one question at a time
            return self._restore(epoch, timeout, until)

    def _restore(self, epoch: int, timeout: float, until: float) -> tuple[bool, Any]:
        while True:
            question = _Question(epoch, max(0.0, until - boottime()))
            with self._lock:
                self._following = False
                self._question = question
                self._ask(question)
            question.over.wait(max(0.0, until - boottime()) + 1.0)  # rather the server's answer, which says why
            with self._lock:
                self._question = None
            answer = question.answer
            if not answer:
                raise CheckpointUnavailableError(
                    f"{self._name}: no answer of the CheckpointServer within {timeout:g} s: does 'etcdreplica node' run here?"
                )
            if answer["type"] == "unavailable":
                raise CheckpointUnavailableError(str(answer["reason"]))
            if answer["path"] is None:
                return False, None
            try:
                return True, self._state_of(answer)
            except FileNotFoundError:  # a newer one has come meanwhile
                if boottime() >= until:
                    raise CheckpointUnavailableError(f"{self._name}: {answer['path']} is not there for this process") from None

    def follow(self, on_checkpoint: Callable[[Any], Any] | None) -> None:
        """Hold each checkpoint that comes to this host, ready for `restore`, and tell of it."""
        self._on_checkpoint = on_checkpoint
        self._following = True
        self._start()

    def close(self) -> None:
        """Hang up."""
        self._closed.set()
        self._nudge()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            left, self._jobs = list(self._jobs.values()), {}
        for job in left:
            job.end("this copy ends")

    def flush(self, timeout: float) -> None:
        """Wait until what nobody waits for is on this host at least."""
        until = boottime() + timeout
        while boottime() < until:
            with self._lock:
                jobs = [*self._jobs.values(), *([self._pending] if self._pending else [])]
            if not jobs:
                return
            jobs[0].over.wait(until - boottime())

    def _state_of(self, told: Message) -> Any:
        """Return the state that a message tells of. Raises FileNotFoundError, CheckpointError."""
        stamp = (int(told["epoch"]), int(told["sequence"]))
        with self._lock:
            self._sequence = max(self._sequence, stamp[1])
            loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded[0] == stamp:
            return loaded[1]
        try:
            fd = os.open(told["path"], os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = _read(fd, int(told["begin"]), int(told["size"]))
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self._name}: {told['path']} cannot be read: {error.strerror}") from None
        return self._codec.decode(str(told["codec"]), data)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="etcdreplica checkpoints", daemon=True)
                self._thread.start()

    def _nudge(self) -> None:
        with self._lock:
            if self._link is not None:
                self._link.wake()

    def _run(self) -> None:
        tries = 0
        while not self._closed.is_set():
            try:
                link = Link(self._path)
            except NoWatchDogError:
                tries += 1
                self._closed.wait(RETRY_S if tries < RETRIES_SOON else 10 * RETRY_S)
                continue
            tries = 0
            try:
                self._serve(link)
            except (NoWatchDogError, ProtocolError, OSError) as error:
                logger().debug("%s: the CheckpointServer went away: %s", self._name, error)
                self._closed.wait(RETRY_S)
            finally:
                with self._lock:
                    self._link = None
                link.close()

    def _serve(self, link: Link) -> None:
        link.send("hello", version=VERSION, app=self._name)
        with self._lock:
            self._link = link
            if self._following:
                link.send("follow")
            for sequence in sorted(self._jobs):
                self._say(self._jobs[sequence])
            if self._question is not None:
                self._ask(self._question)
        while not self._closed.is_set():
            self._send_pending()
            message = link.receive()
            if message is not None:
                self._take(message)

    def _send_pending(self) -> None:
        with self._lock:
            job = self._pending
            if job is None or any(not job.wait for job in self._jobs.values()):
                return
            self._pending = None
            self._jobs[job.sequence] = job
        try:
            job.load()
        except CheckpointError as error:
            logger().error("%s: %s", self._name, error)
            with self._lock:
                del self._jobs[job.sequence]
            job.end(str(error))
            return
        with self._lock:
            self._say(job)

    def _say(self, job: _Job) -> None:
        if self._link is not None and job.fd is not None:
            fields = {"epoch": job.epoch, "sequence": job.sequence, "codec": job.codec, "size": job.size, "fd": job.fd}
            within_s = max(0.0, job.until - boottime())
            self._link.send("store", **fields, copies=self._copies, wait=job.wait, within=within_s)

    def _ask(self, question: _Question) -> None:
        if self._link is not None:
            loaded = self._loaded[0] if self._loaded is not None else (0, 0)
            within_s = max(0.0, question.until - boottime())
            self._link.send("restore", epoch=question.epoch, loaded=loaded, within=within_s, question=id(question))

    def _take(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("found", "unavailable"):
            with self._lock:
                if self._question is not None and message["question"] == id(self._question):  # not one given up before
                    self._question.answer = message
                    self._question.over.set()
        elif kind == "newest":
            self._load(message)
        elif kind in ("kept", "reached", "refused"):
            self._answered(kind, message)
        elif kind == "error":
            raise ProtocolError(str(message.get("message")))

    def _answered(self, kind: str, message: Message) -> None:
        with self._lock:
            job = self._jobs.get(int(message["sequence"]))
            if job is None:
                return
            if kind == "reached":
                job.reached, job.trouble = int(message["hosts"]), str(message["trouble"])
            over = kind == "refused" or (message["done"] if kind == "reached" else not job.wait)
            if over:
                del self._jobs[job.sequence]
                job.end(str(message["reason"]) if kind == "refused" else "")
        if kind == "refused" and not job.wait:
            logger().error("%s: checkpoint %d was refused: %s", self._name, job.sequence, message["reason"])

    def _load(self, message: Message) -> None:
        """Hold a state that has come to this host, before it is needed."""
        if not self._wants_states():
            return
        try:
            state = self._state_of(message)
        except FileNotFoundError:
            return  # a newer one is on its way
        except CheckpointError as error:
            logger().error("%s: %s", self._name, error)
            return
        with self._lock:
            if self._wants_states():
                self._loaded = ((int(message["epoch"]), int(message["sequence"])), state)
        if self._on_checkpoint is not None:
            try:
                self._on_checkpoint(state)
            except BaseException:
                logger().exception("on_checkpoint of %s raised", self._name)

    def _wants_states(self) -> bool:
        """Whether what comes to this host should be held: until `restore` has its answer."""
        return self._following or self._question is not None


def _read(fd: int, at: int, size: int) -> bytes:
    """Read a part of a file. The interpreter's lock is free meanwhile."""
    data = os.pread(fd, size, at)
    if len(data) == size:
        return data
    pieces = [data]  # the kernel reads at most 2 GiB at once
    done = len(data)
    while done < size and (data := os.pread(fd, min(READ, size - done), at + done)):
        pieces.append(data)
        done += len(data)
    if done < size:
        raise CheckpointError("the checkpoint was cut off while it was read")
    return b"".join(pieces)
