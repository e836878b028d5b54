"""Restoring, and holding what comes while one waits; the test is the CheckpointServer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from etcdreplica.app.checkpoints import Checkpoints
from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.errors import CheckpointError, CheckpointUnavailableError
from tests.unit.checkpoint_end import Later, ServerEnd, made
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


def restoring(checkpoints: Checkpoints, timeout: float = 5.0) -> Later:
    """Restore as primary of epoch 7, in a thread."""
    return Later(checkpoints.restore, 7, timeout)


def answer(connection: Connection, kind: str, **fields: Any) -> dict[str, Any]:
    """Answer the next question, and return it."""
    question = connection.expect("restore")
    connection.send(kind, question=question["question"], **fields)
    return dict(question)


def test_found(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """The state is read from the file, from where it begins there."""
    call = restoring(checkpoints)
    question = answer(server.accept(), "found", **server.file(b"state"))
    assert call.result() == (True, b"state")
    assert (question["epoch"], question["loaded"]) == (7, [0, 0])
    assert 4 < question["within"] <= 5


def test_found_is_decoded(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """By the application's codec; what does not decode is an error, not a default."""
    call = restoring(checkpoints)
    connection = server.accept()
    answer(connection, "found", **server.file(msgspec.msgpack.encode({"count": 3}), codec="msgpack"))
    assert call.result() == (True, {"count": 3})
    call = restoring(checkpoints)
    answer(connection, "found", **server.file(b"\xc1", codec="msgpack"))
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        call.result()


