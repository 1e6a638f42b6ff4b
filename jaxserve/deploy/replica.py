"""`EngineReplica`: one engine as a replica of a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ray import serve

from jaxserve.config import Config
from jaxserve.deploy import wire
from jaxserve.deploy.logs import set_up_logging
from jaxserve.deploy.request_router import NUM_BLOCKS
from jaxserve.engine.client import EngineState
from jaxserve.engine.process_client import ProcessEngineClient
from jaxserve.engine.wire import WireError
from jaxserve.errors import EngineDeadError, JaxserveError


class EngineReplica:
    """Owns an engine process. Serve makes it, checks it, and sends it requests; it is ready when `__init__` returns."""

    async def __init__(self, config_json: str, core: str) -> None:
        config = Config.model_validate_json(config_json)
        set_up_logging(config.server.log_level)
        self._name = serve.get_replica_context().replica_tag
        self._engine = ProcessEngineClient(config, core=core)
        await self._engine.start()

    async def generate(self, request: bytes, *, hashes: bytes, avoid: list[str]) -> AsyncIterator[bytes]:
        """Answer a `wire.Generate` with messages; `hashes` and `avoid` are the router's."""
        order = wire.decode_generate(request)
        yield wire.encode(wire.Accepted(self._name))
        outputs = self._engine.generate(
            order.prompt_token_ids,
            order.params,
            request_id=order.request_id,
            priority=order.priority,
            cache_salt=order.cache_salt,
        )
        try:
            async with aclosing(outputs):  # pyright: ignore[reportArgumentType] - it is a generator
                async for output in outputs:
                    yield wire.encode(wire.Output.of(output))
        except JaxserveError as error:
            yield wire.encode(wire.Failed(WireError.of(error)))

    async def core_info(self) -> bytes:
        """What the engine says of itself."""
        return wire.encode(self._engine.core_info)

    def metrics(self) -> tuple[str, bytes]:
        """The replica's name, and its metrics as text; called from Serve's own thread."""
        return self._name, self._engine.metrics.render()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Tell every router, once, how much the prefix cache may hold; called by Serve."""
        return {NUM_BLOCKS: self._engine.core_info.num_blocks}

    def check_health(self) -> None:
        """Raise when this replica should be replaced; called by Serve. An engine that restarts need not be."""
        health = self._engine.health
        if health.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {health.detail}")

    async def __del__(self) -> None:
        """End the engine; called by Serve when no request is left, or has to be waited for."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.shutdown()
