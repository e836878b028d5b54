"""Does the jobs of `job_queue.py`, on any host of the cluster: `python worker.py NAME`.

Run as many as you like. It can be killed at any time: what it had taken is handed out again when the lease has ended.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from etcdreplica import connect

IDLE_S = 0.1


def do(payload: Any, ticket: int) -> Any:
    """Do one job. Another worker may have begun it before: a side effect elsewhere is to refuse tickets below the newest."""
    time.sleep(payload["seconds"])
    return payload["seconds"]


def main(name: str) -> None:
    """Work until killed."""
    with connect("jobs") as jobs:
        while True:
            job = jobs.take(name)
            if job is None:
                time.sleep(IDLE_S)
                continue
            result = do(job["payload"], job["ticket"])
            is_ours = jobs.finish(job["key"], job["ticket"], result)
            print(job["key"], "is done" if is_ours else "was given to another worker", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
