"""Whether a busy machine makes fast fail-over lose a host that lives, as one JSON object; exit code 1 if it does.

`python tests/benchmarks/calm.py [SECONDS [SPINNERS]]`: three hosts, one application of failover="fast" on all of them, and
processes that spin, by default two for each core, each in a session of its own so that the scheduler weighs it like a daemon.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from etcdreplica.testing import LocalCluster
from etcdreplica.testing.probe import Probe

TTL_S = 5.0
WARM_UP_S = 3.0


def main() -> int:
    """Wait, and count what was lost meanwhile."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    spinners = int(sys.argv[2]) if len(sys.argv) > 2 else 2 * (os.cpu_count() or 1)
    with LocalCluster(3, lease_ttl_s=TTL_S) as cluster, Probe(cluster, "calm", "warm", 3, "fast") as probe:
        probe.start()
        time.sleep(WARM_UP_S)
        command = [sys.executable, "-S", "-c", "while True: pass"]
        spinning = [subprocess.Popen(command, start_new_session=True) for _ in range(spinners)]
        try:
            time.sleep(seconds)
        finally:
            for process in spinning:
                process.kill()
                process.wait()
        reasons = [event.failure.reason for event in cluster.events.values()]
        lost = sum(host.log_path.read_text().count("is lost: it answered none") for host in cluster.hosts.values())
    print(json.dumps({"seconds": seconds, "spinners": spinners, "cpus": os.cpu_count(), "lost": lost, "failures": reasons}))
    return 1 if lost or reasons else 0


if __name__ == "__main__":
    sys.exit(main())