def test_none(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """There is no checkpoint at all."""
    call = restoring(checkpoints)
    answer(server.accept(), "found", path=None)
    assert call.result() == (False, None)


def test_unavailable(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """The server says who may have a newer one."""
    call = restoring(checkpoints)
    answer(server.accept(), "unavailable", reason="host-b may hold a newer one")
    with pytest.raises(CheckpointUnavailableError, match="host-b may hold a newer one"):
        call.result()


def test_without_a_server(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """It is said what is missing; the default would be wrong."""
    server.vanish()
    with pytest.raises(CheckpointUnavailableError, match="no answer of the CheckpointServer"):
        checkpoints.restore(7, -1.0)  # it waits for the server's own answer one second longer


def test_late_answer_to_another_question_does_not_count(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """A body may try again after its first attempt has failed, and is answered then."""
    connection = None
    call = restoring(checkpoints, -0.9)
    connection = server.accept()
    first = connection.expect("restore")
    with pytest.raises(CheckpointUnavailableError):
        call.result()
    call = restoring(checkpoints)
    second = connection.expect("restore")
    connection.send("unavailable", question=first["question"], reason="too late")
    connection.send("found", question=second["question"], **server.file(b"state"))
    assert call.result() == (True, b"state")


def test_question_is_said_again(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """To the next server, with what is left of the time."""
    call = restoring(checkpoints)
    connection = server.accept()
    first = connection.expect("restore")
    connection.close()
    second = answer(server.accept(), "found", **server.file(b"state"))
    assert second["within"] < first["within"]
    assert call.result() == (True, b"state")


def test_file_that_was_pushed_out_meanwhile(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Newer ones have come: it is asked once more."""
    call = restoring(checkpoints)
    connection = server.accept()
    answer(connection, "found", **{**server.file(b"old"), "path": "/nowhere/1-1"})
    answer(connection, "found", **server.file(b"new", sequence=2))
    assert call.result() == (True, b"new")


def test_file_that_this_process_cannot_see(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Such as one in a container: it is not asked for ever."""
    call = restoring(checkpoints, -0.5)
    answer(server.accept(), "found", **{**server.file(b"old"), "path": "/nowhere/1-1"})
    with pytest.raises(CheckpointUnavailableError, match="/nowhere/1-1 is not there for this process"):
        call.result()


def test_file_that_cannot_be_read(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """That is an error of ours, too: one except clause is enough for a body."""
    call = restoring(checkpoints)
    answer(server.accept(), "found", **{**server.file(b"old"), "path": str(server.directory)})
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        call.result()


def test_file_that_is_too_short(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """It was cut off after the server had looked at it."""
    call = restoring(checkpoints)
    answer(server.accept(), "found", **{**server.file(b"state"), "size": 100})
    with pytest.raises(CheckpointError, match="cut off while it was read"):
        call.result()


def test_numbers_go_on_after_what_was_restored(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """A checkpoint that is made then is newer in any case."""
    call = restoring(checkpoints)
    connection = server.accept()
    answer(connection, "found", **server.file(b"state", sequence=41))
    call.result()
    checkpoints.save(b"next", 7, wait=False, timeout=0)
    assert connection.expect("store")["sequence"] == 42


# --- following ---------------------------------------------------------------------------------------------------------


def test_newest_is_held_loaded(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """`restore` names it, and does not read it again when it still is the newest."""
    seen: list[Any] = []
    checkpoints.follow(seen.append)
    connection = server.accept()
    connection.expect("follow")
    told = [server.file(b"%d" % number, sequence=number) for number in (1, 2)]
    for each in told:
        connection.send("newest", **each)
    eventually(lambda: seen == [b"1", b"2"])
    Path(told[1]["path"]).unlink()
    call = restoring(checkpoints)
    question = answer(connection, "found", **told[1])
    assert question["loaded"] == [1, 2]
    assert call.result() == (True, b"2")


def test_newer_one_is_read(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """What is held is not taken for what it is not."""
    seen: list[Any] = []
    checkpoints.follow(seen.append)
    connection = server.accept()
    connection.expect("follow")
    connection.send("newest", **server.file(b"1"))
    eventually(lambda: seen == [b"1"])
    call = restoring(checkpoints)
    answer(connection, "found", **server.file(b"2", sequence=2))
    assert call.result() == (True, b"2")


def test_next_server_is_followed_too(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Until the role changes."""
    checkpoints.follow(None)
    server.accept().close()
    connection = server.accept()
    connection.expect("follow")
    call = restoring(checkpoints)
    answer(connection, "found", path=None)
    assert call.result() == (False, None)
    connection.close()
    call = restoring(checkpoints)
    answer(server.accept(), "found", path=None)  # no follow before it
    call.result()


def test_callback_that_raises_is_survived(
    server: ServerEnd, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in the log, whatever it raises; the state is held all the same."""
    raised: list[Any] = []

    def on_checkpoint(state: bytes) -> None:
        raised.append(state)
        raise SystemExit(3) if state == b"1" else ValueError("from the callback")

    checkpoints.follow(on_checkpoint)
    connection = server.accept()
    connection.expect("follow")
    for number in (1, 2):
        connection.send("newest", **server.file(b"%d" % number, sequence=number))
    eventually(lambda: raised == [b"1", b"2"])
    call = restoring(checkpoints)
    assert answer(connection, "found", **server.file(b"2", sequence=2))["loaded"] == [1, 2]
    assert call.result() == (True, b"2")
    assert caplog.text.count("on_checkpoint of shop raised") == 2


def test_what_cannot_be_loaded_is_passed_over(
    server: ServerEnd, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    """It is gone, or not of this codec; the next one counts."""
    seen: list[Any] = []
    with caplog.at_level(logging.ERROR):
        checkpoints.follow(seen.append)
        connection = server.accept()
        connection.expect("follow")
        connection.send("newest", **{**server.file(b"1"), "path": "/nowhere/1-1"})
        connection.send("newest", **server.file(b"2", sequence=2, codec="pickle"))
        connection.send("newest", **{**server.file(b"3", sequence=3), "path": str(server.directory)})
        connection.send("newest", **server.file(b"4", sequence=4))
        eventually(lambda: seen == [b"4"])
    assert "made with the codec 'pickle'" in caplog.text
    assert "Is a directory" in caplog.text


def test_own_checkpoints_are_not_followed(server: ServerEnd, checkpoints: Checkpoints) -> None:
    """Whoever stores is primary by now, also when it has never restored: it knows its own states."""
    seen: list[Any] = []
    checkpoints.follow(seen.append)
    connection = server.accept()
    connection.expect("follow")
    checkpoints.save(b"mine", 7, wait=False, timeout=0)
    connection.expect("store")
    connection.send("newest", **server.file(b"mine", epoch=7))
    connection.send("kept", sequence=1)
    checkpoints.flush(5.0)
    assert seen == []
