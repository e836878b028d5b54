"""A queue of jobs. Each is handed out to one worker at a time, and its result is taken once.

Serve it, from any one host; the others start the same program:

    python job_queue.py --lease 30

Put jobs in, from any process on any host of the cluster:

    from etcdreplica import connect

    with connect("jobs") as jobs:
        jobs.put("invoice-17", {"customer": "ann"})

`worker.py` beside this file does them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from etcdreplica import protected, query, replica, serve, update

RESULTS = 10_000  # that are kept


@dataclass
class Job:
    """What is to be done. `ticket` is that of the newest worker, 0 before the first."""

    payload: Any
    ticket: int = 0
    worker: str = ""
    until: float = 0.0  # the lease's end, by `replica.now()`


@protected(style="hot", degree=3, name="jobs")
class JobQueue:
    """Jobs by their keys: waiting, taken under a lease, or done."""

    waiting: dict[str, Job]  # the oldest first
    taken: dict[str, Job]  # the one whose lease ends next first: all last equally long, and `now` never goes back
    results: dict[str, Any]  # the oldest first

    def __init__(self, lease_s: float = 30.0) -> None:
        self.waiting, self.taken, self.results = {}, {}, {}
        self.lease_s = lease_s
        self.tickets = 0

    @update
    def put(self, key: str, payload: Any) -> bool:
        """Add a job. Return False, and change nothing, if there is one of this key already: so it may be put again."""
        if key in self.waiting or key in self.taken or key in self.results:
            return False
        self.waiting[key] = Job(payload)
        return True

    @update
    def take(self, worker: str) -> dict[str, Any] | None:
        """Hand out the next job, as `key`, `ticket` and `payload`; None if there is none."""
        now = replica.now()
        if self.taken and self.taken[key := next(iter(self.taken))].until <= now:
            job = self.taken.pop(key)
        elif self.waiting:
            job = self.waiting.pop(key := next(iter(self.waiting)))
        else:
            return None
        self.tickets += 1
        self.taken[key] = Job(job.payload, self.tickets, worker, now + self.lease_s)
        return {"key": key, "ticket": self.tickets, "payload": job.payload}

    @update
    def extend(self, key: str, ticket: int) -> bool:
        """Begin the lease anew. Return False if the job is not this worker's any more: it is to stop."""
        if not self._holds(key, ticket):
            return False
        job = self.taken.pop(key)
        self.taken[key] = Job(job.payload, ticket, job.worker, replica.now() + self.lease_s)
        return True

    @update
    def finish(self, key: str, ticket: int, result: Any) -> bool:
        """Take the result of a job. Return False, and drop it, if the job is not this worker's any more."""
        if not self._holds(key, ticket):
            return False
        del self.taken[key]
        self.results[key] = result
        if len(self.results) > RESULTS:
            del self.results[next(iter(self.results))]
        return True

    @query
    def result(self, key: str) -> Any:
        """Return the result of a job, None if there is none."""
        return self.results.get(key)

    @query
    def counts(self) -> dict[str, int]:
        """Return how many jobs there are of each kind."""
        return {"waiting": len(self.waiting), "taken": len(self.taken), "done": len(self.results)}

    def _holds(self, key: str, ticket: int) -> bool:
        return key in self.taken and self.taken[key].ticket == ticket


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lease", type=float, default=30.0, help="seconds after which a job is handed out again")
    serve(JobQueue, parser.parse_args().lease)
