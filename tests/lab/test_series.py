"""A random series of faults; `LAB_MINUTES=60` makes it long, `LAB_SEED=` repeats one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.lab.series import Series, new_seed, out_directory
from tests.lab.world import World

pytestmark = pytest.mark.lab
SECONDS = 60 * float(os.environ.get("LAB_MINUTES", "0")) or 15.0
KINDS = tuple(filter(None, os.environ.get("LAB_KINDS", "").split(",")))


@pytest.mark.timeout(SECONDS + 600)
def test_random_faults(tmp_path: Path, rooted: None) -> None:
    """Whatever happens, and in whatever order: the guarantees hold."""
    seed = new_seed()
    out = out_directory(Path(os.environ.get("LAB_OUT") or tmp_path), seed)
    print(f"LAB_SEED={seed}, everything about it in {out}", file=sys.__stderr__, flush=True)
    with World(out) as world:
        world.start_applications(("warm", "cold") if SECONDS < 60 else ("cold", "warm", "hot"))
        report = Series(world, seed, SECONDS, KINDS).run()
    print(report.text(), file=sys.__stderr__, flush=True)
    assert not report.violations, f"LAB_SEED={seed}; see {out}/timeline.txt:\n" + "\n".join(report.violations[:20])
