"""`ApiServer`: the HTTP app as the ingress of a Ray Serve application, in front of the engines' deployment."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.schema import ApplicationStatus
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.app import create_app
from api.state import ServerState
from jaxserve.config import Config
from jaxserve.deploy import wire
from jaxserve.deploy.client import ReplicasClient
from jaxserve.deploy.logs import set_up_logging
from jaxserve.deploy.metrics import ReplicasMetrics
from jaxserve.engine.client import EngineHealth, EngineState
from jaxserve.engine.preparation import load_tokenizer
from jaxserve.tokenizer.chat_template import ChatTemplate

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

ENGINES, API_SERVERS = "Engine", "ApiServer"  # deployments
WATCH_PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class ApiServer:
    """Serve makes it; it is ready when an engine is. Wrapped by `serve.ingress`."""

    async def __init__(self, engines: DeploymentHandle[Any], config_json: str, api_keys: list[str]) -> None:
        config = Config.model_validate_json(config_json).with_values(api_key=tuple(api_keys))
        set_up_logging(config.server.log_level)
        self._name = serve.get_replica_context().replica_tag
        self._app_name = serve.get_replica_context().app_name
        own = serve.get_deployment_handle(API_SERVERS, self._app_name)
        self._metrics = ReplicasMetrics(own, prefix=config.server.metrics_prefix)
        tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
        path = config.model.chat_template
        template = ChatTemplate.of_tokenizer(tokenizer, path=None if path is None else Path(path))
        info = wire.decode_core_info(await engines.core_info.remote())
        self._client = ReplicasClient(config, engines, tokenizer, info, self._metrics)
        self._app = create_app(self._client, config.server, metrics=self._metrics, chat_template=template)
        self._watching = asyncio.ensure_future(self._watch())

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Give Serve the app."""
        return without_request_id(self._app)

    async def metrics(self) -> tuple[str, bytes]:
        """This process's name, and its own metrics as text."""
        return self._name, self._metrics.render()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and let the running ones end; see `ServerState.drain`."""
        state: ServerState = self._app.state.server
        await state.drain(timeout_s)

    async def _watch(self) -> None:
        while True:
            try:
                self._client.health = await asyncio.to_thread(replicas_health, self._app_name)
            except Exception:
                logger.warning("cannot ask Serve for the replicas' health", exc_info=True)
            await asyncio.sleep(WATCH_PERIOD_S)


def without_request_id(app: ASGIApp) -> ASGIApp:
    """The app without `x-request-id` in its replies: Serve's proxy gives requests one and puts it into the replies."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await app(scope, receive, send_without_id)

    return wrapped


def replicas_health(app_name: str) -> EngineHealth:
    """The engines' health as one: READY while any of them is."""
    app = serve.status().applications.get(app_name)
    if app is None or app.status is ApplicationStatus.DELETING:
        return EngineHealth(state=EngineState.DRAINING, detail="the application is being deleted")
    engines = app.deployments.get(ENGINES)
    counts = {state.lower(): count for state, count in engines.replica_states.items()} if engines is not None else {}
    detail = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no engine yet"
    return EngineHealth(
        state=EngineState.READY if counts.get("running") else EngineState.RESTARTING, detail=f"engines: {detail}"
    )
