"""`RayWorkers`: has Ray run the followers, one a host, in a placement group that this process's host belongs to."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

from jaxserve.config import Config
from jaxserve.config_parallel import join_address
from jaxserve.config_paths import with_absolute_paths
from jaxserve.engine.hosts.sockets import free_port
from jaxserve.errors import ConfigError, JaxserveError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 5.0
END_TIMEOUT_S = 5.0  # for the followers to end by themselves, after the leader's goodbye


class RayFollower:
    """A Ray actor: follows the leader, as `jaxserve serve` with a `node_rank` does. If it dies Ray starts it again."""

    async def follow(self, config_json: str) -> None:
        """Run until the leader says goodbye; raises what ends it before."""
        from jaxserve.engine.hosts.follower import Follower

        config = Config.model_validate_json(config_json)
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("jaxserve").setLevel(config.server.log_level.upper())
        await Follower(config).run()


class RayWorkers:
    """The followers of one server. `start`, then `run_beside`, then `stop`.

    # bundle 0   this host: reserved for rank 0's engine process, which is this process's child
    # bundle r   another host each (STRICT_SPREAD): a `RayFollower` of rank r
    """

    def __init__(self, config: Config) -> None:
        self.config = config  # after `start` with the address at which this host leads
        self._ray: Any = _import_ray()
        self._group: Any = None
        self._followers: list[asyncio.Task[None]] = []

    async def start(self) -> RayWorkers:
        """Reserve the hosts and start the followers; raises `ConfigError` where that cannot be."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._reserve)
            self._place()
        except BaseException:
            await self.stop()
            raise
        return self

    async def run_beside(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled when a follower gives up meanwhile: its error comes through."""
        working = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({working, *self._followers}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
        if working in done:
            return await working
        for follower in done:
            await follower
        raise JaxserveError("a follower ended while the group started")

    async def stop(self) -> None:
        """Wait a little for the followers to end, then give the hosts back. May be called twice."""
        if self._followers:
            await asyncio.wait(self._followers, timeout=END_TIMEOUT_S)
            for follower in self._followers:
                follower.cancel()
            self._followers = []
        await asyncio.get_running_loop().run_in_executor(None, self._release)

    def _reserve(self) -> None:
        """Connect to the cluster and take the hosts; `ConfigError` where there is none, or where they are too few."""
        ray, parallel = self._ray, self.config.parallel
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            _check_answers(address)
            ray.init(address=address, log_to_driver=True, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"no Ray cluster to run on: {reason}; start one with 'ray start', or name it in RAY_ADDRESS"
            ) from error
        host = ray.util.get_node_ip_address()
        if parallel.dist_init_addr is None:
            self.config = self.config.with_values(dist_init_addr=join_address(host, free_port(host)))
        bundle = self._bundle()
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._group = ray.util.placement_group(
            [bundle] * parallel.nnodes,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[here, *({} for _ in range(1, parallel.nnodes))],
        )
        if not self._group.wait(parallel.dist_timeout_s):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            fitting = [node for node in nodes if all(node.get(name, 0) >= count for name, count in bundle.items())]
            raise ConfigError(
                f"nnodes is {parallel.nnodes}, each with {_text_of(bundle)}, this host among them, but Ray could "
                f"not reserve them in {parallel.dist_timeout_s:g} s: {len(fitting)} of its {len(nodes)} hosts have that"
            )

    def _bundle(self) -> dict[str, float]:
        """What a host must have free: a CPU, and its share of the accelerators."""
        parallel, device = self.config.parallel, self.config.runtime.device
        offered = self._ray.cluster_resources()
        kind = {"cuda": "GPU", "tpu": "TPU"}.get(device)
        if device == "auto":
            kind = next((kind for kind in ("GPU", "TPU") if kind in offered), None)
        return {"CPU": 1} if kind is None else {"CPU": 1, kind: parallel.num_devices // parallel.nnodes}

    def _place(self) -> None:
        """Start the followers, each in its bundle. Ray starts one again whose process or host dies."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        bundle = self._bundle()
        accelerators = {name: count for name, count in bundle.items() if name not in ("CPU", "GPU")}
        actor = self._ray.remote(RayFollower)
        for rank in range(1, self.config.parallel.nnodes):
            config = follower_config(self.config, rank)
            worker = actor.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                resources=accelerators,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                ),
            ).remote()
            followed = worker.follow.remote(config.model_dump_json())
            self._followers.append(asyncio.create_task(self._wait_for(rank, worker, followed), name=f"ray-{rank}"))

    async def _wait_for(self, rank: int, worker: Any, followed: Any) -> None:
        """Keep the actor, by holding it, until it has followed to the end; its error becomes ours."""
        try:
            await followed
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, JaxserveError):
                raise type(error.cause)(f"node rank {rank}: {error.cause}") from error
            raise JaxserveError(f"node rank {rank} broke down: {error.cause!r}") from error
        except self._ray.exceptions.RayError as error:
            raise JaxserveError(f"Ray gave node rank {rank} up: {next(iter(str(error).splitlines()), '')}") from error
        logger.info("node rank %d has ended", rank)

    def _release(self) -> None:
        if self._ray.is_initialized():
            if self._group is not None:
                self._ray.util.remove_placement_group(self._group)  # kills the actors in it
                self._group = None
            self._ray.shutdown()


def follower_config(config: Config, rank: int) -> Config:
    """Rank 0's config as another rank's: which one it is, and that nobody has to place anything any more."""
    return with_absolute_paths(config).with_values(node_rank=rank, distributed_executor_backend="mp", api_key=())


def _import_ray() -> Any:
    try:
        ray = importlib.import_module("ray")  # an extra: the type checker need not have it
    except ImportError as error:
        raise ConfigError(
            "distributed_executor_backend is 'ray', but Ray is not installed: pip install 'jaxserve[ray]'"
        ) from error
    return ray


def _check_answers(address: str) -> None:
    """Raise `ConnectionError` where nobody listens at "host:port": Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():
        return  # "auto", or a scheme of Ray's own
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers at {address} ({error.strerror or error})") from error


def _text_of(bundle: dict[str, float]) -> str:
    return " and ".join(f"{count:g} {name}" for name, count in bundle.items())
