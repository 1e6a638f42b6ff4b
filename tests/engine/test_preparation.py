"""A request is checked and completed before the engine hears of it."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxserve.config import SchedulerSettings
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.preparation import MAX_CHARS_PER_TOKEN, SEED_LIMIT, RequestPreparer
from jaxserve.errors import InvalidRequestError, PromptTooLongError
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer.tokenizer import Tokenizer, tokenizer_from_backend
from jaxserve.tokenizer.tokenizer_files import TokenizerFiles

EOS = 256
SCHEDULER = SchedulerSettings(max_queued_requests=4)
CONTEXT = 20


@pytest.fixture
def prepare(tokenizer):
    info = CoreInfo(max_model_len=CONTEXT, vocab_size=300, num_blocks=9, block_size=4, fingerprint="f")
    preparer = RequestPreparer(tokenizer, info, seed=0, scheduler=SCHEDULER)
    return lambda prompt="abc", **params: preparer.prepare(prompt, SamplingParams(**params), request_id="r")


def test_text_is_tokenised_and_kept(prepare, tokenizer):
    prepared = prepare("abc")

    assert prepared.prompt == "abc"
    assert prepared.prompt_token_ids == tokenizer.encode("abc")
    assert prepared.sequences[0].eos_token_ids == [EOS]


def test_tokens_pass_as_they_are(prepare):
    prepared = prepare([5, 299])

    assert (prepared.prompt, prepared.prompt_token_ids) == (None, [5, 299])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ("", "empty"),
        ([300], "token id 300, the vocabulary has 0 to 299"),
        ([-1], "token id -1"),
        ([1, "a"], "list of token ids"),
        ([1.5], "list of token ids"),
        ([True], "list of token ids"),
        ({"a": 1}, "list of token ids"),
        (None, "list of token ids"),
        ("\ud800", "surrogates"),
    ],
)
def test_a_wrong_prompt_is_named(prepare, prompt, words):
    with pytest.raises(InvalidRequestError, match=words):
        prepare(prompt)


@pytest.mark.parametrize(
    ("field", "values"), [("prompt", {"prompt": "a<new>b"}), ("bad_words", {"bad_words": ["<new>"]})]
)
def test_a_text_with_a_token_that_the_model_does_not_know_is_refused(tokenizer, field, values):
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_tokens(["<new>"])
    added = backend.token_to_id("<new>")
    info = CoreInfo(max_model_len=CONTEXT, vocab_size=added, num_blocks=9, block_size=4, fingerprint="f")
    preparer = RequestPreparer(tokenizer_from_backend(backend), info, seed=0, scheduler=SCHEDULER)
    prompt = values.pop("prompt", "ab")

    wanted = f"^{field} holds the token '<new>', whose id {added} the model does not know: .* 0 to {added - 1}$"
    with pytest.raises(InvalidRequestError, match=wanted) as raised:
        preparer.prepare(prompt, SamplingParams(**values), request_id="r")
    assert raised.value.param == field


def test_a_prompt_without_room_for_an_answer_is_too_long(prepare):
    with pytest.raises(
        PromptTooLongError, match=f"has {CONTEXT} tokens; the model's context takes {CONTEXT}"
    ) as raised:
        prepare("a" * CONTEXT)

    assert raised.value.code == "context_length_exceeded"


def test_a_prompt_of_endless_characters_is_not_even_tokenised(prepare):
    with pytest.raises(PromptTooLongError, match="characters"):
        prepare("a" * (CONTEXT * MAX_CHARS_PER_TOKEN + 1))


def test_long_text_is_tokenised_as_short_text_is(tokenizer):
    info = CoreInfo(max_model_len=10_000, vocab_size=300, num_blocks=9, block_size=4, fingerprint="f")
    text = "abc " * 2000

    prepared = RequestPreparer(tokenizer, info, seed=0, scheduler=SCHEDULER).prepare(
        text, SamplingParams(), request_id="r"
    )

    assert prepared.prompt_token_ids == tokenizer.encode(text)
    with pytest.raises(InvalidRequestError, match="surrogates"):
        RequestPreparer(tokenizer, info, seed=0, scheduler=SCHEDULER).prepare(
            text + "\ud800", SamplingParams(), request_id="r"
        )


def test_prompt_and_max_tokens_must_fit_together(prepare):
    with pytest.raises(PromptTooLongError, match="together 21; .* lower max_tokens to 17") as raised:
        prepare("abc", max_tokens=18)

    assert raised.value.param == "max_tokens"


def test_an_open_max_tokens_reaches_to_the_context(prepare):
    assert prepare("abc").sequences[0].sampling_params.max_tokens == CONTEXT - 3


def test_min_tokens_must_fit_the_context_too(prepare):
    with pytest.raises(InvalidRequestError, match="room for 17"):
        prepare("abc", min_tokens=18)


def test_truncation_keeps_the_last_tokens(prepare, tokenizer):
    assert prepare("abcdef", truncate_prompt_tokens=2).prompt_token_ids == tokenizer.encode("ef")


def test_parameters_are_checked(prepare):
    with pytest.raises(InvalidRequestError, match="temperature"):
        prepare(temperature=-1)
    with pytest.raises(InvalidRequestError, match="stop_token_ids holds token id 300"):
        prepare(stop_token_ids=[300])


def test_a_request_without_a_seed_gets_one_that_json_keeps_exact(prepare):
    seeds = {prepare().params.seed for _ in range(20)}

    assert len(seeds) == 20
    assert all(0 <= seed < SEED_LIMIT for seed in seeds)


def test_a_negative_seed_is_one_of_the_others_and_minus_one_is_none(prepare):
    sequences = prepare(n=2, seed=-(2**63)).sequences

    assert [sequence.sampling_params.seed for sequence in sequences] == [2**63, 2**63 + 1]
    assert len({prepare(seed=-1).params.seed for _ in range(5)}) == 5


def test_n_sequences_have_seeds_in_a_row_and_share_the_prompt(prepare):
    sequences = prepare(n=3, seed=7, prompt_logprobs=1).sequences

    assert [sequence.sampling_params.seed for sequence in sequences] == [7, 8, 9]
    assert [sequence.sampling_params.prompt_logprobs for sequence in sequences] == [1, None, None]
    assert all(sequence.sampling_params.n == 1 for sequence in sequences)
    assert all(sequence.prompt_token_ids is sequences[0].prompt_token_ids for sequence in sequences)


def test_sequences_of_requests_with_one_id_can_be_told_apart(prepare):
    assert prepare().sequences[0].request_id != prepare().sequences[0].request_id


def test_bad_words_are_banned_with_and_without_a_space(prepare, tokenizer):
    params = prepare(bad_words=["ab"]).params

    # Here a space is a token of its own, so that banning the bare word bans both.
    assert params.bad_words_token_ids == [tokenizer.encode("ab")]


def test_a_bad_word_of_too_many_tokens_is_refused(prepare):
    with pytest.raises(InvalidRequestError, match="1 to 16 tokens, one has 17"):
        prepare(bad_words=["a" * 17])


def test_a_bad_word_of_endless_characters_is_not_even_tokenised(prepare):
    with pytest.raises(InvalidRequestError, match="1 to 16 tokens, one has 100000 characters"):
        prepare(bad_words=["a" * 100_000])


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS], "min_tokens": 2},
        {"allowed_token_ids": [5, EOS], "stop_token_ids": [5], "min_tokens": 1},
        {"allowed_token_ids": [5], "bad_words_token_ids": [[5]]},
        {"allowed_token_ids": [5, 6], "bad_words_token_ids": [[6, 5], [6]]},
    ],
)
def test_rules_that_leave_no_token_to_choose_are_refused(prepare, fields):
    with pytest.raises(InvalidRequestError, match="leaves no token to choose") as raised:
        prepare(**fields)
    assert raised.value.param == "allowed_token_ids"


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS]},
        {"allowed_token_ids": [EOS], "min_tokens": 2, "ignore_eos": True},
        {"allowed_token_ids": [5, 6], "bad_words_token_ids": [[6, 5]], "stop_token_ids": [5], "min_tokens": 1},
    ],
)
def test_rules_that_leave_a_token_are_taken(prepare, fields):
    assert prepare(**fields).params.allowed_token_ids == fields["allowed_token_ids"]


@pytest.mark.parametrize("priority", [2**70, -(2**31) - 1])
def test_a_priority_that_no_message_can_carry_is_refused(tokenizer, priority):
    info = CoreInfo(max_model_len=CONTEXT, vocab_size=300, num_blocks=9, block_size=4, fingerprint="f")
    preparer = RequestPreparer(tokenizer, info, seed=0, scheduler=SCHEDULER)
    with pytest.raises(InvalidRequestError, match="priority must be an integer"):
        preparer.prepare("abc", SamplingParams(), request_id="r", priority=priority)


@pytest.mark.parametrize(("policy", "is_taken"), [("priority", True), ("fcfs", False)])
def test_a_priority_needs_a_server_that_heeds_it(tokenizer, policy, is_taken):
    info = CoreInfo(max_model_len=CONTEXT, vocab_size=300, num_blocks=9, block_size=4, fingerprint="f")
    scheduler = SchedulerSettings(scheduling_policy=policy)
    preparer = RequestPreparer(tokenizer, info, seed=0, scheduler=scheduler)
    assert preparer.prepare("abc", SamplingParams(), request_id="r", priority=0).sequences[0].priority == 0
    if is_taken:
        assert preparer.prepare("abc", SamplingParams(), request_id="r", priority=5).sequences[0].priority == 5
        return
    with pytest.raises(InvalidRequestError, match="serve with --scheduling-policy priority") as refused:
        preparer.prepare("abc", SamplingParams(), request_id="r", priority=5)
    assert refused.value.param == "priority"


def test_a_text_of_any_length_can_be_truncated(prepare, tokenizer):
    text = "ab" * (CONTEXT * MAX_CHARS_PER_TOKEN)
    assert prepare(text, truncate_prompt_tokens=3).prompt_token_ids == tokenizer.encode(text)[-3:]
    with pytest.raises(PromptTooLongError, match="characters"):
        prepare(text)


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 1e-38), ("allowed_token_ids", [3.5])])
def test_values_that_would_break_a_row_are_refused(prepare, name, value):
    with pytest.raises(InvalidRequestError, match=name):
        prepare("abc", **{name: value})


def test_more_sequences_than_the_queue_holds_are_wrong_not_too_early(prepare):
    assert len(prepare(n=4).sequences) == 4
    with pytest.raises(InvalidRequestError, match="n=5 asks for more sequences than the queue ever holds, 4") as raised:
        prepare(n=5)

    assert (raised.value.param, raised.value.status) == ("n", 400)


def test_a_grammar_needs_a_tokenizer_that_tells_each_token_s_text_and_is_refused_again_and_again():
    backend = Backend(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "[EOS]": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    files = TokenizerFiles(name="words", backend=backend, special_tokens={"eos_token": "[EOS]"})
    info = CoreInfo(max_model_len=CONTEXT, vocab_size=4, num_blocks=9, block_size=4, fingerprint="f")
    preparer = RequestPreparer(Tokenizer(files), info, seed=0, scheduler=SCHEDULER)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["play"]))
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="a decoder that does not tell") as caught:
            preparer.prepare([1], params, request_id="r")
        assert caught.value.param == "structured_outputs"
    preparer.close()
