"""`jaxserve serve` with a `node_rank` above 0: no HTTP, but an engine process for the leader on another host."""

from __future__ import annotations

import asyncio
import signal

from jaxserve.config import Config


def follow(config: Config) -> None:
    """Follow until the leader ends, or a signal comes."""
    asyncio.run(_follow(config))


async def _follow(config: Config) -> None:
    from jaxserve.engine.hosts.follower import Follower

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await Follower(config).run()
    except asyncio.CancelledError:
        return  # the signal
