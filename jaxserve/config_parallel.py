"""`ParallelSettings`: how a model is spread over devices, and devices over hosts, under vLLM's and SGLang's names."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Literal

from pydantic import Field

from jaxserve.config_values import Settings
from jaxserve.errors import ConfigError


class ParallelSettings(Settings):
    """How the model is spread over devices and hosts."""

    tensor_parallel_size: int = Field(default=1, ge=1, description="Devices that share every layer.")
    data_parallel_size: int = Field(default=1, ge=1, description="Copies of the model, each with its own requests.")
    nnodes: int = Field(default=1, ge=1, description="Hosts that share the model; each gives as many devices.")
    node_rank: int = Field(default=0, ge=0, description="Which of the hosts this is; 0 leads, and serves HTTP.")
    dist_init_addr: str | None = Field(
        default=None, description="host:port of rank 0, where the others report; the same on every host."
    )
    distributed_executor_backend: Literal["mp", "ray"] = Field(
        default="mp", description="Who starts the other hosts' processes: mp is you, one command a host; ray is Ray."
    )
    dist_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds the hosts wait for each other, at the start and after a failure."
    )
    heartbeat_timeout_s: float = Field(
        default=6.0, ge=1, description="Seconds of silence after which a host counts as dead."
    )
    step_timeout_s: float = Field(
        default=120.0, ge=1, description="Seconds a step on several hosts may take; a longer one counts as hung."
    )

    @property
    def num_devices(self) -> int:
        """Devices of all hosts together."""
        return self.tensor_parallel_size * self.data_parallel_size


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; an IPv6 address stands in brackets. Raises `ConfigError`.

    >>> parse_address("10.0.0.1:5000"), parse_address("[::1]:5000")
    (('10.0.0.1', 5000), ('::1', 5000))
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"dist_init_addr must be host:port of rank 0, such as 10.0.0.1:5000, got {address!r}")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `parse_address`.

    >>> join_address("::1", 5000)
    '[::1]:5000'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_any_address(host: str) -> bool:
    """Whether it stands for all addresses of whatever host listens at it."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return host == "*"


def check_parallel(parallel: ParallelSettings) -> None:
    """Check what the fields say together; raises `ConfigError`."""
    nnodes, rank, by_ray = parallel.nnodes, parallel.node_rank, parallel.distributed_executor_backend == "ray"
    if rank >= nnodes:
        raise ConfigError(f"node_rank is {rank}, but nnodes is {nnodes}: ranks are 0 to {nnodes - 1}")
    if by_ray and rank != 0:
        raise ConfigError(f"node_rank is {rank}: with distributed_executor_backend 'ray' you start rank 0 alone")
    if nnodes == 1:
        if parallel.dist_init_addr is not None or by_ray:
            given = "distributed_executor_backend 'ray'" if by_ray else "dist_init_addr"
            raise ConfigError(f"{given} is for several hosts, but nnodes is 1: give their number in nnodes")
        return
    if parallel.num_devices % nnodes:
        raise ConfigError(
            f"{nnodes} hosts cannot give as many devices each: tensor_parallel_size ({parallel.tensor_parallel_size}) "
            f"times data_parallel_size ({parallel.data_parallel_size}) must be a multiple of nnodes"
        )
    if parallel.dist_init_addr is not None:
        host, _ = parse_address(parallel.dist_init_addr)
        if _is_any_address(host):
            raise ConfigError(
                f"dist_init_addr is {parallel.dist_init_addr}, by which no other host can reach rank 0: give the "
                "address that it has in the network, such as 10.0.0.1:5000"
            )
    elif not by_ray:
        raise ConfigError(f"nnodes is {nnodes}: give dist_init_addr too, host:port of rank 0, the same on every host")
