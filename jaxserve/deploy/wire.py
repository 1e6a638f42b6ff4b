"""What an API server and a replica say to each other: tagged msgpack messages, as between API and engine process."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import msgspec

from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.wire import WireError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams


class Generate(msgspec.Struct, array_like=True):
    """A request, checked and tokenised; answered with `Accepted`, outputs, and `Failed` where it failed."""

    request_id: str  # unique in the replica
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None


class Accepted(msgspec.Struct, tag=True, array_like=True):
    """The replica has the request."""

    replica: str


class Output(msgspec.Struct, tag=True, array_like=True):
    """News of the request; the prompt's tokens, which the sender of the request knows, are left out."""

    output: RequestOutput

    @classmethod
    def of(cls, output: RequestOutput) -> Output:
        return cls(replace(output, prompt_token_ids=[]))


class Failed(msgspec.Struct, tag=True, array_like=True):
    """The end of a request that has no answer."""

    error: WireError


FromReplica: TypeAlias = Accepted | Output | Failed

encode = msgspec.msgpack.Encoder().encode
decode_generate = msgspec.msgpack.Decoder(Generate).decode
decode_from_replica = msgspec.msgpack.Decoder(FromReplica).decode
decode_core_info = msgspec.msgpack.Decoder(CoreInfo).decode
