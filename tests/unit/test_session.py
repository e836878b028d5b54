"""One protected call until its body runs and while it does; the test is the WatchDog, the applications are real processes."""

from __future__ import annotations

import signal
from pathlib import Path

import msgspec
import pytest

from etcdreplica.app.kernel import Slot
from etcdreplica.app.protocol import VERSION
from etcdreplica.clock import boottime
from etcdreplica.daemon.status_page import StatusPage
from etcdreplica.model import Registration
from etcdreplica.words import Style
from tests.unit.watchdog_end import (
    INCARNATION,
    LIMIT_S,
    REPEATED,
    Application,
    Held,
    WatchDogEnd,
    begun,
    by_hand,
    deadline_of,
    eventually,
    guarded,
    welcomed,
)

# --- hello ---------------------------------------------------------------------------------------------------------------


def test_hello_registers(watchdog: WatchDogEnd, script: Path) -> None:
    """A program started by hand brings its registration, and the process is to become the primary."""
    watchdog.start(script, "warm", "return")
    hello = watchdog.accept().expect("hello")
    assert (hello["version"], hello["adopt"]) == (VERSION, True)
    registration = msgspec.convert(hello["registration"], Registration)
    assert (registration.name, registration.style, registration.degree) == ("shop", Style.WARM, 2)
    assert registration.stop_timeout_s == 3.0
    assert registration.program.argv[-3:] == (str(script), "warm", "return")
    assert registration.program.needs == (str(script),)


def test_hello_of_a_copy_names_its_incarnation(watchdog: WatchDogEnd, script: Path) -> None:
    """A program started by a WatchDog says whose replica it is, and registers nothing."""
    watchdog.start(script, "warm", "return", incarnation=42)
    hello = watchdog.accept().expect("hello")
    assert (hello["app"], hello["incarnation"]) == ("shop", 42)
    assert "registration" not in hello


def test_detached_start_only_registers(watchdog: WatchDogEnd, script: Path) -> None:
    """The process ends once the registration is taken, and its body does not run."""
    application = watchdog.start(script, "warm", "return", detach=True)
    connection = watchdog.accept()
    assert connection.expect("hello")["adopt"] is False
    connection.send("ok")
    assert application.wait() == 0
    assert application.line() == ""


def test_refusal_before_a_place(watchdog: WatchDogEnd, script: Path) -> None:
    """What the WatchDog says reaches the caller as RefusedError."""
    application = watchdog.start(script, "warm", "return")
    connection = watchdog.accept()
    connection.expect("hello")
    connection.send("error", message="shop is registered already")
    assert application.line() == "RefusedError shop is registered already"
    assert application.wait() == 4


def test_refusal_while_waiting(watchdog: WatchDogEnd, script: Path) -> None:
    """A backup can be refused later, too."""
    application, connection = welcomed(watchdog, script, "warm", "return", role="backup")
    connection.send("error", message="no more")
    assert application.line() == "RefusedError no more"
    assert application.wait() == 4


@pytest.mark.parametrize(
    "answer",
    [
        {"kind": "stop"},
        {"kind": "role", "role": "primary", "epoch": 1},
        {"kind": "welcome"},
        {"kind": "welcome", "host": "a", "role": "king", "epoch": 1},
    ],
)
def test_strange_answer_to_hello(watchdog: WatchDogEnd, script: Path, answer: dict[str, str]) -> None:
    """A peer that speaks another protocol is named as such; the body does not run."""
    application = watchdog.start(script, "warm", "return")
    connection = watchdog.accept()
    connection.expect("hello")
    connection.send(**answer)
    assert application.line().startswith("ProtocolError")
    assert application.wait() == 4


def test_watchdog_that_goes_away_before_a_place(watchdog: WatchDogEnd, script: Path) -> None:
    """Nothing runs yet, so the caller is told and may try again."""
    application = watchdog.start(script, "warm", "return")
    connection = watchdog.accept()
    connection.expect("hello")
    connection.close()
    assert application.line().startswith("NoWatchDogError")
    assert application.wait() == 4


# --- one's turn ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_primary_runs_at_once(watchdog: WatchDogEnd, script: Path, style: str, mode: tuple[str, ...]) -> None:
    """The body has the place that the WatchDog gave, and the WatchDog learns when it began."""
    application, connection = welcomed(watchdog, script, style, "return", *mode)
    assert application.line() == "body primary 5 host-a shop"
    connection.expect("done")


def test_beginning_of_the_body_is_announced(watchdog: WatchDogEnd, script: Path) -> None:
    """The WatchDog learns when the body began, on the clock of this host."""
    before = boottime()
    _, connection = begun(watchdog, script, "warm", "wait")
    assert before < connection.expect("running")["at"] < boottime()


