"""What the engine processes of a group say to each other: values they must agree on, then the leader's plans.

    leader     ROUTER  <- Value --   DEALER   follower
                       -- Values ->
                       -- Plan --->           one a step, in the order of dispatch
                       -- End ---->           answered with a last Value

Every process of a group must run the same programs on the same inputs in the same order. A program's inputs follow
from the plans alone, so a plan is all that a step sends.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol, TypeAlias

import msgspec
import zmq

from jaxserve.config_parallel import parse_address
from jaxserve.engine.hosts.session import HostSession
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.parallel.multihost import join_hosts
from jaxserve.runner.model_runner import Runner
from jaxserve.runner.pending import PendingStep
from jaxserve.scheduler.plan import StepPlan

logger = logging.getLogger(__name__)


class _Message(msgspec.Struct, tag=True, array_like=True):
    """Base of all messages; the class name is the tag."""


class Value(_Message):
    """What a follower's process says of itself."""

    name: str
    value: str


class Values(_Message):
    """What all said, by rank."""

    name: str
    values: list[str]


class Plan(_Message):
    """The next step."""

    plan: StepPlan


class End(_Message):
    """No plan follows. The leader's process stays until all have heard it: JAX aborts those that it leaves behind."""


ToFollower: TypeAlias = Values | Plan | End

END = "end"  # the last value
END_TIMEOUT_S = 2.0  # for the followers' answers

_encode = msgspec.msgpack.Encoder().encode
_decode_value = msgspec.msgpack.Decoder(Value).decode
_decode_to_follower = msgspec.msgpack.Decoder(ToFollower).decode


class Hosts(Protocol):
    """The other engine processes of this one's group, as its start sees them."""

    session: HostSession

    def gather(self, name: str, value: str) -> list[str]:
        """The values of all hosts by rank, once each has called this with the same `name`."""
        ...


def connect(session: HostSession) -> LeadingHosts | FollowingHosts:
    """Join the group; every process of it must call this before it uses JAX."""
    hosts = LeadingHosts(session) if session.rank == 0 else FollowingHosts(session)
    join_hosts(
        coordinator=session.coordinator,
        num_hosts=session.num_hosts,
        rank=session.rank,
        timeout_s=session.timeout_s,
    )
    return hosts


def smallest(hosts: Hosts | None, name: str, value: int) -> int:
    """The least of all hosts' values; the own one where there is one host."""
    return value if hosts is None else min(map(int, hosts.gather(name, str(value))))


def require_same(hosts: Hosts | None, name: str, value: str, *, hint: str) -> None:
    """Raise `ConfigError` on every host when the values differ: the hosts would run different programs."""
    values = [value] if hosts is None else hosts.gather(name, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ConfigError(f"{name} is {values[0]!r} on node rank 0, but {other!r} on node rank {rank}; {hint}")


class LeadingHosts:
    """Rank 0's end of the channel."""

    def __init__(self, session: HostSession) -> None:
        self.session = session
        self._socket = _socket(zmq.ROUTER, session)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a plan that cannot be sent is an error, not lost
        self._socket.bind(_endpoint(session))
        self._followers = [str(rank).encode() for rank in range(1, session.num_hosts)]
        self._early: dict[bytes, list[Value]] = {name: [] for name in self._followers}

    def gather(self, name: str, value: str) -> list[str]:
        """See `Hosts.gather`."""
        while not all(self._early.values()):
            self._take(*self._socket.recv_multipart())
        theirs = [self._early[follower].pop(0) for follower in self._followers]
        for rank, their in enumerate(theirs, start=1):
            _check_turn(name, their.name, rank)
        values = [value, *(their.value for their in theirs)]
        self._send(Values(name, values))
        return values

    def send_plan(self, plan: StepPlan) -> None:
        """Hand a plan to every follower; never blocks."""
        self._send(Plan(plan))

    def end(self) -> None:
        """Let the followers' processes end, and wait for them a little: no step may be in flight."""
        self._send(End())
        deadline_s = time.monotonic() + END_TIMEOUT_S
        left = set(self._followers)
        while left and self._socket.poll(max(0, int((deadline_s - time.monotonic()) * 1000))):
            left.discard(self._socket.recv_multipart()[0])

    def _take(self, sender: bytes, *frames: bytes) -> None:
        """Keep a follower's value; whatever else comes to an open port is dropped."""
        try:
            (data,) = frames
            self._early[sender].append(_decode_value(data))
        except (ValueError, KeyError) as error:
            logger.warning("a message that is none of a follower's came to %s: %r", self.session.plans, error)

    def _send(self, message: ToFollower) -> None:
        data = _encode(message)
        for follower in self._followers:
            self._socket.send_multipart([follower, data])


class FollowingHosts:
    """A follower's end of the channel."""

    def __init__(self, session: HostSession) -> None:
        self.session = session
        self._socket = _socket(zmq.DEALER, session)
        self._socket.setsockopt(zmq.IDENTITY, str(session.rank).encode())
        self._socket.connect(_endpoint(session))

    def gather(self, name: str, value: str) -> list[str]:
        """See `Hosts.gather`."""
        self._socket.send(_encode(Value(name, value)))
        answer = self._receive()
        assert isinstance(answer, Values), "plans come after the start"
        _check_turn(name, answer.name, 0)
        return answer.values

    def receive_plan(self, timeout_ms: int) -> StepPlan | None:
        """The next plan; None when none came within `timeout_ms`. `SystemExit` when the leader ends."""
        if not self._socket.poll(timeout_ms):
            return None
        match self._receive():
            case Plan(plan):
                return plan
            case End():
                self._socket.send(_encode(Value(END, "")))
                raise SystemExit(0)
            case _:
                raise AssertionError("values are exchanged before the first plan")

    def close(self) -> None:
        """Let go of the socket; the last answer still leaves."""
        self._socket.context.destroy()

    def _receive(self) -> ToFollower:
        return _decode_to_follower(self._socket.recv())


class LeadingRunner:
    """The leader's runner: each plan goes to the followers before this host dispatches it."""

    def __init__(self, runner: Runner, hosts: LeadingHosts) -> None:
        self._runner = runner
        self._hosts = hosts

    def dispatch(self, plan: StepPlan) -> PendingStep:
        self._hosts.send_plan(plan)
        return self._runner.dispatch(plan)


def _socket(kind: int, session: HostSession) -> zmq.Socket[bytes]:
    socket = zmq.Context().socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)  # never block, never drop: two steps are in flight at most
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.IPV6, int(":" in parse_address(session.plans)[0]))
    return socket


def _endpoint(session: HostSession) -> str:
    return f"tcp://{session.plans}"


def _check_turn(wanted: str, given: str, rank: int) -> None:
    if wanted != given:
        raise JaxserveError(f"node rank {rank} is at {given!r} while this host is at {wanted!r}: their starts differ")
