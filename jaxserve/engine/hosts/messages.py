"""What the leader and the followers say to each other beside the steps: joining, heartbeats, starts and failures.

These cross the network between processes that stay while engine processes come and go:

    follower -> leader   Join, Alive, WorkerFailed, Leave
    leader -> follower   Wait, then Accepted or Refused; Alive, StartWorker, StopWorker, Goodbye
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from jaxserve.engine.hosts.session import HostSession
from jaxserve.engine.wire import WireError

BEAT_INTERVAL_S = 0.5
JOIN_INTERVAL_S = 2.0  # after which a follower asks again


class _Message(msgspec.Struct, tag=True):
    """Base of all messages; named fields, so that other versions can be read and refused by name."""


class Alive(_Message):
    """Whoever sent this lives."""


# To the leader


class Join(_Message):
    """A follower asks to be taken as `rank`, again and again until it is; `facts` must be those of the leader."""

    rank: int
    facts: dict[str, str] | None  # None while it reads, or fetches, its model's files


class WorkerFailed(_Message):
    """The follower's engine process of this session ended; with `error` where it could not start."""

    session_id: int
    cause: str  # such as "was killed by signal 6"
    error: WireError | None = None


class Leave(_Message):
    """The follower was told to end."""


ToLeader: TypeAlias = Join | Alive | WorkerFailed | Leave

# To a follower


class Wait(_Message):
    """The leader lives, and will answer."""


class Accepted(_Message):
    """It belongs to the group, and waits for `StartWorker`."""


class Refused(_Message):
    """It does not, and ends."""

    reason: str


class StartWorker(_Message):
    """Run an engine process of this session, and end one that still runs."""

    session: HostSession


class StopWorker(_Message):
    """End the engine process."""


class Goodbye(_Message):
    """The leader ends, and so does the follower; with `error` where the group could not start."""

    error: WireError | None = None


ToFollower: TypeAlias = Wait | Accepted | Refused | Alive | StartWorker | StopWorker | Goodbye

encode = msgspec.msgpack.Encoder().encode
decode_to_leader = msgspec.msgpack.Decoder(ToLeader).decode
decode_to_follower = msgspec.msgpack.Decoder(ToFollower).decode