def test_beginning_is_announced_before_the_end(watchdog: WatchDogEnd, script: Path) -> None:
    """However short a body is: else the WatchDog takes the time it waited for the time it ran, and forgives its failure."""
    watchdog.start(script, "warm", "repeat")
    for _ in range(REPEATED):
        connection = watchdog.accept()
        connection.expect("hello")
        connection.welcome()
        kinds = []
        while (message := connection.receive()) is not None:
            kinds.append(message["type"])
            if kinds[-1] == "done":
                connection.send("ok")
        assert kinds.index("running") < kinds.index("done")


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
@pytest.mark.parametrize("style", ["cold", "warm"])
def test_backup_waits_inside_the_call(watchdog: WatchDogEnd, script: Path, style: str, mode: tuple[str, ...]) -> None:
    """The body runs only once its copy is primary, with the epoch of the promotion."""
    application, connection = welcomed(watchdog, script, style, "return", *mode, role="backup")
    connection.send("role", role="backup", epoch=6)
    connection.send("role", role="primary", epoch=7)
    assert application.line() == "body primary 7 host-a shop"
    connection.expect("done")


def test_hot_backup_runs(watchdog: WatchDogEnd, script: Path) -> None:
    """Under style hot the body runs on every copy."""
    begun(watchdog, script, "hot", "wait", role="backup")


def test_backup_that_is_stopped_never_runs(watchdog: WatchDogEnd, script: Path) -> None:
    """It ends in order, without a word."""
    application, connection = welcomed(watchdog, script, "warm", "return", role="backup")
    connection.send("stop")
    assert application.wait() == 0
    assert application.line() == ""
    assert connection.rest() == []


def test_backup_whose_watchdog_goes_away_never_runs(watchdog: WatchDogEnd, script: Path) -> None:
    """Nobody can promote it any more."""
    application, connection = welcomed(watchdog, script, "warm", "return", role="backup")
    connection.close()
    assert application.line().startswith("NoWatchDogError")
    assert application.wait() == 4


# --- while the body runs -------------------------------------------------------------------------------------------------


def test_role_changes_call_back(watchdog: WatchDogEnd, script: Path) -> None:
    """A new role calls back with its epoch; a new epoch alone only shows in the handle."""
    application, connection = begun(watchdog, script, "hot", "wait", role="backup")
    connection.send("role", role="primary", epoch=9)
    assert application.line() == "role primary 9"
    connection.send("role", role="primary", epoch=10)
    connection.send("stop")
    assert application.line() == "stopping 10"


@pytest.mark.parametrize("action", ["callback-raises", "callback-exits"])
def test_callback_that_fails_harms_nothing_else(watchdog: WatchDogEnd, script: Path, action: str) -> None:
    """The other callbacks are called, and the copy still hears its WatchDog."""
    application, connection = begun(watchdog, script, "hot", action, role="backup")
    connection.send("role", role="primary", epoch=9)
    assert application.line() == "role primary 9"
    connection.send("stop")
    assert application.line() == "stopping 9"
    application.wait()
    assert "callback" in application.errors


def test_stop_is_seen_and_nothing_is_reported(watchdog: WatchDogEnd, script: Path) -> None:
    """A body that returns because it was asked to has not completed the application."""
    application, connection = begun(watchdog, script, "warm", "wait")
    connection.send("stop")
    assert application.line() == "stopping 5"
    assert application.line() == "returned None"
    assert application.wait() == 0
    assert connection.rest() == []


def test_heartbeats_cost_no_messages(watchdog: WatchDogEnd, script: Path) -> None:
    """An inner loop may call it: it writes to the page, which the WatchDog reads when it likes."""
    application, connection = begun(watchdog, script, "warm", "beat")
    page = StatusPage(application.process.pid, connection.expect("page")["fd"])
    connection.expect("advertise")  # after the last heartbeat
    assert 0 < page.read(Slot.PROGRESS) <= page.read(Slot.PULSE) + LIMIT_S
    connection.send("stop")
    assert application.wait() == 0
    assert connection.rest() == []


def test_page_gives_signs_of_life(watchdog: WatchDogEnd, script: Path) -> None:
    """The pulse goes on as often as the WatchDog wants it; the event loop's only for an `async def`."""
    application, connection = welcomed(watchdog, script, "warm", "wait", "async", pulse=0.01)
    page = StatusPage(application.process.pid, connection.expect("page")["fd"])
    connection.expect("running")
    first = {slot: page.read(slot) for slot in (Slot.PULSE, Slot.LOOP)}
    eventually(lambda: all(page.read(slot) > at for slot, at in first.items()))
    assert page.read(Slot.PROGRESS) == page.read(Slot.HEALTH) == 0


