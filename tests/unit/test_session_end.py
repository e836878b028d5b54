"""How a protected call ends: results, errors and signals; the test is the WatchDog, the applications are real processes."""

from __future__ import annotations

import ctypes
import signal
import time
from pathlib import Path

import pytest

from tests.unit.watchdog_end import REPEATED, WatchDogEnd, begun, guarded, welcomed

# --- the end -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
def test_result_is_returned_once_the_watchdog_knows(watchdog: WatchDogEnd, script: Path, mode: tuple[str, ...]) -> None:
    """`done` is answered by `ok`; then the call returns what the body returned."""
    application, connection = begun(watchdog, script, "warm", "return", *mode)
    connection.expect("done")
    connection.send("ok")
    assert application.line() == "returned 7"
    assert application.wait() == 0
    assert connection.rest() == []


def test_watchdog_that_goes_away_after_the_end_harms_nobody(watchdog: WatchDogEnd, script: Path) -> None:
    """The body has ended, so there is nothing to kill."""
    application, connection = begun(watchdog, script, "warm", "return")
    connection.expect("done")
    connection.send("ok")
    connection.close()
    assert application.line() == "returned 7"
    assert application.wait() == 0


@pytest.mark.parametrize(("action", "word"), [("return", "done"), ("raise", "failed")])
def test_last_words_are_said_again(watchdog: WatchDogEnd, script: Path, action: str, word: str) -> None:
    """A WatchDog that dies before it has answered them is followed by one that is told."""
    application, connection = begun(watchdog, script, "warm", action, **guarded())
    before = connection.expect(word)
    connection.close()
    again = watchdog.accept()
    again.expect("hello")
    again.welcome()
    assert again.expect(word) == before
    again.send("ok")
    assert application.wait() == (0 if action == "return" else 1)


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
def test_error_is_reported_and_raised(watchdog: WatchDogEnd, script: Path, mode: tuple[str, ...]) -> None:
    """The WatchDog gets the last line of the traceback, the caller the error."""
    application, connection = begun(watchdog, script, "warm", "raise", *mode)
    assert connection.expect("failed")["reason"] == "ValueError: böse"
    connection.send("ok")
    assert application.wait() == 1
    assert "ValueError: böse" in application.errors


def test_clean_exit_is_completion(watchdog: WatchDogEnd, script: Path) -> None:
    """`sys.exit(0)` in the body is as good as a return."""
    application, connection = begun(watchdog, script, "warm", "exit-0")
    connection.expect("done")
    connection.send("ok")
    assert application.wait() == 0


def test_unclean_exit_is_failure(watchdog: WatchDogEnd, script: Path) -> None:
    """`sys.exit(3)` in the body is a failure, and the code stays."""
    application, connection = begun(watchdog, script, "warm", "exit-3")
    assert "SystemExit" in connection.expect("failed")["reason"]
    connection.send("ok")
    assert application.wait() == 3


def test_finished_calls_leave_nothing_open(watchdog: WatchDogEnd, script: Path) -> None:
    """A program may make one protected call after the other, for as long as it likes."""
    application = watchdog.start(script, "warm", "repeat")
    counts = []
    for _ in range(REPEATED):
        connection = watchdog.accept()
        connection.expect("hello")
        connection.welcome()
        assert application.line().startswith("body")
        assert application.line() == "registered callbacks"
        connection.expect("done")
        connection.send("ok")
        assert connection.rest() == []
        counts.append(application.line())
    assert len(set(counts[1:])) == 1, counts
    application.end()
    assert "ResourceWarning" not in application.errors


# --- signals -------------------------------------------------------------------------------------------------------------

NUMBERS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@NUMBERS
@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
def test_signal_to_a_waiting_backup(watchdog: WatchDogEnd, script: Path, number: signal.Signals, mode: tuple[str, ...]) -> None:
    """It says that it leaves, and ends without a failure."""
    application, connection = welcomed(watchdog, script, "warm", "return", *mode, role="backup")
    application.signal(number)
    connection.expect("leaving")
    connection.send("stop")
    assert application.wait() == 0
    assert application.line() == ""


def test_signal_that_comes_with_a_message(watchdog: WatchDogEnd, script: Path) -> None:
    """Whichever is seen first, the WatchDog is told; else it takes the end for a failure."""
    application, connection = welcomed(watchdog, script, "warm", "return", "async", role="backup")
    connection.send("role", role="backup", epoch=6)
    application.signal(signal.SIGTERM)
    connection.expect("leaving")
    connection.send("stop")
    assert application.wait() == 0


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
def test_signal_that_does_not_interrupt_the_main_thread(watchdog: WatchDogEnd, script: Path, mode: tuple[str, ...]) -> None:
    """The kernel may hand it to another thread, or to the main one just before that sleeps: it must wake all the same."""
    application, connection = welcomed(watchdog, script, "warm", "return", *mode, role="backup")
    while (message := connection.receive()) is not None and message["type"] != "notice":
        pass  # until the listening thread is there
    pid = application.process.pid
    other = max(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
    assert other != pid
    ctypes.CDLL(None).tgkill(pid, other, signal.SIGTERM)
    connection.expect("leaving")
    connection.send("stop")
    assert application.wait() == 0


def test_signal_before_a_place(watchdog: WatchDogEnd, script: Path) -> None:
    """A program that is still registering takes itself back."""
    application = watchdog.start(script, "warm", "return")
    connection = watchdog.accept()
    connection.expect("hello")
    application.signal(signal.SIGTERM)
    connection.expect("leaving")
    connection.close()
    assert application.wait() == 0
    assert application.line() == ""


@NUMBERS
def test_signal_to_a_running_copy(watchdog: WatchDogEnd, script: Path, number: signal.Signals) -> None:
    """The body is asked to stop, the WatchDog is told, and the return that follows is no completion."""
    application, connection = begun(watchdog, script, "warm", "wait")
    application.signal(number)
    connection.expect("leaving")
    assert application.line() == "stopping 5"
    connection.send("stop")
    assert application.line() == "returned None"
    assert application.wait() == 0
    assert set(connection.rest()) <= {"leaving"}


def test_signal_to_a_running_async_copy(watchdog: WatchDogEnd, script: Path) -> None:
    """The same for an `async def`."""
    application, connection = begun(watchdog, script, "warm", "wait", "async")
    application.signal(signal.SIGTERM)
    connection.expect("leaving")
    connection.send("stop")
    assert application.line() == "returned None"
    assert application.wait() == 0


def test_signal_while_there_is_no_watchdog(watchdog: WatchDogEnd, script: Path) -> None:
    """The body is asked to stop at once, and the next WatchDog learns that this copy leaves."""
    application, connection = begun(watchdog, script, "warm", "wait", **guarded())
    connection.expect("running")
    watchdog.vanish()
    connection.close()
    application.signal(signal.SIGTERM)
    assert application.line() == "stopping 5"
    watchdog.listen()
    again = watchdog.accept()
    again.expect("hello")
    again.welcome()
    again.expect("leaving")
    again.send("stop")
    assert application.wait() == 0


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_second_signal_acts_as_ever(watchdog: WatchDogEnd, script: Path) -> None:
    """Somebody who insists need not wait for the body."""
    application, connection = begun(watchdog, script, "warm", "ignore")
    application.signal(signal.SIGTERM)
    connection.expect("leaving")
    while catches(application.process.pid, signal.SIGTERM):  # until its main thread has seen the first, a second is the same
        time.sleep(0.001)
    application.signal(signal.SIGTERM)
    assert application.wait() == -signal.SIGTERM
