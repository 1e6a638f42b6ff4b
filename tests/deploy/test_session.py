"""What `jaxserve deploy` makes of a cluster that does not answer, without one."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs the extra 'ray'", exc_type=ImportError)

from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from jaxserve.config import config_from_values
from jaxserve.deploy.session import Session

GONE = DeploymentUnavailableError(DeploymentID("ApiServer", "jaxserve"))


class ApiServers:
    """Their handle, and its answer."""

    def __init__(self, refusal: Exception | None, results: list[Any] | Exception) -> None:
        self._refusal, self._results = refusal, results

    def broadcast(self, method: str, timeout_s: float) -> ApiServers:
        """As Serve's."""
        assert method == "drain"
        if self._refusal is not None:
            raise self._refusal
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        """As Serve's."""
        if isinstance(self._results, Exception):
            raise self._results
        return self._results


@pytest.mark.parametrize(
    ("servers", "num_warnings"),
    [
        (ApiServers(None, [None, None]), 0),
        (ApiServers(None, [None, ActorDiedError()]), 1),
        (ApiServers(None, TimeoutError("no answer")), 1),
        (ApiServers(GONE, []), 1),
    ],
)
def test_api_servers_that_cannot_be_drained_are_named_and_do_not_keep_the_rest_from_ending(
    servers, num_warnings, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *_: servers)
    Session(config_from_values({"model": str(tmp_path), "device": "cpu"})).drain()
    assert caplog.text.count("an API server was not drained: ") == num_warnings
