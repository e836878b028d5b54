"""The figures can be measured. How large they are is for people: a machine that others use as well proves nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.lab.figures import figures
from tests.lab.world import World

pytestmark = [pytest.mark.lab, pytest.mark.skipif(os.environ.get("LAB") == "short", reason="make lab has it")]
TRIALS = int(os.environ.get("LAB_TRIALS", "5"))


def test_figures(tmp_path: Path, rooted: None) -> None:
    """Each kind of fail-over is measured so many times; `LAB_TRIALS` asks for more."""
    with World(tmp_path) as world:
        found = figures(world, TRIALS, max(1, TRIALS // 5))
    for name, figure in found.items():
        print(f"{name:28} p50 {figure['p50']:9.2f} ms, max {figure['max']:9.2f} ms, n {figure['n']}", file=sys.__stderr__)
    assert all(figure["n"] for figure in found.values())
