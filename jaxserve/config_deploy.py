"""`DeploySettings`: how many engines `jaxserve deploy` runs, where, and how requests find one of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from jaxserve.config_values import Settings, parse_object
from jaxserve.errors import ConfigError

_NUM_SEQS_UNLESS_KNOWN = 128  # where max_num_seqs is the device's
# A Ray actor runs 1000 calls at once, and Serve gives one with more requests no more than these: then its health checks
# wait with the rest, and a replica that is full is taken for dead. The rest is for such calls.
MOST_ONGOING = 900


class DeploySettings(Settings):
    """Replicas: several engines behind one address."""

    num_replicas: int | None = Field(default=None, ge=1, description="Engines to run, or to begin with. [1]")
    min_replicas: int | None = Field(default=None, ge=1, description="Fewest engines when load is low. [num_replicas]")
    max_replicas: int | None = Field(default=None, ge=1, description="Most engines when load is high. [no autoscaling]")
    target_ongoing_requests: float | None = Field(
        default=None, gt=0, description="Running and queued requests an engine that autoscaling aims at. [max_num_seqs]"
    )
    max_ongoing_requests: int | None = Field(
        default=None,
        ge=1,
        le=MOST_ONGOING,
        description=f"Requests sent to an engine at once; others wait. [2 x max_num_seqs, at most {MOST_ONGOING}]",
    )
    upscale_delay_s: float = Field(default=10.0, ge=0, description="Seconds of high load before an engine is added.")
    downscale_delay_s: float = Field(default=300.0, ge=0, description="Seconds of low load before one is taken away.")
    max_load_difference: int | None = Field(
        default=None, ge=0, description="Requests that a cached prefix may cost over the least load. [max_num_seqs / 2]"
    )
    max_num_retries: int = Field(
        default=2, ge=0, description="Times a request whose engine died before its first token is sent to another."
    )
    health_check_period_s: float = Field(default=5.0, gt=0, description="Seconds between an engine's health checks.")
    health_check_timeout_s: float = Field(default=30.0, gt=0, description="Seconds an engine has to answer one.")
    num_api_servers: int = Field(default=1, ge=1, description="Processes that tokenise, route and stream.")
    ray_address: str | None = Field(
        default=None, min_length=1, description="Ray cluster to run on, host:port or auto. [one on this machine]"
    )
    wait_for_nodes_s: float = Field(
        default=0.0, ge=0, description="Seconds that nodes of ray_address have to join, until all engines fit."
    )
    replica_resources: Annotated[dict[str, float] | None, BeforeValidator(parse_object)] = Field(
        default=None, description='Ray resources an engine takes, such as {"CPU": 2, "GPU": 4}. [its devices]'
    )

    @model_validator(mode="after")
    def _check(self) -> DeploySettings:
        """Check what fields say together; raises `ConfigError`."""
        if self.max_replicas is None and self.min_replicas is not None:
            raise ConfigError(
                "min_replicas is for autoscaling and needs max_replicas; for a fixed number give num_replicas"
            )
        if self.max_replicas is not None and not self.fewest_replicas <= self.first_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas ({self.fewest_replicas}), num_replicas ({self.first_replicas}) and max_replicas "
                f"({self.max_replicas}) must not fall"
            )
        return self

    @property
    def first_replicas(self) -> int:
        """Engines that are started."""
        return self.num_replicas or self.min_replicas or 1

    @property
    def fewest_replicas(self) -> int:
        """Engines that run at any time."""
        return self.min_replicas or self.first_replicas

    def load_difference(self, max_num_seqs: int | None) -> int:
        """Requests that an engine may have more than the least loaded and still get those whose prefix it has."""
        if self.max_load_difference is not None:
            return self.max_load_difference
        return (max_num_seqs or _NUM_SEQS_UNLESS_KNOWN) // 2

    def ongoing_limit(self, max_num_seqs: int | None) -> int:
        """Requests that an engine is sent at once: what it runs, and as many waiting, so that it never idles."""
        return self.max_ongoing_requests or min(2 * (max_num_seqs or _NUM_SEQS_UNLESS_KNOWN), MOST_ONGOING)

    def ongoing_target(self, max_num_seqs: int | None) -> float:
        """Requests an engine that autoscaling aims at."""
        if self.target_ongoing_requests is not None:
            return self.target_ongoing_requests
        limit = self.ongoing_limit(max_num_seqs)
        return min(max_num_seqs, limit) if max_num_seqs is not None else limit / 2
