"""What the API process and the engine process say to each other: tagged msgpack messages, typed on arrival."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import msgspec

from jaxserve import errors
from jaxserve.engine.core_facts import CoreInfo, EngineStats
from jaxserve.errors import JaxserveError
from jaxserve.outputs import TokenDelta
from jaxserve.request import EngineRequest


class _Message(msgspec.Struct, tag=True, array_like=True):
    """Base of all messages; the class name is the tag."""


class WireError(msgspec.Struct, array_like=True):
    """A `JaxserveError` as data. Only classes of `jaxserve.errors` are made from it."""

    kind: str
    message: str
    fields: dict[str, str | int | float | None]

    @classmethod
    def of(cls, error: JaxserveError) -> WireError:
        fields = {
            name: value for name, value in vars(error).items() if isinstance(value, (str, int, float, type(None)))
        }
        return cls(type(error).__name__, str(error), fields)

    def rebuild(self) -> JaxserveError:
        """The error as it was raised on the other side; an unknown kind becomes a plain `JaxserveError`."""
        kind = getattr(errors, self.kind, JaxserveError)
        if not (isinstance(kind, type) and issubclass(kind, JaxserveError)):
            kind = JaxserveError
        error = kind.__new__(kind, self.message)  # constructors differ; the fields are all there is to set
        vars(error).update(self.fields)
        return error


# To the engine


class AddRequests(_Message):
    """The sequences of one user request. They share a prompt, which travels once: theirs are empty."""

    prompt_token_ids: list[int]
    requests: list[EngineRequest]

    @classmethod
    def of(cls, requests: list[EngineRequest]) -> AddRequests:
        bare = [replace(request, prompt_token_ids=[]) for request in requests]
        return cls(requests[0].prompt_token_ids, bare)

    def unpack(self) -> list[EngineRequest]:
        """The requests, each with the shared prompt."""
        return [replace(request, prompt_token_ids=self.prompt_token_ids) for request in self.requests]


class AbortRequests(_Message):
    """End these sequences; unknown ids are ignored."""

    request_ids: list[str]


class ResetPrefixCache(_Message):
    """Answered with `CallResult`."""

    call_id: int


class Shutdown(_Message):
    """End the process: what still runs is dropped."""


ToEngine: TypeAlias = AddRequests | AbortRequests | ResetPrefixCache | Shutdown

# From the engine


class Progress(_Message):
    """A line for people while the engine starts."""

    text: str


class Ready(_Message):
    """The engine takes requests from now on."""

    info: CoreInfo


class StartFailed(_Message):
    """The engine could not start; the process ends."""

    error: WireError


class StepOutputs(_Message):
    """What a step brought, all requests together; `stats` now and then."""

    deltas: list[TokenDelta]
    stats: EngineStats | None = None
    step_sizes: list[int] = []  # tokens computed, of each step planned since the last message


class Rejected(_Message):
    """A request of `AddRequests` was not taken, and so none of them."""

    request_ids: list[str]
    error: WireError


class CallResult(_Message):
    """The answer to a message with a `call_id`."""

    call_id: int
    value: bool


class Heartbeat(_Message):
    """The process lives; sent where there are several hosts, whose engine processes may wait for each other."""

    busy_s: float  # how long its main loop has been at the same step


FromEngine: TypeAlias = Heartbeat | Progress | Ready | StartFailed | StepOutputs | Rejected | CallResult

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
