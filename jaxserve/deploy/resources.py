"""`replica_resources`: what an engine asks Ray for, and whether a cluster could ever hold so many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.config import Config
from jaxserve.errors import ConfigError

_DEVICE_RESOURCES = {"cuda": "GPU", "tpu": "TPU"}


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """Ray resources by name, such as {"CPU": 1, "GPU": 4}; a replica lives on one node."""

    amounts: dict[str, float]

    def as_actor_options(self) -> dict[str, Any]:
        """In the words of `ray_actor_options`."""
        rest = {name: amount for name, amount in self.amounts.items() if name not in ("CPU", "GPU")}
        return {"num_cpus": self.amounts.get("CPU", 0), "num_gpus": self.amounts.get("GPU", 0), "resources": rest}

    def most_on(self, node: Mapping[str, float]) -> float:
        """Replicas that fit a node of these resources.

        >>> ReplicaResources({"CPU": 0.5, "GPU": 4.0}).most_on({"CPU": 16, "GPU": 8})
        2.0
        """
        return min((node.get(name, 0) // amount for name, amount in self.amounts.items()), default=float("inf"))

    def __str__(self) -> str:
        return ", ".join(f"{amount:g} {name}" for name, amount in self.amounts.items()) or "nothing"


def replica_resources(config: Config) -> ReplicaResources:
    """What the config says, or the devices of its mesh; raises `ConfigError` where neither does, or no node has it."""
    if config.parallel.nnodes > 1:
        raise ConfigError(
            f"nnodes is {config.parallel.nnodes}, but each engine of a deployment runs on one host: leave out nnodes "
            "and distributed_executor_backend, or run one engine on several hosts with 'jaxserve serve'"
        )
    given = config.deploy.replica_resources
    if given is not None:
        wrong = {name: amount for name, amount in given.items() if not amount > 0}
        if wrong:
            raise ConfigError(f"replica_resources must be greater than 0, got {wrong}; leave out what is not needed")
        return ReplicaResources(dict(given))
    device = config.runtime.device
    if device == "auto":
        raise ConfigError(
            "deploy must know what an engine runs on, to ask Ray for it: set device to cpu, cuda or tpu, "
            'or replica_resources, such as {"CPU": 1, "GPU": 1}'
        )
    amounts = {"CPU": 1.0}
    if device in _DEVICE_RESOURCES:
        parallel = config.parallel
        amounts[_DEVICE_RESOURCES[device]] = float(parallel.tensor_parallel_size * parallel.data_parallel_size)
    return ReplicaResources(amounts)


def check_they_fit(config: Config, nodes: Iterable[Mapping[str, float]]) -> None:
    """Raise `ConfigError` unless the engines that are started fit the cluster's nodes, one node each."""
    resources, wanted = replica_resources(config), config.deploy.first_replicas
    nodes = list(nodes)
    room = sum(resources.most_on(node) for node in nodes)
    if room >= wanted:
        return
    there = " + ".join(
        str(ReplicaResources({name: node[name] for name in resources.amounts if name in node})) for node in nodes
    )
    raise ConfigError(
        f"{wanted} replicas of {resources} each do not fit: {room:g} do, of the cluster's {there or 'no nodes'}; lower "
        "num_replicas or replica_resources, or add nodes"
    )
