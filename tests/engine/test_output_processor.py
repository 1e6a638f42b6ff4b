"""Tokens become text, stop strings end it, and outputs come in the kind that was asked."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.output_processor import OutputProcessor
from jaxserve.engine.preparation import PreparedRequest
from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.outputs import FinishReason, TokenDelta, TokenLogprobs
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

EOS = 256
TEXT = st.text("ab é漢😀", max_size=25)
STOPS = st.lists(st.text("ab 漢", min_size=1, max_size=3), max_size=3)


def processor_of(tokenizer, **params):
    params = SamplingParams(**params)
    sequences = [
        EngineRequest(request_id=f"r-{i}", prompt_token_ids=[1], sampling_params=params, eos_token_ids=[EOS])
        for i in range(params.n)
    ]
    prepared = PreparedRequest(request_id="r", prompt="p", prompt_token_ids=[1], params=params, sequences=sequences)
    return OutputProcessor(prepared, tokenizer)


def run(processor, token_ids, chunk_sizes=(1,), finish=FinishReason.LENGTH):
    """Feed tokens in chunks, taking after each; returns the outputs and whether an abort was asked."""
    outputs, start, wants_abort = [], 0, False
    while start < len(token_ids) and not processor.is_finished:
        chunk = token_ids[start : start + chunk_sizes[start % len(chunk_sizes)]]
        start += len(chunk)
        wants_abort = processor.push(TokenDelta("r-0", chunk)) or wants_abort
        outputs.append(processor.take())
    if not processor.is_finished:
        processor.push(TokenDelta("r-0", finish_reason=finish))
        outputs.append(processor.take())
    return [output for output in outputs if output is not None], wants_abort


def expected_text(text, stops, include=False):
    """Obvious: cut at the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[:end] if include else text[: end - len(stop)]
    return text


@given(TEXT, STOPS, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_the_deltas_put_together_are_the_whole_text(tokenizer, text, stops, chunk_sizes, include):
    token_ids = tokenizer.encode(text)
    params = {"stop": stops or None, "include_stop_str_in_output": include}

    deltas, _ = run(processor_of(tokenizer, output_kind="delta", **params), token_ids, chunk_sizes)
    whole, _ = run(processor_of(tokenizer, output_kind="cumulative", **params), token_ids, chunk_sizes)
    final, _ = run(processor_of(tokenizer, output_kind="final_only", **params), token_ids, chunk_sizes)

    completions = [output.outputs[0] for output in deltas]
    assert "".join(completion.text for completion in completions) == expected_text(text, stops, include)
    assert [t for completion in completions for t in completion.token_ids] == final[0].outputs[0].token_ids
    assert whole[-1].outputs == final[0].outputs
    assert final[0].outputs[0].text == expected_text(text, stops, include)
    assert len(final) == 1
    assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]
    for earlier, later in zip(whole, whole[1:], strict=False):
        assert later.outputs[0].text.startswith(earlier.outputs[0].text)


def test_a_stop_string_over_a_token_border_ends_the_sequence(tokenizer):
    processor = processor_of(tokenizer, stop=["lo w"], output_kind="delta")

    outputs, wants_abort = run(processor, tokenizer.encode("hello world"))

    assert wants_abort
    assert [output.outputs[0].text for output in outputs] == ["h", "e", "", "l", "", "", ""]
    assert outputs[-1].outputs[0].stop_reason == "lo w"
    assert outputs[-1].outputs[0].finish_reason is FinishReason.STOP


def test_tokens_after_a_stop_string_in_the_same_delta_are_dropped(tokenizer):
    processor = processor_of(tokenizer, stop=["b"])

    processor.push(TokenDelta("r-0", tokenizer.encode("abcd")))

    [completion] = processor.take().outputs
    assert (completion.text, completion.token_ids) == ("a", tokenizer.encode("ab"))


def test_deltas_after_a_stop_string_are_dropped(tokenizer):
    processor = processor_of(tokenizer, stop=["b"])
    processor.push(TokenDelta("r-0", tokenizer.encode("ab")))
    processor.take()

    assert processor.push(TokenDelta("r-0", tokenizer.encode("c"), FinishReason.ABORT)) is False
    assert processor.take() is None
    assert processor.finish_reasons == [FinishReason.STOP]


