"""`HostGroup`: rank 0's view of the other hosts; who has joined, who lives, and what they are to run."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from dataclasses import dataclass

import msgspec
import zmq.asyncio

from jaxserve.config import Config
from jaxserve.config_parallel import join_address, parse_address
from jaxserve.engine.hosts import messages
from jaxserve.engine.hosts.facts import difference, facts_of
from jaxserve.engine.hosts.session import HostSession
from jaxserve.engine.hosts.sockets import bind_leader, free_port, resolve
from jaxserve.engine.wire import WireError
from jaxserve.errors import ConfigError, JaxserveError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a session must end."""

    cause: str  # a sentence that begins with whose fault it was
    error: WireError | None = None  # where an engine process could not start


@dataclass(slots=True)
class _Member:
    """A follower that was accepted."""

    identity: bytes
    heard_s: float  # time.monotonic() of its last message
    rival: bytes | None = None  # another one that asks for the same rank: it waits until this one is heard or is dead


class HostGroup:
    """Owns the socket at `dist_init_addr`. All methods belong to one event loop: `open`, sessions, `close`.

    A session begins when all ranks are there, and ends with `end_session`; `failure` of it is set when a follower's
    engine process dies, or its host falls silent. The followers stay, and run the next session.
    """

    failure: asyncio.Future[Failure]  # of the session

    def __init__(self, config: Config) -> None:
        parallel = config.parallel
        assert parallel.dist_init_addr is not None, "the address is known before the group is"
        self.address = parallel.dist_init_addr
        self._config = config
        self._num_hosts = parallel.nnodes
        self._timeout_s = parallel.dist_timeout_s
        self._silence_s = parallel.heartbeat_timeout_s
        self._context = zmq.asyncio.Context()
        self._members: dict[int, _Member] = {}  # by rank
        self._refusals: dict[int, str] = {}  # rank -> why the last one was refused
        self._facts: dict[str, str] | None = None  # None until the checkpoint's files were read
        self._held: dict[bytes, messages.Join] = {}  # who asked before that
        self._refused: set[bytes] = set()
        self._coming_s = 0.0  # time.monotonic() when a follower was heard last that still reads its files
        self._session_ids = itertools.count(1)
        self._session_id: int | None = None
        self._changed = asyncio.Event()  # somebody joined or left
        self._socket: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._breakdown: JaxserveError | None = None  # why nobody listens any more

    async def open(self) -> None:
        """Listen for followers; raises `ConfigError` where that cannot be, and what the checkpoint's files raise."""
        self._socket = bind_leader(self._context, self.address)
        self._task = asyncio.create_task(self._serve(self._socket), name="host-group")
        self._task.add_done_callback(self._note_end)
        self._facts = await asyncio.get_running_loop().run_in_executor(None, facts_of, self._config)
        for identity, join in self._held.items():
            self._join(identity, join)
        self._held.clear()

    @property
    def missing(self) -> list[int]:
        """The ranks that nobody has."""
        return [rank for rank in range(1, self._num_hosts) if rank not in self._members]

    async def gather(self) -> None:
        """Wait until every rank is there, and was heard just now; `ConfigError` when they are not in time.

        The time of a follower that reads its model's files does not count.
        """
        begin_s = time.monotonic()
        while self.missing or any(member.heard_s < begin_s for member in self._members.values()):
            if self._breakdown is not None:
                raise self._breakdown
            if time.monotonic() - max(begin_s, self._coming_s) > self._timeout_s:
                raise ConfigError(self._what_is_missing())
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), messages.BEAT_INTERVAL_S / 2)

    def begin(self) -> HostSession:
        """Have the followers start their engine processes; returns what this host's needs to know."""
        host = resolve(self.address)
        self._session_id = next(self._session_ids)
        self.failure = asyncio.get_running_loop().create_future()
        session = HostSession(
            session_id=self._session_id,
            rank=0,
            num_hosts=self._num_hosts,
            coordinator=join_address(parse_address(self.address)[0], free_port(host)),
            plans=join_address(host, free_port(host)),
            timeout_s=self._timeout_s,
        )
        for rank, member in self._members.items():
            self._send(member.identity, messages.StartWorker(msgspec.structs.replace(session, rank=rank)))
        return session

    def end_session(self) -> None:
        """Have the followers end their engine processes, if they still run. May be called twice."""
        if self._session_id is not None:
            self._session_id = None
            self._tell_all(messages.StopWorker())

    async def close(self, error: JaxserveError | None = None) -> None:
        """Send the followers home, with what kept the group from starting if that is why. May be called twice."""
        if self._task is not None:
            goodbye = messages.Goodbye(None if error is None else WireError.of(error))
            self._tell_all(goodbye)
            for identity in self._held:
                self._send(identity, goodbye)
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            await asyncio.get_running_loop().run_in_executor(None, self._context.term)  # lingers for the last messages

    # Messages --------------------------------------------------------------------------------------------------------

    async def _serve(self, socket: zmq.asyncio.Socket) -> None:
        """Listen and beat; a follower counts as silent only when nothing of it waits in the socket."""
        beat_s = 0.0
        while True:
            await socket.poll(int(messages.BEAT_INTERVAL_S * 500))
            while await socket.poll(0):
                self._hear(*await socket.recv_multipart())
            now_s = time.monotonic()
            if now_s - beat_s >= messages.BEAT_INTERVAL_S:
                beat_s = now_s
                self._tell_all(messages.Alive())
            for rank, member in list(self._members.items()):
                if now_s - member.heard_s > self._silence_s:
                    self._lose(rank, f"node rank {rank} was not heard for {self._silence_s:g} s")

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        cause = f"node rank 0 listens to no host any more: {type(error).__name__}: {error}"
        logger.error("%s", cause, exc_info=error)
        self._breakdown = JaxserveError(cause)
        self._fail(Failure(cause))
        self._changed.set()

    def _hear(self, identity: bytes, *frames: bytes) -> None:
        try:
            (data,) = frames
            message = messages.decode_to_leader(data)
        except ValueError as error:
            logger.warning("a message that is none of a follower's came to %s: %s", self.address, error)
            return
        if isinstance(message, messages.Join):
            self._join(identity, message)
            return
        rank = next((rank for rank, member in self._members.items() if member.identity == identity), None)
        if rank is None:
            return  # it was given up; it will notice our silence, and join again
        self._note_life(rank)
        match message:
            case messages.WorkerFailed(session_id, cause, error) if session_id == self._session_id:
                self._fail(Failure(f"the engine process of node rank {rank} {cause}", _of_rank(rank, error)))
            case messages.Leave():
                self._lose(rank, f"node rank {rank} was told to end")

    def _join(self, identity: bytes, join: messages.Join) -> None:
        if self._facts is None:
            self._held[identity] = join
        if join.facts is None:
            self._coming_s = time.monotonic()
        if self._facts is None or join.facts is None:
            self._send(identity, messages.Wait())
            return
        member = self._members.get(join.rank)
        different = difference(self._facts, join.facts)
        if different is not None:
            reason = f"{different}; all hosts must be given the same"
            self._refusals[join.rank] = f"refused, since there {different.replace(' here,', ',')}"
            self._refuse(identity, join.rank, reason)
        elif not 0 < join.rank < self._num_hosts:
            self._refuse(identity, join.rank, f"the leader has ranks 1 to {self._num_hosts - 1} to give")
        elif member is not None and member.identity != identity:
            member.rival = identity
            self._send(identity, messages.Wait())
        else:
            self._accept(identity, join.rank)

    def _accept(self, identity: bytes, rank: int) -> None:
        self._send(identity, messages.Accepted())
        if rank in self._members:
            self._note_life(rank)
            return
        self._members[rank] = _Member(identity, time.monotonic())
        self._refusals.pop(rank, None)
        self._changed.set()
        logger.info("node rank %d joined: %d of %d hosts are there", rank, len(self._members) + 1, self._num_hosts)

    def _refuse(self, identity: bytes, rank: int, reason: str) -> None:
        if identity not in self._refused:
            self._refused.add(identity)
            logger.warning("a host that asked to be node rank %d was refused: %s", rank, reason)
        self._send(identity, messages.Refused(reason))

    def _note_life(self, rank: int) -> None:
        member = self._members[rank]
        member.heard_s = time.monotonic()
        if member.rival is not None:
            rival, member.rival = member.rival, None
            self._refuse(
                rival, rank, f"another host is node rank {rank} already; give each host a --node-rank of its own"
            )

    def _lose(self, rank: int, cause: str) -> None:
        member = self._members.pop(rank)
        logger.error("%s", cause)
        self._fail(Failure(cause))
        if member.rival is not None:
            self._accept(member.rival, rank)
        self._changed.set()

    def _fail(self, failure: Failure) -> None:
        if self._session_id is not None and not self.failure.done():
            self.failure.set_result(failure)

    def _what_is_missing(self) -> str:
        ranks = [f"{rank} ({self._refusals[rank]})" if rank in self._refusals else str(rank) for rank in self.missing]
        return (
            f"{len(self._members) + 1} of {self._num_hosts} hosts are there after {self._timeout_s:g} s; missing: node "
            f"rank {', '.join(ranks)}. Start them with --dist-init-addr {self.address}, or raise --dist-timeout-s"
        )

    def _tell_all(self, message: messages.ToFollower) -> None:
        for member in self._members.values():
            self._send(member.identity, message)

    def _send(self, identity: bytes, message: messages.ToFollower) -> None:
        if self._socket is not None:
            self._socket.send_multipart([identity, messages.encode(message)])


def _of_rank(rank: int, error: WireError | None) -> WireError | None:
    """An error with the host's name before its text."""
    return None if error is None else WireError(error.kind, f"node rank {rank}: {error.message}", error.fields)
