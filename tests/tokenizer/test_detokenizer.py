"""Streaming text: every way of pushing gives the text of `decode`, and never half a character."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxserve.tokenizer.detokenizer import IncrementalDetokenizer
from jaxserve.tokenizer.tokenizer import tokenizer_from_backend
from tests.sentence_piece import like_llama

KINDS = ["smollm2", "byte_level", "sentence_piece", "metaspace"]
TEXTS = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("a 😀👍🏽你好한é\n▁")))
relaxed = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="session")
def metaspace():
    pieces = ["<unk>", "▁", "▁a", "b", "▁▁", "好", "😀", "é"]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return tokenizer_from_backend(backend)


@pytest.fixture(scope="session")
def tokenizers_by_name(smollm2, byte_level, sentence_piece, metaspace):
    return dict(zip(KINDS, (smollm2, byte_level, sentence_piece, metaspace), strict=True))


def streamed(tokenizer, ids, sizes=(1,), **options):
    """Push the ids in pieces of the given sizes, in turn."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    parts, position, turn = [], 0, 0
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        parts.append(detokenizer.push(ids[position : position + size]))
        position, turn = position + size, turn + 1
    return [*parts, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), skip=st.booleans())
def test_random_ids_stream_to_what_decode_gives(kind, tokenizers_by_name, data, sizes, skip):
    tokenizer = tokenizers_by_name[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))

    parts = streamed(tokenizer, ids, sizes, skip_special_tokens=skip)

    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["smollm2", "byte_level", "sentence_piece"])
@relaxed
@given(text=TEXTS)
def test_texts_stream_back_without_a_replacement_character(kind, tokenizers_by_name, text):
    tokenizer = tokenizers_by_name[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)

    parts = streamed(tokenizer, ids)

    assert "".join(parts) == tokenizer.decode(ids)
    if tokenizer.decode(ids).strip() == text.strip():  # not so for bytes that SmolLM2's vocabulary lacks
        assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


@relaxed
@given(data=st.data())
def test_runs_of_byte_tokens_stream_to_what_decode_gives(sentence_piece, data):
    raw = data.draw(st.one_of(TEXTS.map(str.encode), st.binary()))
    ids = [sentence_piece.backend.token_to_id(f"<0x{byte:02X}>") for byte in raw]
    piece = sentence_piece.encode("a", add_special_tokens=False)

    for all_ids in (ids, [*ids, *piece], [*piece, *ids, *piece]):
        assert "".join(streamed(sentence_piece, all_ids)) == sentence_piece.decode(all_ids)


def test_an_emoji_comes_whole(byte_level):
    ids = byte_level.encode("🦙")
    assert len(ids) > 1

    assert streamed(byte_level, ids) == [""] * (len(ids) - 1) + ["🦙", ""]


def test_an_unfinished_character_ends_as_decode_ends_it(byte_level):
    ids = byte_level.encode("a🦙")[:-1]

    parts = streamed(byte_level, ids)

    assert parts[-1] == "\ufffd"
    assert "".join(parts) == byte_level.decode(ids)


def test_text_after_a_prompt_keeps_its_first_space(sentence_piece):
    ids = sentence_piece.encode("Hello", add_special_tokens=False)

    assert "".join(streamed(sentence_piece, ids)) == "Hello"
    assert "".join(streamed(sentence_piece, ids, continues_text=True)) == " Hello"


@pytest.mark.parametrize("normalized", [True, False])
def test_added_tokens_stream_as_decode_reads_them(normalized):
    backend = like_llama()
    backend.add_tokens([AddedToken(text, normalized=normalized) for text in ("tool", "a▁b", "<0x41>")])
    tokenizer = tokenizer_from_backend(backend)
    ids = tokenizer.encode("the", add_special_tokens=False)
    ids += [backend.token_to_id(text) for text in ("tool", "a▁b", "<0x41>")]

    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == " " + tokenizer.decode(ids)


def test_a_decoder_that_only_the_library_knows_streams_too():
    backend = Backend(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "is": 3, "fun": 4}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = tokenizer_from_backend(backend)
    ids = [1, 2, 3, 4]

    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "playing is fun"


def test_the_cost_of_a_token_does_not_grow_with_the_text(smollm2):
    ids = smollm2.encode("The quick brown fox 😀 jumps. " * 40)

    def seconds(count):
        detokenizer = IncrementalDetokenizer(smollm2)
        started = time.process_time()
        for _ in range(count):
            detokenizer.push(ids)
        return time.process_time() - started

    assert seconds(80) < 8 * max(seconds(20), 1e-3)  # quadratic would be 16 times
