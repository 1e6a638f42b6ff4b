"""Messages survive the wire, and nothing but our own errors is made from it."""

import msgspec
import pytest

from jaxserve.engine import wire
from jaxserve.engine.core_facts import CoreInfo, EngineStats
from jaxserve.errors import CheckpointError, JaxserveError, PromptTooLongError, QueueFullError
from jaxserve.outputs import FinishReason, TokenDelta, TokenLogprobs
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import MAX_SEED, SamplingParams


def engine_requests(prompt, num_requests=1, **params):
    return [
        EngineRequest(request_id=f"r-{i}", prompt_token_ids=prompt, sampling_params=SamplingParams(**params))
        for i in range(num_requests)
    ]


def test_a_request_arrives_as_it_was_sent():
    [request] = engine_requests(
        [1, 2, 3], seed=MAX_SEED, logit_bias={7: -1.5}, stop=["a"], bad_words_token_ids=[[1], [2, 3]], temperature=0
    )

    message = wire.decode_to_engine(wire.encode(wire.AddRequests.of([request])))

    assert isinstance(message, wire.AddRequests)
    assert message.unpack() == [request]


def test_the_prompt_of_n_sequences_travels_once():
    prompt = [70_000] * 10_000
    one, many = (len(wire.encode(wire.AddRequests.of(engine_requests(prompt, n)))) for n in (1, 10))

    assert many - one < len(wire.encode(prompt))


@pytest.mark.parametrize(
    "message",
    [
        wire.Progress("loading"),
        wire.Ready(CoreInfo(max_model_len=8, vocab_size=9, num_blocks=1, block_size=2, fingerprint="f")),
        wire.StepOutputs(
            [
                TokenDelta(
                    "r-0",
                    [1],
                    FinishReason.STOP,
                    stop_token_id=1,
                    logprobs=[TokenLogprobs(1, -0.5, 1, [1, 2], [-0.5, -1.5])],
                    prompt_logprobs=[None, TokenLogprobs(1, -0.5, 1, [], [])],
                ),
                TokenDelta("r-1", error="broken", finish_reason=FinishReason.ERROR),
            ],
            EngineStats(num_running=2),
        ),
        wire.CallResult(3, True),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_of_the_engine_arrives_as_it_was_sent(message):
    assert wire.decode_from_engine(wire.encode(message)) == message


@pytest.mark.parametrize(
    "error",
    [QueueFullError("full", retry_after_s=9), PromptTooLongError("long", param="max_tokens"), CheckpointError("torn")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_type_text_and_fields(error):
    sent = wire.encode(wire.Rejected(["r-0"], wire.WireError.of(error)))

    rebuilt = wire.decode_from_engine(sent).error.rebuild()

    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert vars(rebuilt) == vars(error)


@pytest.mark.parametrize("kind", ["SystemExit", "annotations", "NoSuchError"])
def test_an_unknown_kind_of_error_becomes_a_plain_one(kind):
    assert type(wire.WireError(kind, "text", {}).rebuild()) is JaxserveError


def test_what_is_no_message_is_refused():
    with pytest.raises(msgspec.ValidationError):
        wire.decode_to_engine(wire.encode(["AbortRequests", "not a list"]))
