"""The example application: it counts, and every number it prints is durable on two hosts."""

from __future__ import annotations

from etcdreplica import Replica, protected
from etcdreplica.errors import NotDurableError


@protected(style="warm", degree=2)
def main(replica: Replica) -> None:
    """Count once a second."""
    state = replica.restore(default={"count": 0})
    print(f"{replica.host} begins at {state['count']}, epoch {replica.epoch}")  # noqa: T201
    while not replica.wait(1.0):
        state["count"] += 1
        try:
            replica.checkpoint(state, wait=True)
        except NotDurableError as error:  # a host is lost: it counts on, and says that one more loss would be too much
            print(error)  # noqa: T201
        print(f"{state['count']} by {replica.host}")  # noqa: T201


if __name__ == "__main__":
    main()
