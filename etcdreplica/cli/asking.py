"""What the verbs share that ask the managers for something: who asks, and how to follow what comes of it."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from etcdreplica.cli.show import no_application, read_view

if TYPE_CHECKING:
    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.store import Store


def me() -> str:
    """Who asks, for others to read."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


async def follow_view(store: Store) -> AsyncGenerator[ClusterView, None]:
    """Yield the whole cluster, now and after each change; close it (`contextlib.aclosing`) when leaving early."""
    from etcdreplica.core.view import ClusterView
    from etcdreplica.daemon.understudy import take

    view = ClusterView()
    async with contextlib.aclosing(store.follow()) as batches:
        async for batch in batches:
            take(view, batch)
            yield view


def registered(view: ClusterView, name: str) -> AppView:
    """Return an application. Raises EtcdReplicaError if it is not registered."""
    app = view.apps.get(name)
    if app is None or app.registration is None:
        raise no_application([name], sorted(other for other, known in view.apps.items() if known.registration))
    return app


async def tell_who_leads(store: Store) -> str:
    """Say of the managers which one should have done something."""
    _, leaders = await read_view(store)
    leader = leaders["manager"]
    return f"the one on {leader} leads" if leader else "none leads: is one running on any host?"
