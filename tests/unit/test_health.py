"""The thread that calls a `health` function: what counts as bad, what is told, and that nothing ends it."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator

import pytest
from attrs import asdict

from etcdreplica.app.health import REASON_LENGTH, HealthCheck
from etcdreplica.model import Probe

PATIENCE_S = 60.0
Reports = queue.SimpleQueue[tuple[int, str]]


class Script:
    """A health function that does one thing after another, and signals when all are done."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self._acts = iter(acts)
        self.played = threading.Event()

    def __call__(self) -> object:
        """Do the next thing."""
        act = next(self._acts, None)
        if act is None:
            self.played.set()
            return True
        return act()


class UnspeakableError(Exception):
    """An error that cannot even be put in words."""

    def __str__(self) -> str:
        raise ValueError


def raising(error: BaseException) -> Callable[[], object]:
    """Return a function that raises it."""

    def act() -> object:
        raise error

    return act


def good() -> object:
    """Be well."""
    return None


def bad() -> object:
    """Be unwell."""
    return False


@contextlib.contextmanager
def checking(
    function: Callable[[], object], *, grace_s: float = 0.0, timeout_s: float = PATIENCE_S
) -> Iterator[tuple[HealthCheck, Reports]]:
    """Run a check, and stop it."""
    reports: Reports = queue.SimpleQueue()
    check = HealthCheck(function, 0.001, timeout_s, 3, grace_s, lambda *report: reports.put(report))
    check.start()
    try:
        yield check, reports
    finally:
        check.stop()


def told(*acts: Callable[[], object], grace_s: float = 0.0) -> list[tuple[int, str]]:
    """Return all that is reported of these acts, one after another."""
    script = Script(*acts)
    with checking(script, grace_s=grace_s) as (_, reports):
        assert script.played.wait(PATIENCE_S)
        return [reports.get_nowait() for _ in range(reports.qsize())]


@pytest.mark.parametrize("answer", [None, True, 0, "", [], "False"], ids=repr)
def test_anything_but_false_is_good(answer: object) -> None:
    """A function that returns nothing is well; so is one that returns what is merely empty."""
    assert told(lambda: answer, lambda: answer) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no database"), "ValueError: no database"),
        (ValueError(), "ValueError"),
        (SystemExit(1), "SystemExit: 1"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(), "StopIteration"),
        (UnspeakableError(), "UnspeakableError"),
        (ValueError("x" * 10_000), ("ValueError: " + "x" * 10_000)[:REASON_LENGTH]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_is_raised_is_told_and_ends_nothing(error: BaseException, reason: str) -> None:
    """The next call comes all the same."""
    assert told(raising(error), good) == [(1, reason), (0, "")]


def test_bad_answers_in_a_row_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Each is told with its number; a good one is told once, and begins the count anew."""
    acts = (bad, raising(OSError("x")), good, good, bad, good)
    bad_one = (1, "it returned False")
    assert told(*acts) == [bad_one, (2, "OSError: x"), (0, ""), bad_one, (0, "")]
    assert caplog.records == []


def test_the_last_straw_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback stands in the application's own log, once."""
    with caplog.at_level(logging.ERROR):
        told(bad, bad, raising(OSError("the cause")), raising(OSError("later")), good)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "the cause" in str(record.exc_info[1])


def test_grace() -> None:
    """While it starts, bad answers do not count; after a good one they do."""
    assert told(bad, bad, bad, bad, good, bad, grace_s=1e6) == [(1, "it returned False"), (0, "")]


def test_an_awaitable_is_no_answer() -> None:
    """An async function in disguise would never be run, so it is not taken for good."""

    class Later:
        def __await__(self) -> Iterator[None]:
            yield

    assert told(Later)[0][1].startswith("it returned something to await")


def test_a_slow_answer_is_bad() -> None:
    """One that returns after its time is told as such."""
    times = iter([0.0, 10.0, 13.5])
    last = threading.Event()

    def clock() -> float:
        with contextlib.suppress(StopIteration):
            return next(times)
        last.set()
        return 20.0

    reports: Reports = queue.SimpleQueue()
    check = HealthCheck(good, 0.001, 2.0, 3, 0.0, lambda *report: reports.put(report), clock)
    check.start()
    assert reports.get(timeout=PATIENCE_S) == (1, "it took 3.5 s, longer than 2 s")
    assert reports.get(timeout=PATIENCE_S) == (0, "")
    check.stop()
    assert last.wait(PATIENCE_S)


def test_a_call_that_does_not_return_is_seen() -> None:
    """`answered_at` stands still, and nothing is called a second time meanwhile; afterwards it goes on."""
    named, entered, leave, again = threading.Event(), threading.Event(), threading.Event(), threading.Event()
    calls: list[float] = []

    def function() -> None:
        assert named.wait(PATIENCE_S)  # the first call may come before `check` has its value
        calls.append(check.answered_at)
        if len(calls) == 2:
            entered.set()
            leave.wait(PATIENCE_S)
        if len(calls) == 3:
            again.set()

    with checking(function) as (check, _):
        named.set()
        assert entered.wait(PATIENCE_S)
        stuck_at = check.answered_at
        assert calls == [0.0, stuck_at]
        assert stuck_at > 0
        leave.set()
        assert again.wait(PATIENCE_S)
        assert calls[2] > stuck_at


def test_nothing_is_told_after_the_end() -> None:
    """The answer of a call that was under way when it was stopped concerns nobody."""
    entered, leave = threading.Event(), threading.Event()

    def function() -> bool:
        entered.set()
        leave.wait(PATIENCE_S)
        return False

    with checking(function) as (check, reports):
        assert entered.wait(PATIENCE_S)
        check.stop()
        leave.set()
        check._thread.join(PATIENCE_S)
        assert not check._thread.is_alive()
        assert reports.empty()


def test_defaults_are_those_of_the_probe() -> None:
    """A "call" probe that says nothing of its timings means the same on both sides."""
    probe = Probe("call")
    check = HealthCheck.of(good, {"target": "call"}, lambda *_: None)
    ours = (check._interval_s, check._timeout_s, check._failures, check._grace_s)
    assert ours == (probe.interval_s, probe.timeout_s, probe.failures, probe.grace_s)
    given = asdict(Probe("call", 0.5, 0.25, 7, 1.5))
    check = HealthCheck.of(good, given, lambda *_: None)
    assert (check._interval_s, check._timeout_s, check._failures, check._grace_s) == (0.5, 0.25, 7, 1.5)


def test_a_report_that_fails_ends_nothing() -> None:
    """The connection may go at any moment."""
    script = Script(bad, bad)
    check = HealthCheck(script, 0.001, 1.0, 3, 0.0, lambda *_: raising(BrokenPipeError())())  # type: ignore[arg-type]
    check.start()
    assert script.played.wait(PATIENCE_S)
    check.stop()
