"""What all checks of `doctor` share: what they look at, and what they say."""

from __future__ import annotations

import enum
from typing import Any

from attrs import evolve, frozen

from etcdreplica.daemon.settings import NodeSettings


class Verdict(enum.StrEnum):
    """What a check comes to."""

    OK = "ok"
    WARNING = "warning"  # it works, but not as well as it should, or not for long
    FAILED = "failed"
    NOT_CHECKED = "not checked"


@frozen
class Finding:
    """What one check has found, and what the person can do."""

    verdict: Verdict
    what: str
    advice: str = ""
    check: str = ""

    def of(self, check: str) -> Finding:
        """Return it under the name of its check."""
        return evolve(self, check=check)

    @property
    def shown(self) -> dict[str, Any]:
        """As JSON or YAML has it."""
        return {"check": self.check, "verdict": str(self.verdict), "what": self.what, "advice": self.advice}


@frozen
class Subject:
    """What is looked at: this host, with the settings of its node."""

    settings: NodeSettings


def ok(what: str) -> Finding:
    """All is well."""
    return Finding(Verdict.OK, what)


def warning(what: str, advice: str) -> Finding:
    """It works, but should be better."""
    return Finding(Verdict.WARNING, what, advice)


def failed(what: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(Verdict.FAILED, what, advice)


def not_checked(why: str) -> Finding:
    """It could not be looked at."""
    return Finding(Verdict.NOT_CHECKED, why)