def test_endpoint_is_advertised(watchdog: WatchDogEnd, script: Path) -> None:
    """The WatchDog is told where clients find this copy."""
    _, connection = begun(watchdog, script, "warm", "advertise")
    assert connection.expect("advertise")["endpoint"] == "tcp:1"


def died_at_once(application: Application) -> None:
    """Check that the copy killed itself without running another line of the body, and said why."""
    assert application.wait() == -signal.SIGKILL
    assert application.line() == ""
    assert "shop" in application.errors
    assert "this copy stops at once" in application.errors


# --- without a guardian and without a deadline ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])
def test_copy_without_a_deadline_dies_with_its_watchdog(watchdog: WatchDogEnd, script: Path, mode: tuple[str, ...]) -> None:
    """Nobody could tell it any more that it is no longer primary (G1)."""
    application, connection = begun(watchdog, script, "warm", "wait", *mode)
    connection.close()
    died_at_once(application)


def test_copy_that_ignores_everything_dies_with_its_watchdog(watchdog: WatchDogEnd, script: Path) -> None:
    """No cooperation of the body is needed."""
    application, connection = begun(watchdog, script, "warm", "ignore")
    connection.close()
    died_at_once(application)


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_promoted_copy_without_a_deadline_dies_with_its_watchdog(watchdog: WatchDogEnd, script: Path, style: str) -> None:
    """A promotion changes nothing about that."""
    application, connection = welcomed(watchdog, script, style, "wait", role="backup")
    connection.send("role", role="primary", epoch=6)
    assert application.line().startswith("body")
    connection.expect("running")
    connection.close()
    assert application.wait() == -signal.SIGKILL


# --- with one or the other -----------------------------------------------------------------------------------------------

HELD = pytest.mark.parametrize("held", [guarded, by_hand], ids=["guarded", "by-hand"])
MODES = pytest.mark.parametrize("mode", [(), ("async",)], ids=["sync", "async"])


@HELD
@MODES
def test_running_copy_finds_the_next_watchdog(watchdog: WatchDogEnd, script: Path, held: Held, mode: tuple[str, ...]) -> None:
    """The body goes on; the copy names its incarnation and tells everything again, in the order it was told before."""
    application, connection = begun(watchdog, script, "warm", "advertise", *mode, **held())
    first = connection.until("advertise", "notice", "running", "page")
    connection.close()
    again = watchdog.accept()
    hello = again.expect("hello")
    assert (hello["version"], hello["app"], hello["incarnation"]) == (VERSION, "shop", INCARNATION)
    assert "registration" not in hello
    again.welcome(**deadline_of(held()))
    second = again.until("advertise")
    assert [*second] == ["page", "notice", "running", "advertise"]
    assert second == {kind: first[kind] for kind in second}
    again.send("stop")
    assert application.wait() == 0


@HELD
@pytest.mark.parametrize("style", ["cold", "warm"])
def test_waiting_backup_finds_the_next_watchdog(watchdog: WatchDogEnd, script: Path, held: Held, style: str) -> None:
    """It can be promoted by the new one, and its body begins only then."""
    application, connection = welcomed(watchdog, script, style, "return", role="backup", **held())
    connection.close()
    again = watchdog.accept()
    assert again.expect("hello")["incarnation"] == INCARNATION
    again.welcome("backup", **deadline_of(held()))
    assert "running" not in again.until("page")
    again.send("role", role="primary", epoch=6)
    assert application.line() == "body primary 6 host-a shop"
    again.expect("done")


@HELD
def test_promotion_in_the_welcome_of_the_next_watchdog(watchdog: WatchDogEnd, script: Path, held: Held) -> None:
    """What was decided while no WatchDog ran here is taken from its first word."""
    application, connection = begun(watchdog, script, "hot", "wait", role="backup", **held())
    connection.close()
    again = watchdog.accept()
    again.expect("hello")
    again.welcome(epoch=8, **deadline_of(held()))
    assert application.line() == "role primary 8"


def test_no_watchdog_for_a_while(watchdog: WatchDogEnd, script: Path) -> None:
    """It looks again and again; a WatchDog that hangs up on it is as none."""
    application, connection = begun(watchdog, script, "warm", "wait", **guarded())
    connection.expect("running")
    watchdog.vanish()
    connection.close()
    watchdog.listen()
    for _ in range(3):
        impatient = watchdog.accept()
        impatient.expect("hello")
        impatient.close()
    again = watchdog.accept()
    again.expect("hello")
    again.welcome()
    again.until("running")
    again.send("stop")
    assert application.line() == "stopping 5"
    assert application.wait() == 0


