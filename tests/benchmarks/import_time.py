"""How much `import etcdreplica` costs over a bare interpreter, as one JSON object. `python tests/benchmarks/import_time.py`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 31
USE = "from etcdreplica import protected\n@protected(style='warm', degree=3)\ndef main(replica): ..."


def milliseconds(code: str) -> float:
    """Run an interpreter with this code, from start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure in turn, so that a change of the machine's speed meets both."""
    pairs = [(milliseconds("pass"), milliseconds(USE)) for _ in range(ROUNDS)]
    bare, used = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        json.dumps({"bare_ms": round(bare, 1), "import_and_decorate_ms": round(used, 1), "over_bare_ms": round(used - bare, 1)})
    )


if __name__ == "__main__":
    main()
