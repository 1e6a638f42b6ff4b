"""What Serve is told of the engines, without a cluster."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve", reason="needs the extra 'ray'", exc_type=ImportError)

from ray._common.ray_constants import DEFAULT_MAX_CONCURRENCY_ASYNC
from ray.serve.deployment import Application

from jaxserve.config import config_from_values
from jaxserve.deploy.application import make_application


@pytest.mark.parametrize(("max_num_seqs", "max_ongoing"), [(64, 128), (450, 900), (1024, 900)])
def test_a_full_engine_has_calls_left_for_its_health_checks(tmp_path, max_num_seqs, max_ongoing):
    settings = {"model": str(tmp_path), "max_num_seqs": max_num_seqs, "device": "cpu", "max_replicas": 2}
    api_servers = make_application(config_from_values(settings))
    engines = api_servers._bound_deployment.init_args[0]
    assert isinstance(engines, Application)
    deployment = engines._bound_deployment
    assert deployment.max_ongoing_requests == max_ongoing < DEFAULT_MAX_CONCURRENCY_ASYNC
    autoscaling = deployment._deployment_config.autoscaling_config
    assert autoscaling is not None and autoscaling.target_ongoing_requests <= max_ongoing
