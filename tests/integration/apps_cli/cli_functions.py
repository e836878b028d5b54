"""Functions for `etcdreplica start MODULE:FUNCTION`."""

from __future__ import annotations

import asyncio
import os

from etcdreplica import Replica, protected

NOT_CALLABLE = 1


def plain(replica: Replica) -> None:
    """Run until asked to stop; not decorated."""
    replica.wait()


async def plain_async(replica: Replica) -> None:
    """Do the same in a loop."""
    await asyncio.to_thread(replica.wait)


@protected(style="hot", degree=2, name=os.environ.get("CLI_TEST_NAME", "unnamed"))
def decorated(replica: Replica) -> None:
    """Run until asked to stop; brings its own style."""
    replica.wait()


@protected(style="cold", degree=2, name=os.environ.get("CLI_TEST_NAME", "unnamed"))
async def decorated_async(replica: Replica) -> None:
    """Do the same in a loop."""
    await asyncio.to_thread(replica.wait)


def returns() -> str:
    """Return at once, without a handle."""
    print("the body ran")
    return "done"


def raises() -> None:
    """Raise at once."""
    raise ValueError("no luck today")


class Nested:
    """Holds a function."""

    @staticmethod
    def plain(replica: Replica) -> None:
        """Run until asked to stop."""
        replica.wait()
