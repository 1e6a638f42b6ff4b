"""Tokenizers built from GGUF metadata against llama.cpp's own tokens."""

import time

import pytest

from jaxserve.errors import CheckpointError, TokenizerError
from jaxserve.tokenizer.gguf_tokenizer import tokenizer_config_from_gguf, tokenizer_from_gguf
from jaxserve.tokenizer.tokenizer import Tokenizer, tokenizer_from_backend
from tests.tokenizer import golden_vocabularies

SMALL = golden_vocabularies.load("pre_tokenizers.json")


def differing(tokenizer, strings, golden):
    return [
        (text, tokenizer.encode(text, add_special_tokens=False), ids)
        for text, ids in zip(strings, golden, strict=True)
        if tokenizer.encode(text, add_special_tokens=False) != ids
    ]


def test_smollm2_gives_the_tokens_of_llama_cpp(smollm2):
    golden = golden_vocabularies.load("smollm2.json")

    assert len(golden["strings"]) >= 300
    assert differing(smollm2, golden["strings"], golden["ids"]) == []


@pytest.mark.parametrize("name", SMALL["byte_level_ids"])
def test_every_pre_tokenizer_gives_the_tokens_of_llama_cpp(name):
    backend = tokenizer_from_gguf(golden_vocabularies.header(SMALL["byte_level"], pre=name))

    assert differing(tokenizer_from_backend(backend), SMALL["strings"], SMALL["byte_level_ids"][name]) == []


def test_the_golden_strings_tell_the_pre_tokenizers_apart():
    distinct = {str(ids) for ids in SMALL["byte_level_ids"].values()}

    assert len(distinct) == 13  # equal by design: smollm and three more, llama-bpe and dbrx, qwen2 and two near it


def test_sentence_piece_gives_the_tokens_of_llama_cpp(sentence_piece):
    assert differing(sentence_piece, SMALL["strings"], SMALL["sentence_piece_ids"]) == []


def test_an_unknown_pre_tokenizer_is_refused_by_name():
    with pytest.raises(TokenizerError, match="'made-up'"):
        tokenizer_from_gguf(golden_vocabularies.header(SMALL["byte_level"], pre="made-up"))


def test_an_unknown_tokenizer_model_is_refused_by_name():
    with pytest.raises(TokenizerError, match="'rwkv'"):
        tokenizer_from_gguf(golden_vocabularies.header(SMALL["byte_level"], model="rwkv"))


def test_a_file_without_tokens_is_refused():
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        tokenizer_from_gguf(golden_vocabularies.header({"model": "gpt2"}))


def test_a_merge_of_unknown_tokens_is_refused():
    with pytest.raises(TokenizerError, match="broken tokenizer"):
        tokenizer_from_gguf(golden_vocabularies.header(SMALL["byte_level"], pre="gpt-2", merges=["zzz qqq"]))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"unknown_token_id": 10**6}, "'tokenizer.ggml.unknown_token_id' is no token"),
        ({"unknown_token_id": "<unk>"}, "'tokenizer.ggml.unknown_token_id' must be an integer from 0"),
        ({"add_bos_token": 3}, "'tokenizer.ggml.add_bos_token' must be true or false, got 3"),
        ({"token_type": ["a"]}, "'tokenizer.ggml.token_type' must be an array of numbers"),
        ({"scores": 1.5}, "'tokenizer.ggml.scores' must be an array of numbers, got 1.5"),
        ({"tokens": 7}, "'tokenizer.ggml.tokens' must be a list of texts, got 7"),
        ({"model": 7}, "'tokenizer.ggml.model' must be text, got 7"),
    ],
)
def test_an_entry_of_another_type_is_named(entries, message):
    header = golden_vocabularies.header(SMALL["sentence_piece"])
    header.metadata.update({f"tokenizer.ggml.{key}": value for key, value in entries.items()})
    with pytest.raises((CheckpointError, TokenizerError), match=message):
        tokenizer_from_gguf(header)


def test_bos_and_eos_are_added_as_the_file_says():
    bos = SMALL["byte_level"]["bos_token_id"]
    eos = SMALL["byte_level"]["eos_token_id"]
    header = golden_vocabularies.header(SMALL["byte_level"], pre="gpt-2", add_bos_token=True, add_eos_token=True)

    ids = tokenizer_from_gguf(header).encode("a").ids

    assert ids[0] == bos
    assert ids[-1] == eos
    assert tokenizer_from_gguf(header).encode("a", add_special_tokens=False).ids == ids[1:-1]


def test_sentence_piece_adds_bos_where_the_file_is_silent():
    entries = {key: value for key, value in SMALL["sentence_piece"].items() if key != "add_bos_token"}

    assert tokenizer_from_gguf(golden_vocabularies.header(entries)).encode("a").ids[0] == 1


def test_user_defined_tokens_are_found_in_text_but_are_not_special():
    entries = dict(SMALL["byte_level"])
    entries["token_type"] = [*entries["token_type"][:-1], 4]  # the last token, <|im_end|>
    tokenizer = tokenizer_from_backend(tokenizer_from_gguf(golden_vocabularies.header(entries, pre="gpt-2")))
    last = len(entries["tokens"]) - 1

    assert tokenizer.encode("<|im_end|>") == [last]
    assert last not in tokenizer.special_ids
    assert tokenizer.decode([last]) == "<|im_end|>"


def test_named_chat_templates_come_with_the_default():
    header = golden_vocabularies.header(SMALL["byte_level"], pre="gpt-2")
    header.metadata["tokenizer.chat_template"] = "A"
    header.metadata["tokenizer.chat_template.tool_use"] = "B"

    config = tokenizer_config_from_gguf(header)

    assert config["chat_template"] == {"default": "A", "tool_use": "B"}
    assert config["eos_token"] == "<|im_end|>"


def test_reading_smollm2_takes_less_than_a_second(smollm2):
    started = time.process_time()
    Tokenizer.from_source(smollm2.name)

    assert time.process_time() - started < 1.0
