"""`make_application`: a config as a Ray Serve application of engines and API servers."""

from __future__ import annotations

import warnings
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.deployment import Application

from jaxserve.config import Config, load_config
from jaxserve.config_deploy import DeploySettings
from jaxserve.deploy.api_server import API_SERVERS, ENGINES, ApiServer
from jaxserve.deploy.replica import EngineReplica
from jaxserve.deploy.request_router import PrefixCacheRouter
from jaxserve.deploy.resources import replica_resources
from jaxserve.engine.process import DEFAULT_CORE

APP_NAME = "jaxserve"
_STOP_GRACE_S = 10.0  # for an engine to end after its last request
_QUIET_WAIT_S = 0.5  # between looks at whether a replica that is to stop has become idle
# Autoscaling compares with the target a mean over so long, told so often. Serve's own 30 s and 10 s come on top of the
# delays, which alone should say for how long load has to be high or low.
_LOAD_WINDOW_S, _LOAD_NEWS_S = 2.0, 1.0


def build(args: dict[str, Any]) -> Application:
    """The application as a Serve config file asks for it, by `import_path: jaxserve.deploy.application:build`.

    `args` has `config`, the launch file's path on the cluster's nodes, and any settings, which win over it.
    """
    overrides = dict(args)
    return make_application(load_config(overrides.pop("config", None), overrides))


def make_application(config: Config, *, core: str = DEFAULT_CORE) -> Application:
    """Describe the application; raises `ConfigError`. `core` is the engine core's class as "module:attribute"."""
    deploy = config.deploy
    max_num_seqs = config.scheduler.max_num_seqs
    without_keys = config.model_dump_json(exclude={"server": {"api_key"}})
    stop: dict[str, Any] = {
        "graceful_shutdown_wait_loop_s": _QUIET_WAIT_S,
        "graceful_shutdown_timeout_s": config.server.shutdown_timeout_s + _STOP_GRACE_S,
        "health_check_period_s": deploy.health_check_period_s,
        "health_check_timeout_s": deploy.health_check_timeout_s,
    }
    count: dict[str, Any] = {"num_replicas": deploy.first_replicas}
    if deploy.max_replicas is not None:
        count = {"autoscaling_config": _autoscaling(deploy, deploy.max_replicas, max_num_seqs)}
    engines = serve.deployment(
        name=ENGINES,
        ray_actor_options=replica_resources(config).as_actor_options(),
        max_ongoing_requests=deploy.ongoing_limit(max_num_seqs),
        max_queued_requests=config.scheduler.max_queued_requests,
        request_router_config={
            "request_router_class": f"{PrefixCacheRouter.__module__}:{PrefixCacheRouter.__qualname__}",
            "request_router_kwargs": {"max_load_difference": deploy.load_difference(max_num_seqs)},
        },
        **count,
        **stop,
    )(EngineReplica)
    api_servers = serve.deployment(
        name=API_SERVERS,
        num_replicas=deploy.num_api_servers,
        ray_actor_options={"num_cpus": 0},  # what they take is little beside engines, and must fit any cluster
        max_ongoing_requests=_all_requests(config),
        **stop,
    )(serve.ingress()(ApiServer))
    return api_servers.bind(engines.bind(without_keys, core), without_keys, list(config.server.api_key))


def _autoscaling(deploy: DeploySettings, max_replicas: int, max_num_seqs: int | None) -> AutoscalingConfig:
    with warnings.catch_warnings():
        # metrics_interval_s shall give way to environment variables, which Ray 2.60 does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=deploy.fewest_replicas,
            initial_replicas=deploy.first_replicas,
            max_replicas=max_replicas,
            target_ongoing_requests=deploy.ongoing_target(max_num_seqs),
            upscale_delay_s=deploy.upscale_delay_s,
            downscale_delay_s=deploy.downscale_delay_s,
            look_back_period_s=_LOAD_WINDOW_S,
            metrics_interval_s=_LOAD_NEWS_S,
        )


def _all_requests(config: Config) -> int:
    """More requests than the engines and the queue take: the API, not Serve's proxy, should refuse what is too much."""
    deploy = config.deploy
    engines = (deploy.max_replicas or deploy.first_replicas) * deploy.ongoing_limit(config.scheduler.max_num_seqs)
    return 2 * (engines + config.scheduler.max_queued_requests)
