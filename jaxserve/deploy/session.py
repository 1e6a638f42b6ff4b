"""`Session`: a deployment from start to end: the Ray cluster, the application, the draining."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ProxyStatus

from jaxserve import errors
from jaxserve.config import Config
from jaxserve.config_paths import with_absolute_paths
from jaxserve.deploy.api_server import API_SERVERS, replicas_health
from jaxserve.deploy.application import APP_NAME, make_application
from jaxserve.deploy.logs import SERVE_LOGGING
from jaxserve.deploy.resources import check_they_fit
from jaxserve.engine.process import DEFAULT_CORE
from jaxserve.errors import ConfigError, JaxserveError

OBJECT_STORE_BYTES = 128 * 1024**2  # of a cluster of our own; requests and answers are small and pass by it
_HEAD = "node:__internal_head__"  # the head node's own resource
_POLL_S = 0.3
_END_AT_ONCE_S = 5.0
_PROXY_TIMEOUT_S = 120.0
_DRAIN_GRACE_S = 10.0  # on top of what the API servers need
_USER_ERRORS = ("ConfigError", "CheckpointError", "TokenizerError")
_USER_ERROR = re.compile(rf"jaxserve\.errors\.({'|'.join(_USER_ERRORS)}): (.+)")

logger = logging.getLogger(__name__)


class Session:
    """Owns the application, and the Ray cluster where `ray_address` names none. Use it in the main thread.

    `connect`, `start`, `drain`, `close`; each may be left by a KeyboardInterrupt, after which `close` cleans up.
    """

    def __init__(self, config: Config, *, core: str = DEFAULT_CORE) -> None:
        self._config = with_absolute_paths(config)
        self._core = core
        self._is_deployed = False
        self._said = ""

    def connect(self) -> None:
        """Join the cluster, or start one that this machine alone can reach; raises `ConfigError`."""
        address = self._config.deploy.ray_address
        # Every process's log, tracebacks of each try included, would drown ours.
        options: dict[str, Any] = {
            "log_to_driver": self._config.server.log_level == "debug",
            "logging_level": logging.WARNING,
        }
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            if address is None:
                ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)
            else:
                ray.init(address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            doing = "start a Ray cluster" if address is None else f"join the Ray cluster at ray_address {address!r}"
            raise ConfigError(f"cannot {doing}: {reason}") from None

    @property
    def is_on_the_head_node(self) -> bool:
        """Whether the address to serve at will be this machine's."""
        here = ray.get_runtime_context().get_node_id()
        return any(node["NodeID"] == here and _HEAD in node["Resources"] for node in ray.nodes())

    def start(self, port: int, on_progress: Callable[[str], None]) -> None:
        """Deploy and wait until engines answer; raises `ConfigError` and other errors that say why they do not."""
        server = self._config.server
        self._wait_for_nodes(on_progress)
        application = make_application(self._config, core=self._core)
        if serve.status().proxies:
            raise ConfigError(
                "Ray Serve runs on this cluster already, at an address of its own; end it first ('serve shutdown')"
            )
        self._is_deployed = True
        try:
            _start_serve(server.host, port)
        except (RayError, TimeoutError) as error:  # of a proxy, which Serve replaces by itself
            logger.warning("Ray Serve's proxy is slow to start: %s", _first_line(error))
            _start_serve(server.host, port)  # joins what runs
        serve.run_many(
            [serve.RunTarget(application, APP_NAME, server.root_path or "/", SERVE_LOGGING)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        while (app := serve.status().applications[APP_NAME]).status is not ApplicationStatus.RUNNING:
            _check_progress(app)
            self._say_news(on_progress)
            time.sleep(_POLL_S)
        deadline_s = time.monotonic() + _PROXY_TIMEOUT_S
        while any(status is not ProxyStatus.HEALTHY for status in serve.status().proxies.values()):
            if time.monotonic() >= deadline_s:
                raise JaxserveError(f"Ray Serve's HTTP proxy is not ready {_PROXY_TIMEOUT_S:.0f} s after the engines")
            time.sleep(_POLL_S)

    def watch(self, on_progress: Callable[[str], None]) -> None:
        """Say how many engines run, if that has changed; raises `JaxserveError` when the cluster is gone."""
        try:
            self._say_news(on_progress)
        except (RayError, RayServeException) as error:
            raise JaxserveError(f"the Ray cluster does not answer any more: {str(error).splitlines()[0]}") from error

    def _say_news(self, on_progress: Callable[[str], None]) -> None:
        if (news := replicas_health(APP_NAME).detail) != self._said:
            self._said = news
            on_progress(news)

    def _wait_for_nodes(self, on_progress: Callable[[str], None]) -> None:
        """Return when the cluster has room; raises `ConfigError` when it still has none at the end of the wait."""
        deadline_s = time.monotonic() + self._config.deploy.wait_for_nodes_s
        said = ""
        while True:
            try:
                return check_they_fit(self._config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            except ConfigError as error:
                if time.monotonic() >= deadline_s:
                    raise
                if str(error) != said:
                    said = str(error)
                    on_progress(f"waiting for nodes: {said}")
                time.sleep(_POLL_S)

    def drain(self) -> None:
        """Refuse new requests, and give the running ones `shutdown_timeout_s` to finish; what fails of it is logged."""
        timeout_s = self._config.server.shutdown_timeout_s
        servers = serve.get_deployment_handle(API_SERVERS, APP_NAME)
        try:
            draining = servers.broadcast("drain", timeout_s)
            results = draining.results(timeout_s=timeout_s + _DRAIN_GRACE_S, return_exceptions=True)
        except (RayError, RayServeException, DeploymentUnavailableError, TimeoutError) as error:
            results = [error]
        for error in results:
            if isinstance(error, BaseException):
                logger.warning("an API server was not drained: %s", _first_line(error))

    def close(self, *, at_once: bool = False) -> None:
        """Take the application away, and the cluster that `connect` started. `at_once` does not wait for requests."""
        if not ray.is_initialized():
            return
        is_ours = self._config.deploy.ray_address is None
        if self._is_deployed and is_ours and not at_once:
            serve.delete(APP_NAME)  # the rest goes down with the cluster
        elif self._is_deployed and not is_ours:
            ending = threading.Thread(target=serve.shutdown, daemon=True)
            ending.start()
            ending.join(_END_AT_ONCE_S if at_once else None)  # Serve goes on by itself
        ray.shutdown()


def _start_serve(host: str, port: int) -> None:
    serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=host, port=port), SERVE_LOGGING)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_progress(app: ApplicationStatusOverview) -> None:
    """Raise where an engine or an API server says that trying again cannot help, or Serve has given up."""
    text = "\n".join([*(deployment.message for deployment in app.deployments.values()), app.message])
    found = _USER_ERROR.search(text)
    if found is not None:
        raise getattr(errors, found[1])(found[2].strip())
    if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise JaxserveError(f"the engines did not start: {lines[-1] if lines else 'Ray Serve does not say why'}")
