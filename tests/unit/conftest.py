"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.watchdog_end import SOURCE, WatchDogEnd


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[WatchDogEnd]:
    """Be a WatchDog."""
    end = WatchDogEnd(tmp_path)
    yield end
    end.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Return the application."""
    path = tmp_path / "app.py"
    path.write_text(SOURCE)
    return path
