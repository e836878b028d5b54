"""The rules for names, styles and degrees, and what their messages say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.errors import EtcdReplicaError, UsageError
from etcdreplica.words import (
    MAX_DEGREE,
    NAME,
    Keep,
    Style,
    check_degree,
    check_name,
    check_probe,
    check_stop_timeout,
    parse_keep,
    parse_style,
)


@pytest.mark.parametrize("name", ["a", "9", "shop", "Shop-2", "a.b_c-d", "a" * 63, "x--y..z"])
def test_good_names(name: str) -> None:
    """Letters, digits and three marks inside."""
    assert check_name("application name", name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", ".a", "a.", "_", "a b", "a/b", "a\n", "naïve", "a" * 64, None, 1, b"a", ["a"], True]
)
def test_bad_names(name: object) -> None:
    """Anything else is refused, and the message says what was given and what is allowed."""
    with pytest.raises(UsageError, match=r"bad host name .*: use 1 to 63 letters") as caught:
        check_name("host name", name)
    assert repr(name) in str(caught.value)


@given(st.text(alphabet=st.sampled_from("aZ9._-/ \n\u00e9"), max_size=70))
def test_a_name_is_safe_in_keys_and_files(name: str) -> None:
    """No accepted name holds a separator, a dot alone, or more than 63 characters."""
    if NAME.fullmatch(name):
        assert 0 < len(name) <= 63
        assert name.isascii()
        assert not set(name) & set("/ \n")
        assert name.strip("._-") == name


@pytest.mark.parametrize("value", [1, 2, MAX_DEGREE])
def test_good_degree(value: int) -> None:
    """Whole numbers from 1 to the limit."""
    assert check_degree(value) == value


@pytest.mark.parametrize("value", [0, -1, MAX_DEGREE + 1, True, False, 1.5, 2.0, "2", None])
def test_bad_degree(value: object) -> None:
    """Everything else, with the limits in the message."""
    with pytest.raises(UsageError, match=f"bad degree .* from 1 to {MAX_DEGREE}"):
        check_degree(value)


def test_degree_must_fit_the_hosts() -> None:
    """More copies than distinct hosts cannot be kept."""
    assert check_degree(2, ("a", "b")) == 2
    with pytest.raises(UsageError, match=r"degree 3 cannot be met on 2 host"):
        check_degree(3, ("a", "b", "a"))


@pytest.mark.parametrize("value", [0, 0.5, 10, 3600])
def test_good_stop_timeout(value: float) -> None:
    """Up to an hour."""
    assert check_stop_timeout(value) == value


@pytest.mark.parametrize("value", [-1, 3600.1, float("nan"), float("inf"), "10", None, True])
def test_bad_stop_timeout(value: object) -> None:
    """What is no such number of seconds is refused."""
    with pytest.raises(UsageError, match=r"bad stop_timeout .*: seconds from 0 to 3600"):
        check_stop_timeout(value)


@pytest.mark.parametrize("style", Style)
def test_style_words(style: Style) -> None:
    """Each style is parsed from its own word."""
    assert parse_style(str(style)) is style


@pytest.mark.parametrize("value", ["lukewarm", "Warm", "", None, 1, [], ("warm",)])
def test_unknown_style(value: object) -> None:
    """The message lists the words that are known."""
    with pytest.raises(UsageError, match=r"unknown style .*: use one of cold, warm, hot"):
        parse_style(value)


@pytest.mark.parametrize("value", ["never", None, True, []])
def test_unknown_keep(value: object) -> None:
    """The message lists the words that are known."""
    with pytest.raises(UsageError, match=r"unknown keep .*: use one of until-done, always"):
        parse_keep(value)
    assert parse_keep("always") is Keep.ALWAYS


def test_misuse_is_one_branch_of_the_errors() -> None:
    """A UsageError is ours and a ValueError."""
    assert issubclass(UsageError, EtcdReplicaError)
    assert issubclass(UsageError, ValueError)


@pytest.mark.parametrize(
    "target",
    ["call", "tcp:1", "tcp:65535", "tcp:db:5432", "tcp:[::1]:80", "http://x", "https://x:1/y?z", "exec:true", "exec:a\nb"],
)
def test_good_probes(target: str) -> None:
    """The four kinds."""
    assert check_probe(target) == target


@pytest.mark.parametrize(
    "target",
    [
        "",
        "tcp:",
        "tcp:0",
        "tcp:65536",
        "tcp:x",
        "tcp:x:",
        "tcp:a b:1",
        "http:x",
        "ftp://x",
        "http://",
        "exec:",
        "exec: ",
        "Call",
        None,
        80,
    ],
)
def test_bad_probes(target: object) -> None:
    """Everything else is refused, and the message says what is allowed."""
    with pytest.raises(UsageError, match=r"bad probe .*: use tcp:PORT"):
        check_probe(target)
