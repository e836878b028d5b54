"""asyncio without waiting: many event loops, one for each simulated process, on one simulated clock.

`World` holds what is due and when. Each `SimulatedLoop` stands for one operating system process: it can be killed (nothing of
it ever runs again), stopped and continued (what came due meanwhile then runs late, as after SIGSTOP), and its clock may be
ahead of the world's and run a little faster or slower, as those of real hosts do. No thread, no selector, no real clock: what
happens depends only on what is put in, so it happens again in the same way.

An exception that a callback or a task lets out is kept in `World.errors`: nothing goes wrong unseen.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import heapq
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

LONGEST_TURN = 1_000_000  # callbacks at one instant: more is a loop that never ends


class Handle:
    """Something that is to be called. Also what asyncio calls a TimerHandle; `at` is on the world's clock."""

    __slots__ = ("args", "at", "callback", "loop")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], loop: SimulatedLoop | None, at: float) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args
        self.loop = loop
        self.at = at

    def cancel(self) -> None:
        """Do not call it."""
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        """Whether it is not to be called any more, or has been."""
        return self.callback is None

    def when(self) -> float:
        """Return when it is due, on the clock of its loop."""
        return self.at if self.loop is None else self.loop.local(self.at)


class World:
    """The one clock, and everything that is to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.errors: list[str] = []
        self.turns = 0  # callbacks so far
        self._ready: deque[Handle] = deque()
        self._due: list[tuple[float, int, Handle]] = []
        self._count = 0
        self._loops: list[SimulatedLoop] = []

    def loop(self, name: str, *, offset: float = 0.0, rate: float = 1.0) -> SimulatedLoop:
        """Start a process. `offset` and `rate` say what its clock shows."""
        made = SimulatedLoop(self, name, offset, rate)
        self._loops.append(made)
        return made

    def at(self, at: float, callback: Callable[..., Any], *args: Any) -> Handle:
        """Have something happen at a time, outside of all processes."""
        return self._push(Handle(callback, args, None, max(at, self.now)))

    def after(self, delay: float, callback: Callable[..., Any], *args: Any) -> Handle:
        """Have something happen in so many seconds, outside of all processes."""
        return self._push(Handle(callback, args, None, self.now + max(0.0, delay)))

    def run_until(self, until: float) -> None:
        """Let the world go on."""
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=None, finalizer=_close_generator)
        try:
            self._run_until(until)
        finally:
            sys.set_asyncgen_hooks(*hooks)

    def _run_until(self, until: float) -> None:
        due, ready, pop = self._due, self._ready, heapq.heappop
        while True:
            self._run_ready(ready)
            while due and due[0][2].callback is None:
                pop(due)
            if not due or due[0][0] > until:
                self.now = max(self.now, until)
                return
            self.now = at = due[0][0]
            while due and due[0][0] == at:
                handle = pop(due)[2]
                if handle.loop is None:
                    ready.append(handle)
                else:
                    handle.loop._enqueue(handle)

    def _run_ready(self, ready: deque[Handle]) -> None:
        turns = 0
        running: SimulatedLoop | None = None
        set_running = asyncio._set_running_loop
        try:
            while ready:
                handle = ready.popleft()
                callback, loop = handle.callback, handle.loop
                if callback is None:
                    continue
                if loop is not running:
                    if loop is not None and loop._state != "runs":
                        loop._enqueue(handle)
                        continue
                    set_running(loop)
                    running = loop
                elif loop is not None and loop._state != "runs":
                    loop._enqueue(handle)
                    continue
                handle.callback = None
                try:
                    callback(*handle.args)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:
                    self.errors.append(f"{loop.name if loop else 'world'}: {error!r}")
                    raise
                turns += 1
                if turns > LONGEST_TURN:
                    raise RuntimeError(f"time stands still at {self.now:.3f}: {callback}")
        finally:
            self.turns += turns
            set_running(None)

    def _push(self, handle: Handle) -> Handle:
        self._count += 1
        heapq.heappush(self._due, (handle.at, self._count, handle))
        return handle

    def unseen(self) -> list[str]:
        """Return the exceptions of tasks of which nobody took notice."""
        tasks = [task for loop in self._loops for task in loop.tasks if task.done() and not task.cancelled()]
        return [f"{task.get_name()}: {task.exception()!r}" for task in tasks if getattr(task, "_log_traceback", False)]

    def dispose(self) -> None:
        """End everything without a word; nothing of it may be used afterwards."""
        for loop in self._loops:
            loop.kill()
        for loop in self._loops:
            for task in loop.tasks:
                if task.done():
                    continue
                setattr(task, "_log_destroy_pending", False)  # noqa: B010  (asyncio has no other way)
                with suppress(BaseException):  # what it does on its way out concerns nobody
                    task.get_coro().close()
            loop.tasks.clear()
        self._loops.clear()
        self._ready.clear()
        self._due.clear()


_Loop: Any = asyncio.AbstractEventLoop  # of its many methods only those are here that the daemons need


class SimulatedLoop(_Loop):  # type: ignore[misc]
    """The event loop of one simulated process."""

    def __init__(self, world: World, name: str, offset: float, rate: float) -> None:
        self.world = world
        self.name = name
        self.tasks: list[asyncio.Task[Any]] = []  # all there ever were: none may be collected before the end
        self._offset = offset
        self._rate = rate
        self._state = "runs"
        self._backlog: list[Handle] = []

    # --- what happens to a process -----------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process at once: nothing of it runs again, no `finally` either."""
        self._state = "dead"
        self._backlog.clear()

    def stop_running(self) -> None:
        """Stop it, as SIGSTOP does."""
        if self._state == "runs":
            self._state = "stopped"

    def continue_running(self) -> None:
        """Have it go on."""
        if self._state == "stopped":
            self._state = "runs"
            backlog, self._backlog = self._backlog, []
            self.world._ready.extend(backlog)

    @property
    def is_dead(self) -> bool:
        """Whether it was killed."""
        return self._state == "dead"

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped."""
        return self._state == "stopped"

    def local(self, at: float) -> float:
        """Return what the clock of this process shows at a time of the world."""
        return self._offset + at * self._rate

    def global_(self, at: float) -> float:
        """Return at what time of the world the clock of this process shows something."""
        return (at - self._offset) / self._rate

    # --- what asyncio asks of an event loop --------------------------------------------------------------------------

    def time(self) -> float:
        """Return what the clock of this process shows."""
        return self._offset + self.world.now * self._rate

    def is_running(self) -> bool:
        """Whether the process runs."""
        return self._state == "runs"

    def is_closed(self) -> bool:
        """Whether the process has ended."""
        return self._state == "dead"

    def get_debug(self) -> bool:
        """Return False: there is nothing to see beyond what the world shows."""
        return False

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None) -> Any:
        """Call it in this turn. There is one context for all."""
        handle = Handle(callback, args, self, self.world.now)
        if self._state == "runs":
            self.world._ready.append(handle)
        elif self._state == "stopped":
            self._backlog.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        """Call it after so many seconds of this process' clock."""
        world = self.world
        return world._push(Handle(callback, args, self, world.now + max(0.0, delay) / self._rate))

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None) -> Any:
        """Call it when this process' clock shows that."""
        return self.world._push(Handle(callback, args, self, max(self.world.now, self.global_(when))))

    def create_future(self) -> asyncio.Future[Any]:
        """Return one."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        """Return one."""
        task = asyncio.Task(coro, loop=self, **options)
        self.tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what a task has let out."""
        error = context.get("exception")
        self.world.errors.append(f"{self.name}: {context.get('message')}: {error!r}")

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> NoReturn:
        """Raise: threads are not simulated."""
        raise NotImplementedError("a simulated process has no threads")

    async def shutdown_asyncgens(self) -> None:
        """Do nothing."""

    def _timer_handle_cancelled(self, handle: object) -> None:
        """Do nothing: what is cancelled is skipped."""

    def _enqueue(self, handle: Handle) -> None:
        if self._state == "runs":
            self.world._ready.append(handle)
        elif self._state == "stopped":
            self._backlog.append(handle)


def _close_generator(generator: Any) -> None:
    """Close an asynchronous generator that somebody has dropped, as asyncio does."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        loop.call_soon(loop.create_task, generator.aclose())


@contextmanager
def simulated_world() -> Iterator[World]:
    """Make a world, and take it down without the noise of tasks that never end.

    Nothing made in it may be kept: return plain data. Garbage is collected at the end, so that when finalizers run depends
    on nothing else.
    """
    world = World()
    gc.freeze()
    gc.disable()
    try:
        yield world
    finally:
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            world.dispose()
            gc.collect()
        finally:
            sys.unraisablehook = hook
            gc.enable()
            gc.unfreeze()
