"""The sockets between leader and followers: addresses resolved, ports found, errors in the user's words."""

from __future__ import annotations

import socket

import zmq
import zmq.asyncio

from jaxserve.config_parallel import join_address, parse_address
from jaxserve.errors import ConfigError


def bind_leader(context: zmq.asyncio.Context, address: str) -> zmq.asyncio.Socket:
    """Rank 0's socket at `dist_init_addr`; `ConfigError` where this host cannot listen there."""
    host = resolve(address)
    router = _socket(context, zmq.ROUTER, host)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a follower that connects again is the same follower
    try:
        router.bind(f"tcp://{join_address(host, parse_address(address)[1])}")
    except zmq.ZMQError as error:
        router.close()
        raise ConfigError(
            f"rank 0 cannot listen at dist_init_addr {address}: {error.strerror}; it must be an address of this host "
            "with a free port"
        ) from None
    return router


def connect_follower(context: zmq.asyncio.Context, address: str, identity: bytes) -> zmq.asyncio.Socket:
    """A follower's socket to `dist_init_addr`; it keeps trying to connect by itself."""
    host = resolve(address)
    dealer = _socket(context, zmq.DEALER, host)
    dealer.setsockopt(zmq.IDENTITY, identity)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    dealer.connect(f"tcp://{join_address(host, parse_address(address)[1])}")
    return dealer


def resolve(address: str) -> str:
    """The numeric host of "host:port"; `ConfigError` where the name is unknown."""
    host, port = parse_address(address)
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        raise ConfigError(f"dist_init_addr {address}: {host!r} cannot be resolved: {error.strerror}") from None


def free_port(host: str) -> int:
    """A port of this host that nobody listens at now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _socket(context: zmq.asyncio.Context, kind: int, host: str) -> zmq.asyncio.Socket:
    made = context.socket(kind)
    made.setsockopt(zmq.IPV6, int(":" in host))
    made.setsockopt(zmq.LINGER, 500)  # for the last messages to leave
    made.setsockopt(zmq.SNDHWM, 0)
    return made
