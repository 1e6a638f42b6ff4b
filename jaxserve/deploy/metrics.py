"""`ReplicasMetrics`: the metrics of all replicas and API servers as one page, each sample with the process it is of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.request_router import ReplicaID

from jaxserve.deploy.running import running_replicas
from jaxserve.metrics import HttpMetrics

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Page = tuple[str, bytes]  # a process's name, and its metrics as text

ENGINES_LABEL, API_SERVERS_LABEL = "replica", "api_server"
COLLECT_TIMEOUT_S = 5.0  # a process that does not answer is left out
_SERVE_NAMESPACE = "serve"  # where Ray Serve's actors have their names

logger = logging.getLogger(__name__)


class ReplicasMetrics:
    """An API server's own metrics, and the way to everybody's."""

    def __init__(self, api_servers: DeploymentHandle[Any], *, prefix: str) -> None:
        self._api_servers = api_servers
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._http = HttpMetrics(self._registry)
        self._sent = Counter(
            f"{prefix}replica_requests", "Requests that a replica took.", ["to"], registry=self._registry
        )
        self._retries = Counter(
            f"{prefix}replica_retries", "Requests sent again: a replica died first.", registry=self._registry
        )
        self._broken = Counter(
            f"{prefix}replica_broken_requests", "Requests that a replica's death cut off.", registry=self._registry
        )

    def observe_http(self, *, handler: str, method: str, status: int, duration_s: float) -> None:
        """Record a reply; `handler` is the route's pattern, never the raw path."""
        self._http.observe(handler=handler, method=method, status=status, duration_s=duration_s)

    def count_sent(self, replica: str) -> None:
        """Count a request that a replica took."""
        self._sent.labels(replica).inc()

    def count_retry(self) -> None:
        """Count a request that is sent to another replica."""
        self._retries.inc()

    def count_broken(self) -> None:
        """Count a request that ended in an error after its first token."""
        self._broken.inc()

    def render(self) -> bytes:
        """This process's own metrics as text."""
        return generate_latest(self._registry)

    async def collect(self) -> bytes:
        """Everybody's, as text; what cannot be reached is logged and left out."""
        engines, api_servers = await asyncio.gather(_pages_of_engines(), self._pages_of_api_servers())
        return await asyncio.to_thread(merge, {ENGINES_LABEL: engines, API_SERVERS_LABEL: api_servers})

    async def _pages_of_api_servers(self) -> list[Page]:
        response = self._api_servers.broadcast("metrics")
        try:
            results = await response.results_async(timeout_s=COLLECT_TIMEOUT_S, return_exceptions=True)
        except Exception:
            logger.warning("no metrics of any %s", API_SERVERS_LABEL, exc_info=True)
            return []
        return _those_that_came(API_SERVERS_LABEL, results)


async def _pages_of_engines() -> list[Page]:
    """Asked as actors: a call of Serve's, a broadcast too, waits in a replica for one of its places for requests."""
    asking = (asyncio.wait_for(_page_of_engine(replica), COLLECT_TIMEOUT_S) for replica in running_replicas())
    return _those_that_came(ENGINES_LABEL, await asyncio.gather(*asking, return_exceptions=True))


async def _page_of_engine(replica: ReplicaID) -> Page:
    actor: Any = await asyncio.to_thread(ray.get_actor, replica.to_full_id_str(), namespace=_SERVE_NAMESPACE)
    return await actor.__ray_call__.remote(_own_page)


def _own_page(_actor: object) -> Page:
    """Run by a replica's actor."""
    replica: Any = serve.get_replica_context().servable_object
    return replica.metrics()


def _those_that_came(label: str, results: Iterable[Page | BaseException]) -> list[Page]:
    pages = []
    for result in results:
        if isinstance(result, BaseException):
            logger.warning("no metrics of a %s: %s", label, str(result) or type(result).__name__)
        else:
            pages.append(result)
    return pages


def merge(pages: Mapping[str, Iterable[tuple[str, bytes]]]) -> bytes:
    """One page of many: `pages` has, by label, names and texts; each sample gets its text's name under that label.

    >>> page = b"# HELP up Up.\\n# TYPE up gauge\\nup 1.0\\n"
    >>> print(merge({"replica": [("a", page), ("b", page)]}).decode(), end="")
    # HELP up Up.
    # TYPE up gauge
    up{replica="a"} 1.0
    up{replica="b"} 1.0
    """
    families: dict[str, Metric] = {}
    for label, named in pages.items():
        for name, text in named:
            for family in text_string_to_metric_families(text.decode()):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples.extend(
                    sample._replace(labels={**sample.labels, label: name}) for sample in family.samples
                )
    registry = CollectorRegistry()
    registry.register(_Ready(families.values()))
    return generate_latest(registry)


class _Ready(Collector):
    """A collector of what is there."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        return self._families
