"""The daemons: asyncio shells around the pure decisions of `core`, each loop observe, plan, execute."""
