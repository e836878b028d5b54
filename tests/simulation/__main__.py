"""`python -m tests.simulation [--seeds N] [--first-seed S]`: play scenarios; of each that fails print the shrunk schedule."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.run import run
from tests.simulation.scenario import scenario
from tests.simulation.shrink import report, shrink


def main() -> int:
    """Play, and say how it went."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--timeline", action="store_true", help="show what happened, also of a run that holds")
    options = parser.parse_args()
    began, simulated_s, failed, faults, promotions, slowest_s = time.process_time(), 0.0, [], 0, 0, 0.0
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        result = run(scenario(seed))
        simulated_s += result.simulated_s
        faults += len(result.scenario.faults)
        promotions += result.promotions
        slowest_s = max(slowest_s, result.healed_s or 0.0)
        if result.violations:
            failed.append(seed)
            print(report(shrink(result)), flush=True)
        elif options.timeline:
            print(report(result))
    spent_s = time.process_time() - began
    print(
        f"{options.seeds} seeds from {options.first_seed}: {len(failed)} failed {failed or ''}\n"
        f"{simulated_s / 60:.0f} simulated minutes in {spent_s / 60:.2f} of the processor's: {simulated_s / spent_s:.0f} to 1\n"
        f"{faults} faults, {promotions} promotions; healed after {slowest_s:.1f} s at the latest"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
