"""`Follower`: what `jaxserve serve` runs on a host that is not rank 0: it keeps an engine process for the leader."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

import zmq.asyncio

from jaxserve.config import Config
from jaxserve.engine import wire
from jaxserve.engine.child import EngineChild
from jaxserve.engine.hosts import messages
from jaxserve.engine.hosts.facts import facts_of
from jaxserve.engine.hosts.group_child import Pulse
from jaxserve.engine.hosts.session import HostSession
from jaxserve.engine.hosts.sockets import connect_follower
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

REPLICA_CORE = "jaxserve.engine.hosts.replica:ReplicaCore"


class Follower:
    """Joins the leader, starts and ends engine processes as it says, and joins again when it falls silent.

    # unknown -> joined <-> running
    #    ^          `-> the leader is silent, or says goodbye
    #    `--------------------'
    """

    def __init__(self, config: Config, *, core: str = REPLICA_CORE) -> None:
        address = config.parallel.dist_init_addr
        assert address is not None, "the config was checked"
        self._config = config
        self._core = core
        self._address = address
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._child: EngineChild | None = None
        self._pump: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Follow until the leader says goodbye; raises `ConfigError` where it refuses or is not found."""
        facts = asyncio.get_running_loop().run_in_executor(None, facts_of, self._config)
        try:
            while True:
                await self._join(facts)
                if await self._follow():
                    return
                logger.error("the leader at %s was not heard; this host joins again when it is back", self._address)
                await self._end_worker()
        finally:
            await self._leave()

    async def _join(self, facts: asyncio.Future[dict[str, str]]) -> None:
        """Ask until the leader takes this host, under a name of its own each time; wait for it as long as it lives."""
        if self._socket is not None:
            self._socket.close(linger=0)
        self._socket = connect_follower(self._context, self._address, uuid.uuid4().bytes)
        asking = asyncio.create_task(self._ask(facts), name="follower-ask")
        try:
            await self._wait_for_answer(facts)
        finally:
            asking.cancel()
        logger.info("joined the leader at %s as node rank %d", self._address, self._config.parallel.node_rank)

    async def _wait_for_answer(self, facts: asyncio.Future[dict[str, str]]) -> None:
        timeout_s = self._config.parallel.dist_timeout_s
        heard_s = time.monotonic()
        while time.monotonic() - heard_s < timeout_s:
            match await self._receive(min(timeout_s, messages.BEAT_INTERVAL_S)):
                case messages.Wait():
                    heard_s = time.monotonic()
                case messages.Accepted():
                    return
                case messages.Refused(reason):
                    raise ConfigError(f"the leader at {self._address} refuses this host: {reason}")
                case messages.Goodbye(error):
                    raise _goodbye_error(error)
            if facts.done():
                facts.result()
            else:
                heard_s = time.monotonic()  # meanwhile a leader that is not there yet is no error
        raise ConfigError(
            f"no leader answers at dist_init_addr {self._address} after {timeout_s:g} s: start node rank 0 there, or "
            "correct the address"
        )

    async def _ask(self, facts: asyncio.Future[dict[str, str]]) -> None:
        """Join again and again: the leader may be another one by now, which has not heard of this host."""
        rank = self._config.parallel.node_rank
        while not facts.done():
            self._send(messages.Join(rank, None))
            await asyncio.wait({facts}, timeout=messages.JOIN_INTERVAL_S)
        while facts.exception() is None:
            self._send(messages.Join(rank, facts.result()))
            await asyncio.sleep(messages.JOIN_INTERVAL_S)

    async def _follow(self) -> bool:
        """Do what the leader says; True when it said goodbye, False when it fell silent."""
        silence_s = self._config.parallel.heartbeat_timeout_s
        heard_s = time.monotonic()
        beating = asyncio.create_task(self._beat(), name="follower-beat")
        try:
            while time.monotonic() - heard_s < silence_s:
                message = await self._receive(silence_s - (time.monotonic() - heard_s))
                match message:
                    case messages.StartWorker(session):
                        await self._end_worker()
                        self._start_worker(session)
                    case messages.StopWorker():
                        await self._end_worker()
                    case messages.Goodbye(None):
                        logger.info("the leader has ended")
                        return True
                    case messages.Goodbye(error):
                        raise _goodbye_error(error)
                if message is not None:
                    heard_s = time.monotonic()  # after it is done: nobody listens while a process with much memory ends
            return False
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        while True:
            self._send(messages.Alive())
            await asyncio.sleep(messages.BEAT_INTERVAL_S)

    async def _leave(self) -> None:
        if self._socket is not None:
            self._send(messages.Leave())
        await self._end_worker()
        if self._socket is not None:
            self._socket.close()
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)  # lingers for the last messages

    # The engine process ----------------------------------------------------------------------------------------------

    def _start_worker(self, session: HostSession) -> None:
        self._child = EngineChild.launch(self._config, core=self._core, hosts=session)
        self._pump = asyncio.create_task(self._watch(self._child, session.session_id), name="worker-watch")

    async def _end_worker(self) -> None:
        if self._pump is not None:
            pump, self._pump = self._pump, None
            pump.cancel()
            await asyncio.wait({pump})
        if self._child is not None:
            child, self._child = self._child, None
            await child.end()  # at once: it has nothing to save, and may wait for a host that is gone

    async def _watch(self, child: EngineChild, session_id: int) -> None:
        """Take in the engine process's messages until it ends, and tell the leader how."""
        pulse = Pulse(self._config.parallel)
        watching = asyncio.create_task(self._kill_when_hung(child, pulse))
        error: wire.WireError | None = None
        try:
            while (message := await child.receive()) is not None:
                pulse.hear(message)
                match message:
                    case wire.Progress(text):
                        logger.info("engine: %s", text)
                    case wire.Ready():
                        logger.info("engine ready")
                    case wire.StartFailed(error):
                        break
        finally:
            watching.cancel()
        cause = pulse.trouble or ("could not start" if error is not None else child.exit_text)
        level = logging.INFO if child.has_ended_well else logging.ERROR
        logger.log(level, "the engine process %s", cause if error is None else f"{cause}: {error.message}")
        self._send(messages.WorkerFailed(session_id, cause, error))

    @staticmethod
    async def _kill_when_hung(child: EngineChild, pulse: Pulse) -> None:
        while pulse.trouble is None:
            await asyncio.sleep(messages.BEAT_INTERVAL_S)
        child.kill()

    # Messages --------------------------------------------------------------------------------------------------------

    def _send(self, message: messages.ToLeader) -> None:
        assert self._socket is not None
        self._socket.send(messages.encode(message))

    async def _receive(self, timeout_s: float) -> messages.ToFollower | None:
        """The leader's next message; None when none came in time."""
        assert self._socket is not None
        if not await self._socket.poll(max(int(timeout_s * 1000), 1)):
            return None
        data = await self._socket.recv()
        try:
            return messages.decode_to_follower(data)
        except ValueError as error:
            raise ConfigError(
                f"what answers at dist_init_addr {self._address} is no leader of this version of jaxserve: {error}"
            ) from None


def _goodbye_error(error: wire.WireError | None) -> Exception:
    return ConfigError("the leader has ended") if error is None else error.rebuild()
