"""The application's side of checkpoints; the test is the CheckpointServer, and says what it likes when it likes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdreplica.app.checkpoints import Checkpoints
from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.errors import CheckpointError, NotDurableError, UsageError
from tests.unit.checkpoint_end import Later, ServerEnd, handed, made, open_memories
from tests.unit.watchdog_end import Connection, eventually


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerEnd]:
    """Be a CheckpointServer."""
    end = ServerEnd(tmp_path)
    monkeypatch.setenv(SOCKET_ENV, str(end.watchdog))
    yield end
    end.close()


@pytest.fixture
def checkpoints(server: ServerEnd) -> Iterator[Checkpoints]:
    """Return those of an application."""
    made_ = made()
    yield made_
    made_.close()


def saving(checkpoints: Checkpoints, state: Any, timeout: float = 5.0) -> Later:
    """Store a state and wait for it, in a thread."""
    return Later(checkpoints.save, state, 7, wait=True, timeout=timeout)


# --- storing -----------------------------------------------------------------------------------------------------------


def test_state_is_handed_over(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """With its epoch, its number and in memory of its own; nobody is held up."""
    checkpoints.save(b"state", 7, wait=False, timeout=0)
    message = server.accept().expect("store")
    assert handed(message) == b"state"
    assert (message["epoch"], message["sequence"], message["codec"]) == (7, 1, "bytes")
    assert (message["wait"], message["copies"]) == (False, 2)


def test_waiting_returns_when_it_is_durable(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Not when this host has it, nor when some of the others have."""
    call = saving(checkpoints, b"state")
    connection = server.accept()
    message = connection.expect("store")
    assert message["wait"] is True
    connection.send("kept", sequence=1)
    connection.send("reached", sequence=1, hosts=1, done=False, trouble="")
    checkpoints.save(b"next", 7, wait=False, timeout=0)
    assert connection.expect("store")["sequence"] == 2  # so it has seen all that was sent
    connection.send("reached", sequence=1, hosts=2, done=True, trouble="")
    assert call.result() is None