def test_the_engine_is_not_told_of_a_stop_string_in_its_own_last_token(tokenizer):
    processor = processor_of(tokenizer, stop=["b"])

    assert processor.push(TokenDelta("r-0", tokenizer.encode("b"), FinishReason.LENGTH)) is False
    assert processor.take().outputs[0].stop_reason == "b"


def test_no_stop_string_counts_before_min_tokens(tokenizer):
    processor = processor_of(tokenizer, stop=["b"], min_tokens=3)

    [*_, last], _ = run(processor, tokenizer.encode("abab"))

    assert last.outputs[0].text == "aba"


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_shows_only_where_asked(tokenizer, include, text):
    processor = processor_of(tokenizer, include_stop_str_in_output=include)
    a, b, c = tokenizer.encode("abc")

    processor.push(TokenDelta("r-0", [a, b]))
    processor.push(TokenDelta("r-0", [c], FinishReason.STOP, stop_token_id=c))

    [completion] = processor.take().outputs
    assert (completion.text, completion.token_ids, completion.stop_reason) == (text, [a, b, c], c)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_end_of_sequence_token_shows_no_text_and_is_no_stop_reason(tokenizer, skip_special_tokens):
    processor = processor_of(tokenizer, skip_special_tokens=skip_special_tokens)

    processor.push(TokenDelta("r-0", [*tokenizer.encode("a"), EOS], FinishReason.STOP, stop_token_id=EOS))

    [completion] = processor.take().outputs
    assert (completion.text, completion.stop_reason) == ("a", None)


def test_a_special_token_inside_shows_only_where_asked(tokenizer):
    shown = processor_of(tokenizer, skip_special_tokens=False)
    hidden = processor_of(tokenizer)
    for processor in (shown, hidden):
        run(processor, [EOS, *tokenizer.encode("a")])

    [*_, last], _ = run(processor_of(tokenizer, skip_special_tokens=False), [EOS, *tokenizer.encode("a")])
    assert last.outputs[0].text == "</s>a"
    [*_, last], _ = run(processor_of(tokenizer), [EOS, *tokenizer.encode("a")])
    assert last.outputs[0].text == "a"


def test_text_held_back_comes_out_at_the_end(tokenizer):
    processor = processor_of(tokenizer, stop=["bcd"], output_kind="delta")

    outputs, _ = run(processor, tokenizer.encode("abc"))

    assert [output.outputs[0].text for output in outputs] == ["a", "", "", "bc"]


def test_a_torn_character_at_the_end_becomes_a_replacement_character(tokenizer):
    [*_, last], _ = run(processor_of(tokenizer), tokenizer.encode("a漢")[:-1])

    assert last.outputs[0].text == "a\ufffd"


def test_without_detokenizing_there_is_no_text(tokenizer):
    [*_, last], _ = run(processor_of(tokenizer, detokenize=False), [1, 2])

    assert (last.outputs[0].text, last.outputs[0].token_ids) == ("", [1, 2])


def test_logprobs_and_offsets_are_aligned_with_the_tokens(tokenizer):
    token_ids = tokenizer.encode("a漢bc")
    logprobs = [TokenLogprobs(token_id, -float(i), 1, [], []) for i, token_id in enumerate(token_ids)]
    deltas = processor_of(tokenizer, logprobs=0, output_kind="delta")
    whole = processor_of(tokenizer, logprobs=0, stop=["bc"])

    taken = []
    for i, token_id in enumerate(token_ids):
        delta = TokenDelta("r-0", [token_id], logprobs=[logprobs[i]])
        deltas.push(delta)
        whole.push(delta)
        taken += deltas.take().outputs

    assert [one for completion in taken for one in completion.logprobs] == logprobs
    assert [offset for completion in taken for offset in completion.text_offsets] == [0, 1, 1, 1, 2, 3]
    [completion] = whole.take().outputs
    assert (completion.text, completion.logprobs) == ("a漢", logprobs)
    assert completion.text_offsets == [0, 1, 1, 1, 2, 2]