def test_nothing_is_said_before_hello(watchdog: WatchDogEnd, script: Path) -> None:
    """Whatever the body tells meanwhile: a WatchDog refuses who does not begin with hello, and that would kill the copy."""
    application, connection = begun(watchdog, script, "warm", "chatter", **guarded())
    for _ in range(20):
        connection.close()
        connection = watchdog.accept()
        first = connection.receive()
        assert first is not None
        assert first["type"] == "hello"
    connection.welcome()
    connection.send("stop")
    connection.rest()
    assert application.wait() == 0


@HELD
def test_refused_reconnect_kills(watchdog: WatchDogEnd, script: Path, held: Held) -> None:
    """A WatchDog that does not know this copy has another one run."""
    application, connection = begun(watchdog, script, "warm", "ignore", **held())
    connection.close()
    again = watchdog.accept()
    again.expect("hello")
    again.send("error", message="this host has no replica shop number 42")
    died_at_once(application)
    assert "number 42" in application.errors


def test_refused_reconnect_of_a_waiting_backup(watchdog: WatchDogEnd, script: Path) -> None:
    """Nothing runs yet, so the caller is told."""
    application, connection = welcomed(watchdog, script, "warm", "return", role="backup", **guarded())
    connection.close()
    again = watchdog.accept()
    again.expect("hello")
    again.send("error", message="not here")
    assert application.line() == "RefusedError not here"
    assert application.wait() == 4


def test_older_epoch_is_ignored(watchdog: WatchDogEnd, script: Path) -> None:
    """A WatchDog that has only begun to learn what its predecessor knew takes no role back."""
    application, connection = begun(watchdog, script, "hot", "wait", role="backup", **guarded())
    connection.send("role", role="primary", epoch=9)
    assert application.line() == "role primary 9"
    connection.send("role", role="backup", epoch=8)
    connection.close()
    again = watchdog.accept()
    again.expect("hello")
    again.welcome("backup", epoch=5)
    again.send("role", role="backup", epoch=8)
    again.send("stop")
    assert application.line() == "stopping 9"  # and no callback before it


@MODES
def test_deadline_kills(watchdog: WatchDogEnd, script: Path, mode: tuple[str, ...]) -> None:
    """A copy started by hand that finds no WatchDog is killed by the kernel, and not before its deadline."""
    application, connection = begun(watchdog, script, "warm", "ignore", *mode, left=2)
    watchdog.vanish()
    connection.close()
    assert application.wait() == -signal.SIGKILL
    assert boottime() >= connection.deadline
    assert "stops at once" not in application.errors


def test_deadline_kills_a_stopped_copy(watchdog: WatchDogEnd, script: Path) -> None:
    """No thread of the copy needs to run for it, and a living WatchDog that renews nothing does not help."""
    application, connection = begun(watchdog, script, "warm", "ignore", left=2)
    application.signal(signal.SIGSTOP)
    assert application.wait() == -signal.SIGKILL
    assert boottime() >= connection.deadline


def test_renewed_deadline(watchdog: WatchDogEnd, script: Path) -> None:
    """Each `renew` moves the deadline, also back to the past, which kills at once."""
    application, connection = begun(watchdog, script, "warm", "advertise", left=2, mark="guardian/shop.1")
    connection.send("renew", until=connection.deadline + 600, mark="guardian/shop.1")
    eventually(lambda: boottime() > connection.deadline)
    assert application.process.poll() is None
    connection.send("renew", until=connection.deadline, mark="guardian/shop.1")
    assert application.wait() == -signal.SIGKILL


def test_deadline_ends_with_the_call(watchdog: WatchDogEnd, script: Path) -> None:
    """Once the protected call has returned, the process may live as long as it likes."""
    application, connection = begun(watchdog, script, "warm", "linger", left=2)
    connection.expect("done")
    connection.send("ok")
    assert application.line() == "returned 7"
    eventually(lambda: boottime() > connection.deadline)
    assert application.process.poll() is None


# --- what makes no sense -------------------------------------------------------------------------------------------------


def test_copy_that_hears_garbage_dies(watchdog: WatchDogEnd, script: Path) -> None:
    """A WatchDog that cannot be understood is as bad as none."""
    application, connection = begun(watchdog, script, "warm", "wait")
    connection.send_bytes(b"\x00\x00\x00\x01x")
    died_at_once(application)


@pytest.mark.parametrize("fields", [{}, {"role": "king", "epoch": 9}, {"role": "primary"}])
def test_copy_that_hears_an_impossible_role_dies(watchdog: WatchDogEnd, script: Path, fields: dict[str, str]) -> None:
    """What is JSON but makes no sense must not leave a copy that listens no longer and runs on."""
    application, connection = begun(watchdog, script, "warm", "wait")
    connection.send("role", **fields)
    died_at_once(application)