def test_not_durable_in_time(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """The error has how many hosts hold it, and why not more do."""
    call = saving(checkpoints, b"state", timeout=0.3)
    connection = server.accept()
    connection.expect("store")
    connection.send("kept", sequence=1)
    connection.send("reached", sequence=1, hosts=1, done=False, trouble="host-b: the disk is full")
    with pytest.raises(NotDurableError, match=r"on 1 of 2 hosts after 0\.3 s \(host-b: the disk is full\)") as caught:
        call.result()
    assert (caught.value.reached, caught.value.wanted) == (1, 2)


def test_another_degree_counts_at_once(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Whoever waits for two hosts when one is enough from now on is told when one has it."""
    call = saving(checkpoints, b"state")
    connection = server.accept()
    assert connection.expect("store")["copies"] == 2
    checkpoints.want(1)
    message = connection.expect("store")
    assert (message["sequence"], message["copies"], message["wait"]) == (1, 1, True)
    connection.send("reached", sequence=1, hosts=1, done=True, trouble="")
    assert call.result() is None


def test_without_a_server_nothing_is_durable(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Waiting ends in time; not waiting is not even noticed."""
    server.vanish()
    checkpoints.save(b"state", 7, wait=False, timeout=0)
    with pytest.raises(NotDurableError, match=r"0 of 2 hosts .*the CheckpointServer of this host does not answer"):
        checkpoints.save(b"state", 7, wait=True, timeout=0.05)


def test_refused(server: ServerEnd, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    """Who waits is told why; for the others it is in the log."""
    call = saving(checkpoints, b"state")
    connection = server.accept()
    connection.expect("store")
    connection.send("refused", sequence=1, reason="the disk is full")
    with pytest.raises(CheckpointError, match="refused: the disk is full"):
        call.result()
    with caplog.at_level(logging.ERROR):
        checkpoints.save(b"next", 7, wait=False, timeout=0)
        connection.expect("store")
        connection.send("refused", sequence=2, reason="epoch 7 is over")
        eventually(lambda: "checkpoint 2 was refused: epoch 7 is over" in caplog.text)


def test_only_the_newest_follows(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """What is made while one is on its way is passed over, but for the last of it."""
    connection = None
    for number in range(1, 5):
        checkpoints.save(b"%d" % number, 7, wait=False, timeout=0)
        if connection is None:
            connection = server.accept()
            assert handed(connection.expect("store")) == b"1"
    assert connection is not None
    connection.send("kept", sequence=1)
    message = connection.expect("store")
    assert (message["sequence"], handed(message)) == (4, b"4")


def test_who_waits_overtakes(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """It is said at once, and what was to follow is older and dropped."""
    checkpoints.save(b"1", 7, wait=False, timeout=0)
    connection = server.accept()
    connection.expect("store")
    checkpoints.save(b"2", 7, wait=False, timeout=0)
    call = saving(checkpoints, b"3")
    assert connection.expect("store")["sequence"] == 3
    connection.send("kept", sequence=1)
    connection.send("reached", sequence=3, hosts=2, done=True, trouble="")
    call.result()
    checkpoints.save(b"4", 7, wait=False, timeout=0)
    assert connection.expect("store")["sequence"] == 4


def test_older_state_never_follows_a_newer_one(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """A state that took long to make counts as made when it was begun."""
    number = checkpoints.number()
    call = saving(checkpoints, b"newer")
    connection = server.accept()
    connection.expect("store")
    checkpoints.save(b"older", 7, wait=False, timeout=0, number=number)
    connection.send("reached", sequence=2, hosts=2, done=True, trouble="")
    call.result()
    checkpoints.save(b"newest", 7, wait=False, timeout=0)
    assert handed(connection.expect("store")) == b"newest"


def test_state_that_cannot_be_encoded(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """The caller learns at once, whether it waits or not."""
    for wait in (False, True):
        with pytest.raises(UsageError):
            checkpoints.save(object(), 7, wait=wait, timeout=1)


def test_many_may_wait(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Each for its own."""
    calls = [saving(checkpoints, b"state") for _ in range(3)]
    connection = server.accept()
    sequences = {int(connection.expect("store")["sequence"]) for _ in calls}
    assert sequences == {1, 2, 3}
    for sequence in (2, 3, 1):
        connection.send("reached", sequence=sequence, hosts=2, done=True, trouble="")
    for call in calls:
        call.result()


# --- a server that comes and goes --------------------------------------------------------------------------------------


def again(server: ServerEnd, connection: Connection) -> Connection:
    """Be another CheckpointServer."""
    connection.close()
    return server.accept()


def test_everything_is_said_again(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """What was not answered is handed over once more, in its order; being told twice of it does no harm."""
    checkpoints.save(b"one", 7, wait=False, timeout=0)
    connection = server.accept()
    connection.expect("store")
    call = saving(checkpoints, b"two")
    connection.expect("store")
    connection = again(server, connection)
    messages = [connection.expect("store") for _ in range(2)]
    assert [(message["sequence"], handed(message)) for message in messages] == [(1, b"one"), (2, b"two")]
    for _ in range(2):
        connection.send("kept", sequence=1)
        connection.send("kept", sequence=2)
        connection.send("reached", sequence=2, hosts=2, done=True, trouble="")
    connection.send("refused", sequence=2, reason="too late")
    connection.send("kept", sequence=99)
    assert call.result() is None
    checkpoints.save(b"three", 7, wait=False, timeout=0)
    assert connection.expect("store")["sequence"] == 3


def test_server_that_comes_late(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """An application may be quicker than it."""
    server.vanish()
    call = saving(checkpoints, b"state")
    server.listen()
    connection = server.accept()
    connection.expect("store")
    connection.send("reached", sequence=1, hosts=2, done=True, trouble="")
    call.result()


@pytest.mark.parametrize("answer", [b"\xff\xff\xff\xff", b"\0\0\0\1x"])
def test_strange_answers(server: ServerEnd, checkpoints: Checkpoints, answer: bytes) -> None:
    """Who speaks something else is left, and asked again."""
    checkpoints.save(b"state", 7, wait=False, timeout=0)
    connection = server.accept()
    connection.expect("store")
    connection.send_bytes(answer)
    assert server.accept().expect("store")["sequence"] == 1


def test_error_of_the_server(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """It hangs up after that; then the same is tried again."""
    checkpoints.save(b"state", 7, wait=False, timeout=0)
    connection = server.accept()
    connection.expect("store")
    connection.send("error", message="no seat here")
    assert server.accept().expect("store")["sequence"] == 1


# --- the end -----------------------------------------------------------------------------------------------------------


def test_flush_waits_until_it_is_on_this_host(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Also for what has not been said yet."""
    checkpoints.save(b"one", 7, wait=False, timeout=0)
    checkpoints.save(b"two", 7, wait=False, timeout=0)
    call = Later(checkpoints.flush, 5.0)
    connection = server.accept()
    while (message := connection.expect("store"))["sequence"] != 2:
        connection.send("kept", sequence=message["sequence"])
    connection.send("kept", sequence=2)
    call.result()


def test_flush_ends_in_time(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Without a server nothing gets anywhere."""
    server.vanish()
    checkpoints.flush(5.0)  # there is nothing
    checkpoints.save(b"one", 7, wait=False, timeout=0)
    checkpoints.flush(0.05)


def test_flush_does_not_wait_for_what_was_passed_over(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """A newer state has taken its place meanwhile."""
    server.vanish()
    checkpoints.save(b"one", 7, wait=False, timeout=0)
    call = Later(checkpoints.flush, 60.0)
    checkpoints.save(b"two", 7, wait=False, timeout=0)
    server.listen()
    connection = server.accept()
    connection.send("kept", sequence=connection.expect("store")["sequence"])
    call.result()


def test_close_leaves_nothing(server: ServerEnd) -> None:
    """No descriptor and no thread; whoever waits is told."""
    before = open_memories()
    checkpoints = made()
    call = saving(checkpoints, b"state")
    connection = server.accept()
    connection.expect("store")
    checkpoints.save(b"more", 7, wait=False, timeout=0)
    connection.expect("store")
    checkpoints.close()
    with pytest.raises(CheckpointError, match="this copy ends"):
        call.result()
    connection.close()
    assert open_memories() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "etcdreplica checkpoints"]


def test_close_without_a_server(server: ServerEnd) -> None:
    """It does not wait for one; closing what was never used is nothing."""
    server.vanish()
    unused, used = made(), made()
    unused.close()
    used.save(b"state", 7, wait=False, timeout=0)
    used.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "etcdreplica checkpoints"]


def test_descriptors_are_given_back(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """After each answer, and when nobody waits any more."""
    checkpoints.save(b"first", 7, wait=False, timeout=0)
    connection = server.accept()
    connection.expect("store")
    connection.send("kept", sequence=1)
    checkpoints.flush(5.0)
    before = open_memories()
    for number in range(2, 6):
        call = saving(checkpoints, b"state")
        connection.expect("store")
        connection.send("reached", sequence=number, hosts=2, done=True, trouble="")
        call.result()
    with pytest.raises(NotDurableError):
        checkpoints.save(b"state", 7, wait=True, timeout=0.01)
    assert open_memories() == before