def test_a_slow_reader_gets_merged_deltas(tokenizer):
    processor = processor_of(tokenizer, output_kind="delta")
    for character in "abc":
        processor.push(TokenDelta("r-0", tokenizer.encode(character)))

    assert processor.take().outputs[0].text == "abc"
    assert processor.take() is None


def test_a_delta_names_only_the_sequences_with_news(tokenizer):
    processor = processor_of(tokenizer, n=3, output_kind="delta")

    processor.push(TokenDelta("r-1", [1]))
    assert [completion.index for completion in processor.take().outputs] == [1]
    processor.push(TokenDelta("r-2", [1], FinishReason.LENGTH))
    processor.push(TokenDelta("r-0", [1], FinishReason.LENGTH))
    output = processor.take()
    assert ([completion.index for completion in output.outputs], output.finished) == ([0, 2], False)
    processor.push(TokenDelta("r-1", [], FinishReason.LENGTH))
    assert processor.take().finished


def test_a_cumulative_output_has_all_sequences(tokenizer):
    processor = processor_of(tokenizer, n=2)
    processor.push(TokenDelta("r-1", tokenizer.encode("a")))

    assert [completion.text for completion in processor.take().outputs] == ["", "a"]


def test_prompt_logprobs_come_once_in_deltas_and_always_in_the_whole(tokenizer):
    prompt_logprobs = [None, TokenLogprobs(1, -1.0, 1, [], [])]
    for kind, again in (("delta", None), ("cumulative", prompt_logprobs)):
        processor = processor_of(tokenizer, prompt_logprobs=0, output_kind=kind)
        processor.push(TokenDelta("r-0", [1], prompt_logprobs=prompt_logprobs, num_cached_tokens=5))
        first = processor.take()
        processor.push(TokenDelta("r-0", [1]))
        second = processor.take()

        assert (first.prompt_logprobs, second.prompt_logprobs) == (prompt_logprobs, again)
        assert first.num_cached_tokens == second.num_cached_tokens == 5


def test_an_error_of_the_engine_is_kept_for_the_caller(tokenizer):
    processor = processor_of(tokenizer)

    processor.push(TokenDelta("r-0", [1], FinishReason.ERROR, error="nan"))

    assert isinstance(processor.error, RequestFailedError)
    assert processor.error.message == "nan"
    assert processor.take().outputs[0].finish_reason is FinishReason.ERROR


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"structured_outputs": StructuredOutputsParams(regex="a"), "min_tokens": 3}, "structured_outputs"),
        ({"bad_words": ["a"], "logit_bias": {5: -100.0}}, "bad_words"),
        ({"min_tokens": 3}, "min_tokens"),
        ({}, None),
    ],
)
def test_what_a_request_made_impossible_is_its_own_error(tokenizer, params, field):
    processor = processor_of(tokenizer, **params)

    processor.push(TokenDelta("r-0", [], FinishReason.ERROR, error="none is left", is_error_by_request=True))

    assert isinstance(processor.error, InvalidRequestError)
    assert (processor.error.message, processor.error.param) == ("none is left", field)
    assert processor.error.code == "unsatisfiable_request"


def test_an_abort_keeps_what_was_generated(tokenizer):
    processor = processor_of(tokenizer, stop=["bc"])
    processor.push(TokenDelta("r-0", tokenizer.encode("ab")))

    processor.abort()

    output = processor.take()
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab", FinishReason.ABORT)
    assert output.finished


def test_the_seed_of_each_sequence_is_told(tokenizer):
    params = SamplingParams(seed=5)
    sequences = [
        EngineRequest(request_id=f"r-{i}", prompt_token_ids=[1], sampling_params=replace(params, seed=5 + i))
        for i in range(2)
    ]
    prepared = PreparedRequest(request_id="r", prompt=None, prompt_token_ids=[1], params=params, sequences=sequences)
    processor = OutputProcessor(prepared, tokenizer)
    processor.push(TokenDelta("r-0", [1]))

    assert [completion.seed for completion in processor.take().outputs] == [5, 6]
